import Glibc
import GuestMemory
import Host
import Synchronization

/// Which pages are still to come in postcopy, and who sees to each: the destination's record, for any number of threads.
///
/// A page is *expected* from a DISCARD on; that never changes once the guest may touch it. It is *claimed* by the one thread that will
/// place it, which has its contents whole: a page that comes twice is claimed once. It is *placed* when it is in memory. It is *asked*
/// for at most once per connection. What is not expected is here, or is a hole that no source needs to be asked about.
final class PendingPages: Sendable {
    final class Block: AwaitedPages {
        let expected: AtomicPages
        let claimed: AtomicPages
        let placed: AtomicPages
        let asked: AtomicPages
        /// First pages of huge pages that were placed whole.
        let cameHuge: AtomicPages
        /// Pages that were placed, and taken out of guest memory for a moment: page tables may not have shown them.
        let wasMoved: AtomicPages

        init(pageCount: UInt64) throws(SystemError) {
            expected = try AtomicPages(pageCount: pageCount)
            claimed = try AtomicPages(pageCount: pageCount)
            placed = try AtomicPages(pageCount: pageCount)
            asked = try AtomicPages(pageCount: pageCount)
            cameHuge = try AtomicPages(pageCount: pageCount)
            wasMoved = try AtomicPages(pageCount: pageCount)
        }

        func awaitedRuns(in pages: Range<PageIndex>) -> [Range<PageIndex>] {
            var runs: [Range<PageIndex>] = []
            var position = pages.lowerBound
            while let run = expected.nextRun(from: position, before: pages.upperBound, missingFrom: placed) {
                runs.append(run)
                position = run.upperBound
            }
            position = pages.lowerBound
            while let run = wasMoved.nextRun(from: position, before: pages.upperBound) {
                runs.append(run)
                position = run.upperBound
            }
            return runs
        }
    }

    /// What ends a fault.
    enum Answer: Hashable {
        /// Nothing ever was there: zeroes.
        case hole
        /// The page came meanwhile: the fault is over.
        case here
        /// Whoever places the page ends it.
        case coming
        /// The source is to be asked, by who got this answer.
        case request
    }

    let blocks: [Block]
    let latency = PageLatency()
    /// If that is to be measured.
    let blockTime: BlockTime?
    private let missing = Atomic<UInt64>(0)
    private let isComplete = Monitor(false)
    private let surplus = Atomic<UInt64>(0)
    private let abandoned = Atomic<Bool>(false)

    init(_ memory: GuestMemory, blockTime: BlockTime? = nil) throws(SystemError) {
        self.blockTime = blockTime
        var blocks: [Block] = []
        for block in memory.blocks { blocks.append(try Block(pageCount: block.pageCount)) }
        self.blocks = blocks
    }

    /// Expected pages that are not placed.
    var missingPages: UInt64 { missing.load(ordering: .acquiring) }
    /// Pages that came though they were not missing: twice, or without having been discarded.
    var surplusPages: UInt64 { surplus.load(ordering: .relaxed) }

    /// Pages that will come. Before anybody waits for one.
    func expect(_ pages: Range<PageIndex>, of block: Int) {
        missing.wrappingAdd(blocks[block].expected.insert(pages), ordering: .releasing)
    }

    /// All pages that will come, run by run.
    func forEachExpected(_ body: (_ pages: Range<PageIndex>, _ block: Int) -> Void) {
        for block in blocks.indices {
            var position = PageIndex(0)
            while let run = blocks[block].expected.nextRun(from: position) {
                body(run, block)
                position = run.upperBound
            }
        }
    }

    /// They will all come again, on another way: whoever cannot place one any more need not.
    func abandon() { abandoned.store(true, ordering: .sequentiallyConsistent) }
    var isAbandoned: Bool { abandoned.load(ordering: .sequentiallyConsistent) }

    /// A page's contents are here. - Returns: whether the caller is to place them.
    func claim(_ page: PageIndex, of block: Int) -> Bool {
        guard blocks[block].expected.contains(page), blocks[block].claimed.insert(page) else {
            surplus.wrappingAdd(1, ordering: .relaxed)
            return false
        }
        return true
    }

    /// Pages came that somebody had claimed before.
    func cameAgain(_ count: UInt64) { if count > 0 { surplus.wrappingAdd(count, ordering: .relaxed) } }

    /// Pages that the caller claimed were not placed: whoever brings them next may.
    func unclaim(_ pages: Range<PageIndex>, of block: Int) { blocks[block].claimed.remove(pages) }

    /// Pages that the caller claimed are in memory.
    func placed(_ pages: Range<PageIndex>, of block: Int) {
        let record = blocks[block]
        let fresh = record.placed.insert(pages)
        var position = pages.lowerBound
        while let run = record.asked.nextRun(from: position, before: pages.upperBound) {
            for page in run { latency.arrived(PageLatency.Place(block: block, page: page)) }
            position = run.upperBound
        }
        blockTime?.ended(pages, of: block)
        if missing.wrappingSubtract(fresh, ordering: .acquiringAndReleasing).newValue == 0 {
            isComplete.withLock { $0 = true }
        }
    }

    /// A thread waits for that page.
    func answer(_ page: PageIndex, of block: Int, thread: Int32 = 0) -> Answer {
        let record = blocks[block]
        guard record.expected.contains(page) else { return .hole }
        if record.placed.contains(page) { return .here }
        let place = PageLatency.Place(block: block, page: page)
        if let blockTime {
            blockTime.began(place, thread: thread)
            // It may have come before it was known that somebody waits.
            if record.placed.contains(page) { blockTime.ended(page..<page.advanced(by: 1), of: block) }
        }
        // Who claims a page has it whole, and ends all faults there.
        if record.claimed.contains(page) { return .coming }
        guard record.asked.insert(page) else { return .coming }
        latency.asked(place)
        // It may have come before it was known to be asked for.
        if record.placed.contains(page) { latency.arrived(place) }
        return .request
    }

    /// For who reads guest memory while the guest stands still: it may have been at a page that whoever placed it had not told of yet.
    /// - Returns: whether the page is in memory; false: it is still to come, and nobody was there.
    /// - Throws: `SystemError`: who is to place it does not.
    func waitUntilTold(
        _ page: PageIndex, of block: Int, nanoseconds: UInt64 = 1_000_000_000
    ) throws(SystemError) -> Bool {
        let record = blocks[block]
        if !record.expected.contains(page) || record.placed.contains(page) { return true }
        let deadline = Deadline.after(nanoseconds: nanoseconds)
        while !record.placed.contains(page) {
            guard record.claimed.contains(page) else { return record.placed.contains(page) }
            guard !deadline.hasPassed else {
                throw SystemError("place", "page \(page.value) of RAM block \(block)", code: ETIMEDOUT)
            }
            Clock.sleep(nanoseconds: Self.tellingNanoseconds)
        }
        return true
    }

    /// A page is placed and told of by one thread, without waiting in between.
    private static let tellingNanoseconds: UInt64 = 20_000

    /// - Returns: the pages that are missing when all are here, or at the deadline.
    func waitUntilComplete(deadline: Deadline) -> UInt64 {
        if missingPages > 0 { isComplete.wait(deadline: deadline) { _ in missingPages == 0 ? () : nil } }
        return missingPages
    }
}
