import Accelerator
import Glibc
import GuestMemory
import Host
import Synchronization

/// All places of this process where guest memory can be touched while pages of it are missing: the mappings of the blocks, and the windows in
/// which KVM shows memory files.
///
/// A page is placed through its block's mapping. A file has it then for everybody; but who sleeps for it in a window must be woken there.
final class WatchedMemory: WindowWatch {
    let faults: UserFault
    private let memory: GuestMemory
    /// Where blocks lie, by index.
    private let blocks: [Range<UInt>]

    private struct Windows {
        /// What is watched now, in no order: a few per block.
        var all: [BlockWindow] = []
        var isOver = false
    }
    private let windows = Mutex(Windows())
    /// Without any, nobody is woken elsewhere.
    private let hasWindows = Atomic(false)

    init(_ memory: GuestMemory, wanting features: UserFault.Features) throws(SystemError) {
        self.memory = memory
        faults = try UserFault(wanting: features)
        blocks = memory.blocks.map {
            let start = $0.mapping.hostAddress(at: 0)
            return start..<start + UInt($0.byteCount)
        }
    }

    /// What lies at an address where a fault was. - Returns: `nil`: nothing any more.
    func page(at address: UInt) -> (block: Int, page: PageIndex)? {
        if let block = blocks.firstIndex(where: { $0.contains(address) }) {
            return (block, RAMOffset(UInt64(address - blocks[block].lowerBound)).page)
        }
        return windows.withLock { windows in
            guard let window = windows.all.first(where: { $0.addresses.contains(address) }) else { return nil }
            return (window.block, window.pages.lowerBound.advanced(by: Int((address - window.address) >> 12)))
        }
    }

    /// Who sleeps at that address tries again.
    func wake(at address: UInt) throws(SystemError) {
        let start = address & ~UInt(GuestPage.byteCount - 1)
        try faults.wake(start..<start + UInt(GuestPage.byteCount))
    }

    /// Pages are in memory, and known as placed: a fault that is read from now on is answered by who reads it, one that was read before
    /// ends here.
    func wakeWindows(_ pages: Range<PageIndex>, of block: Int) throws(SystemError) {
        guard hasWindows.load(ordering: .acquiring) else { return }
        let places = windows.withLock { windows in
            windows.all.compactMap { window -> Range<UInt>? in
                guard window.block == block, window.pages.overlaps(pages) else { return nil }
                let part = pages.clamped(to: window.pages)
                let start =
                    window.address + UInt((part.lowerBound.value - window.pages.lowerBound.value) << GuestPage.shift)
                return BlockWindow(address: start, block: block, pages: part).addresses
            }
        }
        for place in places { try faults.wake(place) }
    }

    /// Has an accelerator tell of its windows, now and whenever they change.
    func watchWindows(of accelerator: (any Accelerator)?) throws(SystemError) {
        do throws(AcceleratorError) { try accelerator?.watchWindows(self) } catch {
            throw SystemError("watch", "what vCPUs see of memory files", code: EINVAL, remedy: error.description)
        }
    }

    var shownNow: [BlockWindow] { windows.withLock { $0.all } }

    // MARK: WindowWatch

    func shows(_ window: BlockWindow) throws(SystemError) {
        try windows.withLock { (windows) throws(SystemError) in
            guard !windows.isOver else { return }
            Self.forget(window.addresses, in: &windows)
            try faults.register(window.addresses, .missing)
            windows.all.append(window)
            hasWindows.store(true, ordering: .releasing)
        }
    }

    func hides(_ addresses: Range<UInt>) { windows.withLock { Self.forget(addresses, in: &$0) } }

    /// A range that was mapped anew is not registered any more: only the record of it goes.
    private static func forget(_ addresses: Range<UInt>, in windows: inout Windows) {
        windows.all = windows.all.flatMap { window -> [BlockWindow] in
            guard window.addresses.overlaps(addresses) else { return [window] }
            let gone = addresses.clamped(to: window.addresses)
            let before = UInt64(gone.lowerBound - window.address) >> GuestPage.shift
            let until = UInt64(gone.upperBound - window.address) >> GuestPage.shift
            let first = window.pages.lowerBound
            let left = [
                BlockWindow(
                    address: window.address, block: window.block, pages: first..<first.advanced(by: Int(before))),
                BlockWindow(
                    address: gone.upperBound, block: window.block,
                    pages: first.advanced(by: Int(until))..<window.pages.upperBound),
            ]
            return left.filter { !$0.pages.isEmpty }
        }
    }

    /// Windows are not watched any more: who sleeps there goes on.
    func endWindows() {
        let all = windows.withLock { windows in
            windows.isOver = true
            defer { windows.all = [] }
            return windows.all
        }
        for window in all { try? faults.unregister(window.addresses) }
    }
}
