import Glibc
import GuestMemory
import Host
import MigrationStream
import Synchronization

/// The thread that hears of accesses to missing pages, and has the source asked for them.
///
/// It touches guest memory through the userfaultfd alone, and takes no lock that anybody holds who does: it would wait for itself.
final class FaultServer: Sendable {
    private let watched: WatchedMemory
    private let memory: GuestMemory
    private let pending: PendingPages
    /// Blocks of hugetlb pages, by index.
    private let splits: [Int: SplitBlock]
    /// A QEMU is asked for whole pages of its memory.
    private let asksWholePages = Atomic(false)
    /// Where pages may be that are not placed yet.
    private let staged = Mutex<StagedHugePage?>(nil)
    private let stop: EventDescriptor
    private let request: @Sendable ([PageRequest]) -> Void

    /// More than threads of a guest that fault at once.
    private static let batchCapacity = 64

    init(
        _ watched: WatchedMemory, _ memory: GuestMemory, _ pending: PendingPages, _ splits: [Int: SplitBlock],
        request: @escaping @Sendable ([PageRequest]) -> Void
    ) throws(SystemError) {
        self.watched = watched
        self.memory = memory
        self.pending = pending
        self.splits = splits
        self.request = request
        stop = try EventDescriptor()
    }

    /// Before `run`.
    func askForWholePages() { asksWholePages.store(true, ordering: .relaxed) }

    /// Pages are looked for there, too, from now on.
    func look(in staged: StagedHugePage?) { self.staged.withLock { $0 = staged } }

    /// Ends once `end` was called and no fault waits. - Throws: `SystemError`.
    func run() throws(SystemError) {
        var batch = PageFaultBatch(capacity: Self.batchCapacity)
        var requests: [PageRequest] = []
        while try watched.faults.waitForFaults(into: &batch, stop: stop) {
            requests.removeAll(keepingCapacity: true)
            for index in 0..<batch.count {
                do throws(SystemError) { try take(batch[index], &requests) } catch {
                    // Not watched any more, since it was read: who sleeps there finds what is there now.
                    guard error.code == ENOENT else { throw error }
                    try watched.wake(at: batch[index].address)
                }
            }
            if !requests.isEmpty { request(requests) }
        }
    }

    func end() { stop.raise() }

    private func take(_ fault: PageFault, _ requests: inout [PageRequest]) throws(SystemError) {
        // What was taken away meanwhile: who touches it again finds what is there now.
        guard let place = watched.page(at: fault.address) else { return try watched.wake(at: fault.address) }
        let page = place.page
        let block = memory.blocks[place.block]
        if fault.isProtected {
            guard let split = splits[place.block] else { return try watched.wake(at: fault.address) }
            return try split.written(page)
        }
        switch pending.answer(page, of: place.block, thread: fault.threadID) {
        case .hole:
            if let split = splits[place.block] { return try split.serve(page) }
            let start = Int(page.offset.value)
            try watched.faults.zero(block.mapping, start..<start + Int(GuestPage.byteCount))
            // In a window nobody was woken by that.
            try watched.wake(at: fault.address)
        case .here:
            if try staged.withLock({ $0 })?.serve(page, of: place.block) == true { return }
            try watched.wake(at: fault.address)
        case .coming: break
        case .request:
            if try staged.withLock({ $0 })?.serve(page, of: place.block) == true { return }
            requests.append(ask(for: page, of: place.block))
        }
    }

    private func ask(for page: PageIndex, of index: Int) -> PageRequest {
        let block = memory.blocks[index]
        guard asksWholePages.load(ordering: .relaxed), block.pageBytes > GuestPage.byteCount else {
            return PageRequest(block: block.name, offset: page.offset.value, length: UInt32(GuestPage.byteCount))
        }
        let start = page.offset.value / block.pageBytes * block.pageBytes
        pending.blocks[index].asked.insert(RAMOffset(start).page..<RAMOffset(start + block.pageBytes).page)
        return PageRequest(block: block.name, offset: start, length: UInt32(block.pageBytes))
    }
}
