import GuestMemory
import Host
import Synchronization

/// A block of hugetlb pages that arrives in pages of 4 KiB.
///
/// A hugetlb page cannot be there in part. So where pages of a *unit* (a huge page or, of large blocks, several) are still to come, private
/// memory is shown in its place, at the same address: pages are placed there, and what did not have to come again is copied from the huge
/// page, which is seen through a mapping of its own, when it is first touched. Once a unit's pages are all here they are copied to the
/// huge page, and that is shown again. vCPUs follow by the kernel's own means, their memory slots stay.
///
/// What the guest writes during the copy must not get lost: pages are write-protected for it. Writes to a small unit wait for some hundred
/// microseconds; of a large one, what is written meanwhile is copied again until little is left, and only then writes wait.
final class SplitBlock: AwaitedPages {
    private let watched: WatchedMemory
    private let index: Int
    private let block: RAMBlock
    private let file: MemoryFile
    private let record: PendingPages.Block
    /// The huge pages, beside what is shown.
    private let alias: Mapping
    let unitPages: UInt64
    /// Units in whose place private memory is shown.
    private let split: AtomicPages
    /// Pages that were copied from the huge page to there.
    private let served: AtomicPages

    private struct Move {
        let unit: PageIndex
        /// Whoever touches the unit waits until it has moved.
        var isFrozen: Bool
        /// Pages that were written, or came, since they were copied.
        var again: [PageIndex] = []
    }
    /// Held for one call that places or protects a page; never while guest memory is touched.
    private let move = Mutex<Move?>(nil)

    /// So many mappings the kernel may have to keep for a block; a process has 65,530.
    private static let mostUnits: UInt64 = 16_384
    /// So many pages are copied while writes wait.
    private static let frozenPages: UInt64 = 512
    private static let mostPasses = 8
    /// Who touches one page of what is here often touches the next; more would keep the first one waiting.
    private static let servedPages = 8

    /// - Returns: `nil`: the block's pages are small.
    init?(
        _ watched: WatchedMemory, _ memory: GuestMemory, _ index: Int, _ record: PendingPages.Block
    ) throws(SystemError) {
        let block = memory.blocks[index]
        guard let file = block.file, block.pageBytes > GuestPage.byteCount else { return nil }
        self.watched = watched
        self.index = index
        self.block = block
        self.file = file
        self.record = record
        alias = try Mapping(file.descriptor, byteCount: Int(block.byteCount))
        try? alias.advise(.dontDump)
        var unit = block.pageBytes
        while block.byteCount / unit > Self.mostUnits { unit *= 2 }
        unitPages = unit >> GuestPage.shift
        split = try AtomicPages(pageCount: (block.byteCount + unit - 1) / unit)
        served = try AtomicPages(pageCount: block.pageCount)
    }

    // MARK: Units

    private func unit(of page: PageIndex) -> PageIndex { PageIndex(page.value / unitPages) }

    private func pages(of unit: PageIndex) -> Range<PageIndex> {
        PageIndex(unit.value * unitPages)..<PageIndex(min((unit.value + 1) * unitPages, block.pageCount))
    }

    private static func bytes(_ pages: Range<PageIndex>) -> Range<Int> {
        Int(pages.lowerBound.offset.value)..<Int(pages.upperBound.offset.value)
    }

    /// Units that are not huge now, as pages.
    var splitUnits: [Range<PageIndex>] {
        var units: [Range<PageIndex>] = []
        var position = PageIndex(0)
        while let run = split.nextRun(from: position) {
            units += run.map(pages(of:))
            position = run.upperBound
        }
        return units
    }

    /// Pages that will come: their units are shown as private memory from now on. Nobody touches them yet.
    func expect(_ pages: Range<PageIndex>) throws(SystemError) {
        var position = unit(of: pages.lowerBound)
        let end = unit(of: pages.upperBound.advanced(by: -1)).advanced(by: 1)
        while position < end {
            var next = position
            while next < end, !split.contains(next) { next = next.advanced(by: 1) }
            if position < next {
                let range = self.pages(of: position).lowerBound..<self.pages(of: next.advanced(by: -1)).upperBound
                let bytes = Self.bytes(range)
                try block.mapping.showNothing(at: bytes.lowerBound, count: bytes.count)
                split.insert(position..<next)
            }
            position = next.advanced(by: 1)
        }
    }

    /// Has missing pages of the units, and writes to protected ones, be told of.
    func watch() throws(SystemError) {
        try forEachStretch { (range) throws(SystemError) in
            try watched.faults.register(block.mapping, range, [.missing, .writeProtected])
        }
    }

    /// Whoever sleeps goes on.
    func unwatch() { forEachStretch { try? watched.faults.unregister(block.mapping, $0) } }

    private func forEachStretch<E: Error>(_ body: (Range<Int>) throws(E) -> Void) throws(E) {
        var position = PageIndex(0)
        while let run = split.nextRun(from: position) {
            let end = pages(of: run.upperBound.advanced(by: -1)).upperBound
            try body(Self.bytes(pages(of: run.lowerBound).lowerBound..<end))
            position = run.upperBound
        }
    }

    // MARK: AwaitedPages

    /// What page tables do not show though it exists: pages on their way, and those that wait in the huge page.
    func awaitedRuns(in pages: Range<PageIndex>) -> [Range<PageIndex>] {
        var runs: [Range<PageIndex>] = []
        guard !pages.isEmpty else { return runs }
        var position = unit(of: pages.lowerBound)
        let end = unit(of: pages.upperBound.advanced(by: -1)).advanced(by: 1)
        while let split = split.nextRun(from: position, before: end, limit: 1) {
            for page in self.pages(of: split.lowerBound).clamped(to: pages)
            where !record.placed.contains(page) && !served.contains(page) {
                if let last = runs.last, last.upperBound == page {
                    runs[runs.count - 1] = last.lowerBound..<page.advanced(by: 1)
                } else {
                    runs.append(page..<page.advanced(by: 1))
                }
            }
            position = split.upperBound
        }
        return runs
    }

    // MARK: The thread that serves faults

    /// A page is touched that nobody has to be asked for. It is copied from the huge page, with some behind it, or its unit has moved, or
    /// is about to.
    func serve(_ page: PageIndex) throws(SystemError) {
        try move.withLock { (move) throws(SystemError) in
            let unit = unit(of: page)
            let isMoving = move?.unit == unit
            // Who moves it wakes all who sleep there.
            if isMoving, move?.isFrozen == true { return }
            var end = page
            let limit = min(page.advanced(by: Self.servedPages), pages(of: unit).upperBound)
            if split.contains(unit) {
                while end < limit, !record.expected.contains(end), served.insert(end) { end = end.advanced(by: 1) }
            }
            guard page < end else {
                return try watched.faults.wake(block.mapping, Self.bytes(page..<page.advanced(by: 1)))
            }
            let bytes = Self.bytes(page..<end)
            try watched.faults.copy(alias, at: bytes.lowerBound, into: block.mapping, bytes)
            if isMoving { move?.again += page..<end }
        }
    }

    /// A protected page is written.
    func written(_ page: PageIndex) throws(SystemError) {
        let bytes = Self.bytes(page..<page.advanced(by: 1))
        try move.withLock { (move) throws(SystemError) in
            guard let current = move, current.unit == unit(of: page) else {
                return try watched.faults.wake(block.mapping, bytes)
            }
            guard !current.isFrozen else { return }
            move?.again.append(page)
            try watched.faults.unprotect(block.mapping, bytes)
        }
    }

    // MARK: The thread that makes pages huge

    /// All pages of the unit are here: it becomes huge. - Throws: `SystemError`; then it stays as it is.
    func makeHuge(_ pages: Range<PageIndex>) throws(SystemError) {
        let unit = unit(of: pages.lowerBound)
        guard split.contains(unit) else { return }
        let bytes = Self.bytes(pages)
        // Takes the huge pages from the host before anybody waits.
        for start in stride(from: bytes.lowerBound, to: bytes.upperBound, by: Int(block.pageBytes)) {
            _ = alias.load(at: start, as: UInt8.self)
        }
        let isSmall = UInt64(pages.count) <= Self.frozenPages
        move.withLock { $0 = Move(unit: unit, isFrozen: isSmall) }
        do throws(SystemError) {
            // A part at a time: as long as the kernel protects a range no vCPU gets a page of it.
            var start = pages.lowerBound
            while start < pages.upperBound {
                let part = start..<min(start.advanced(by: Int(Self.frozenPages)), pages.upperBound)
                try protect(part)
                start = part.upperBound
            }
            if !isSmall { try copyWhatChanged() }
            try block.mapping.share(
                file.descriptor, fileOffset: UInt64(bytes.lowerBound), at: bytes.lowerBound, count: bytes.count)
            split.remove(unit)
        } catch {
            move.withLock { $0 = nil }
            try? watched.faults.unprotect(block.mapping, bytes)
            try? watched.faults.wake(block.mapping, bytes)
            throw error
        }
        move.withLock { $0 = nil }
        try watched.faults.wake(block.mapping, bytes)
    }

    /// Behind the first copy: again what was written, while it gets less; the last time nobody writes.
    private func copyWhatChanged() throws(SystemError) {
        for _ in 0..<Self.mostPasses {
            let again = takeChanged(freezing: false)
            for page in again { try protect(page..<page.advanced(by: 1)) }
            if again.count <= Self.frozenPages { break }
        }
        // All others are protected, and stay so.
        for page in takeChanged(freezing: true) { try protect(page..<page.advanced(by: 1)) }
    }

    /// Whoever writes to the pages is heard of from here on; as they are now they are in the huge page.
    private func protect(_ pages: Range<PageIndex>) throws(SystemError) {
        try watched.faults.protect(block.mapping, Self.bytes(pages))
        copy(pages)
    }

    private func takeChanged(freezing: Bool) -> Set<PageIndex> {
        move.withLock { move in
            defer { move?.again = [] }
            if freezing { move?.isFrozen = true }
            return Set(move?.again ?? [])
        }
    }

    /// From where the guest sees pages to the huge page, as far as they are there.
    private func copy(_ pages: Range<PageIndex>) {
        var start: PageIndex?
        for page in pages.lowerBound..<pages.upperBound.advanced(by: 1) {
            let isHere = page < pages.upperBound && (record.placed.contains(page) || served.contains(page))
            if isHere {
                if start == nil { start = page }
            } else if let first = start {
                let run = Self.bytes(first..<page)
                alias.copy(from: block.mapping, at: run.lowerBound, count: run.count, to: run.lowerBound)
                start = nil
            }
        }
    }

    /// The guest does not run, or never will, and nobody brings pages any more: all is huge again, with what is here.
    /// - Throws: `SystemError`: some unit could not be, and its pages that came before are not seen: no guest may start on that.
    func restore() throws(SystemError) {
        var failure: SystemError?
        for pages in splitUnits {
            copy(pages)
            let bytes = Self.bytes(pages)
            do throws(SystemError) {
                try block.mapping.share(
                    file.descriptor, fileOffset: UInt64(bytes.lowerBound), at: bytes.lowerBound, count: bytes.count)
                split.remove(unit(of: pages.lowerBound))
            } catch { failure = failure ?? error }
        }
        if let failure { throw failure }
    }
}
