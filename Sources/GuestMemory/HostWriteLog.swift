import Synchronization

/// Pages of guest memory which the monitor itself wrote while tracking is on (BIOS services, later devices).
public final class HostWriteLog: Sendable {
    private struct State {
        var isOn = false
        var pages: [ObjectIdentifier: Set<PageIndex>] = [:]
    }
    private let state = Mutex(State())

    public init() {}

    /// Starts or stops recording; either way what was recorded is forgotten.
    public func setRecording(_ on: Bool) {
        state.withLock { $0 = State(isOn: on) }
    }

    /// Call after the write.
    public func record(_ block: RAMBlock, offset: Int, count: Int) {
        guard count > 0 else { return }
        state.withLock { state in
            guard state.isOn else { return }
            let first = RAMOffset(UInt64(offset)).page
            let last = RAMOffset(UInt64(offset + count - 1)).page
            for page in first...last { state.pages[ObjectIdentifier(block), default: []].insert(page) }
        }
    }

    /// Moves what was recorded into the bitmaps, one per block.
    public func collect(_ blocks: [RAMBlock], into bitmaps: [any DirtyPages]) {
        collect(blocks) { bitmaps[$0].set($1) }
    }

    /// Hands over what was recorded: the number of a block, and pages of it.
    public func collect(_ blocks: [RAMBlock], _ body: (Int, Range<PageIndex>) -> Void) {
        let pages = state.withLock { state in
            let pages = state.pages
            state.pages = [:]
            return pages
        }
        guard !pages.isEmpty else { return }
        for (index, block) in blocks.enumerated() {
            for page in pages[ObjectIdentifier(block)] ?? [] { body(index, page..<page.advanced(by: 1)) }
        }
    }
}
