import GuestMemory
import Host
import Synchronization

/// The address space in which memory files are shown to the guest, in guest-physical order: one window per granule that shows something.
///
/// A guest page always has the same host address, so that slots may be split and joined while what stands behind them stays.
final class SlotWindows: Sendable {
    private let granulePages: UInt64
    private let windows = Mutex<[UInt64: AddressWindow]>([:])
    /// A file of ones.
    private let nothing = Mutex<MemoryFile?>(nil)
    /// Who must know of every place where a file's pages can be touched.
    private let watch = Mutex<(any WindowWatch)?>(nil)

    init(granulePages: UInt64) { self.granulePages = granulePages }

    /// Makes sure that guest pages have a place. - Throws: where this process has no address space left.
    func reserve(_ pages: Range<UInt64>) throws(SystemError) {
        guard !pages.isEmpty else { return }
        try windows.withLock { (windows) throws(SystemError) in
            for granule in pages.lowerBound / granulePages...(pages.upperBound - 1) / granulePages
            where windows[granule] == nil {
                windows[granule] = try AddressWindow(byteCount: Int(granulePages << GuestPage.shift))
            }
        }
    }

    private func place(_ page: UInt64) -> (window: AddressWindow, offset: Int) {
        guard let window = windows.withLock({ $0[page / granulePages] }) else {
            preconditionFailure("windows are reserved before they are used")
        }
        return (window, Int((page % granulePages) << GuestPage.shift))
    }

    func hostAddress(of page: UInt64) -> UInt {
        let (window, offset) = place(page)
        return window.hostAddress(at: offset)
    }

    func setWatch(_ new: (any WindowWatch)?) { watch.withLock { $0 = new } }

    /// While that is so, windows are changed with all vCPUs held: between the change and the watch a touch would go unnoticed.
    var isWatched: Bool { watch.withLock { $0 != nil } }

    /// Guest pages of one granule, as a watch is told of them.
    func window(_ pages: Range<UInt64>, _ content: ShownPages.Content) -> BlockWindow {
        BlockWindow(
            address: hostAddress(of: pages.lowerBound), block: content.block,
            pages: content.firstPage..<content.firstPage.advanced(by: pages.count))
    }

    /// An exchange that failed.
    struct Failure: Error {
        let cause: SystemError
        /// Why what was there before could not be shown, or watched, again: then nobody knows what the guest would find there.
        var wayBack: SystemError?
    }

    /// Exchanges what stands behind guest pages of one granule. Atomic for whoever touches them.
    func exchange(
        _ pages: Range<UInt64>, from old: ShownPages.Content?, to new: ShownPages.Content?, blocks: [RAMBlock]
    ) throws(Failure) {
        do throws(SystemError) { try show(pages, from: old, to: new, blocks: blocks) } catch {
            throw Failure(cause: error)
        }
        guard let watch = watch.withLock({ $0 }) else { return }
        guard let new else {
            let address = hostAddress(of: pages.lowerBound)
            return watch.hides(address..<address + UInt(pages.count << Int(GuestPage.shift)))
        }
        if let old, old.block == new.block, old.firstPage == new.firstPage { return }
        do throws(SystemError) { try watch.shows(window(pages, new)) } catch {
            var failure = Failure(cause: error)
            do throws(SystemError) {
                try show(pages, from: new, to: old, blocks: blocks)
                if let old { try watch.shows(window(pages, old)) }
            } catch { failure.wayBack = error }
            throw failure
        }
    }

    private func show(
        _ pages: Range<UInt64>, from old: ShownPages.Content?, to new: ShownPages.Content?, blocks: [RAMBlock]
    ) throws(SystemError) {
        let (window, offset) = place(pages.lowerBound)
        let count = pages.count << Int(GuestPage.shift)
        guard let new, let file = blocks[new.block].file else {
            return try showNothing(in: window, at: offset, byteCount: count)
        }
        if let old, old.block == new.block, old.firstPage == new.firstPage {
            return try window.protect(at: offset, byteCount: count, readOnly: new.isReadOnly)
        }
        try window.show(
            file.descriptor, from: new.firstPage.offset.value, at: offset, byteCount: count, readOnly: new.isReadOnly)
    }

    private static let nothingByteCount = 1 << 20
    /// Larger holes are not worth the mappings.
    private static let largestNothing = 64 << 20

    /// Where nothing answers a PC reads ones: a guest finds them on the processor itself. What it writes makes KVM_RUN fail.
    private func showNothing(in window: AddressWindow, at offset: Int, byteCount: Int) throws(SystemError) {
        guard byteCount <= Self.largestNothing else { return try window.hide(at: offset, byteCount: byteCount) }
        let file = try nothing.withLock { (nothing) throws(SystemError) in
            if let nothing { return nothing }
            let file = try MemoryFile(name: "godwit-nothing", byteCount: UInt64(Self.nothingByteCount))
            let mapping = try Mapping(file.descriptor, byteCount: Self.nothingByteCount)
            mapping.write([UInt8](repeating: 0xff, count: Self.nothingByteCount), at: 0)
            nothing = file
            return file
        }
        var done = 0
        while done < byteCount {
            let count = min(byteCount - done, Self.nothingByteCount)
            try window.show(file.descriptor, from: 0, at: offset + done, byteCount: count, readOnly: true)
            done += count
        }
    }
}
