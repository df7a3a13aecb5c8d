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
        let pages = state.withLock { state in
            let pages = state.pages
            state.pages = [:]
            return pages
        }
        for (block, bitmap) in zip(blocks, bitmaps) {
            for page in pages[ObjectIdentifier(block)] ?? [] { bitmap.set(page..<page.advanced(by: 1)) }
        }
    }
}
