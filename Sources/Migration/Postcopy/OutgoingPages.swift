import GuestMemory
import Host
import MigrationStream
import Synchronization

/// What a destination whose guest runs does not have. Whoever takes a page out of it sends it; nobody else ever does: a QEMU gives up over
/// a page that comes twice.
final class OutgoingPages: Sendable {
    /// Pages side by side, all of one kind.
    struct Piece: Sendable, Equatable {
        let block: Int
        let pages: Range<PageIndex>
        /// Never written and never sent: zeros, which only come when they are asked for.
        var isHole = false

        var pageCount: UInt64 { pages.upperBound.value - pages.lowerBound.value }
    }

    /// Where the walk goes on.
    struct Place: Sendable, Equatable {
        var block = 0
        var page = PageIndex(0)
    }

    private let indices: [String: Int]
    /// Pages of one page of the destination's memory, by block. Where that is more than one, all of them go together, over one channel
    /// and with nothing between them: a QEMU places them as one. Who clears the first one's bit sends them all.
    private let hostPages: [UInt64]
    /// To be sent, asked for or not.
    private let wanted: [AtomicPages]
    /// All that was ever found to be written, and holes that were asked for.
    private let known: [AtomicPages]
    /// All that was ever to be sent, for a guest that does not move after all, or another connection; and holes that were asked for.
    private let discarded: [AtomicPages]
    /// What was asked for, of a destination that takes a page twice; `nil`: it does not.
    private let asked: [AtomicPages]?
    private let left = Atomic<UInt64>(0)

    /// Takes over what is dirty in `bitmaps`.
    /// - Parameters:
    ///   - known: what was dirty at any time, this included.
    ///   - repeats: the destination is a Godwit, which drops what it has. A page that it asks for though it was sent with the rest goes
    ///     once more: it may be behind much that waits in sockets.
    init(
        of blocks: [RAMBlockDescription], taking bitmaps: [any DirtyPages], known: [AtomicPages], repeats: Bool = false
    ) throws(SystemError) {
        var asked: [AtomicPages] = []
        if repeats {
            for bitmap in bitmaps { asked.append(try AtomicPages(pageCount: bitmap.pageCount)) }
        }
        self.asked = repeats ? asked : nil
        var indices: [String: Int] = [:]
        for (index, block) in blocks.enumerated() { indices[block.name] = index }
        self.indices = indices
        self.known = known
        let hostPages = blocks.map { $0.pageSize / UInt64(Wire.pageSize) }
        self.hostPages = hostPages
        var wanted: [AtomicPages] = []
        var discarded: [AtomicPages] = []
        for bitmap in bitmaps {
            wanted.append(try AtomicPages(pageCount: bitmap.pageCount))
            discarded.append(try AtomicPages(pageCount: bitmap.pageCount))
        }
        self.wanted = wanted
        self.discarded = discarded
        try add(bitmaps)
        // A QEMU that is told to forget nothing takes LISTEN and then refuses RUN: one page goes again.
        if count == 0, !wanted.isEmpty { want(PageIndex(0)..<PageIndex(hostPages[0]), of: 0) }
    }

    /// Takes over what else is dirty: the guest ran on. Before anything is taken.
    /// - Returns: what was not wanted before, in order.
    @discardableResult
    func add(_ bitmaps: [any DirtyPages]) throws(SystemError) -> [Piece] {
        var fresh: [Piece] = []
        for (block, bitmap) in bitmaps.enumerated() {
            let dirty = try AtomicPages(pageCount: bitmap.pageCount)
            var position = PageIndex(0)
            while let run = bitmap.nextRun(from: position, limit: .max) {
                dirty.insert(Self.widened(run, to: hostPages[block]))
                position = run.upperBound
            }
            if hostPages[block] > 1 { Self.widen(known[block], to: hostPages[block]) }
            bitmap.removeAll()
            position = PageIndex(0)
            while let run = dirty.nextRun(from: position, missingFrom: discarded[block]) {
                want(run, of: block)
                fresh.append(Piece(block: block, pages: run))
                position = run.upperBound
            }
        }
        return fresh
    }

    private func want(_ pages: Range<PageIndex>, of block: Int) {
        left.wrappingAdd(wanted[block].insert(pages), ordering: .relaxed)
        known[block].insert(pages)
        discarded[block].insert(pages)
    }

    private static func widened(_ run: Range<PageIndex>, to pages: UInt64) -> Range<PageIndex> {
        let end = (run.upperBound.value + pages - 1) / pages * pages
        return PageIndex(run.lowerBound.value / pages * pages)..<PageIndex(end)
    }

    private static func widen(_ set: AtomicPages, to pages: UInt64) {
        var position = PageIndex(0)
        while let run = set.nextRun(from: position) {
            let whole = widened(run, to: pages)
            set.insert(whole)
            position = whole.upperBound
        }
    }

    /// For another connection: all that was ever wanted and is not there. A page that was not wanted must not come: it is there, and a QEMU
    /// gives up over it.
    /// - Parameter received: what the destination has, block by block. Nobody takes anything out of `old` any more.
    init(_ old: OutgoingPages, without received: [AtomicPages]) throws(SystemError) {
        indices = old.indices
        hostPages = old.hostPages
        known = old.known
        var asked: [AtomicPages] = []
        for pages in old.asked ?? [] { asked.append(try AtomicPages(pageCount: pages.pageCount)) }
        self.asked = old.asked == nil ? nil : asked
        discarded = old.discarded
        var wanted: [AtomicPages] = []
        var count: UInt64 = 0
        for (index, (discarded, received)) in zip(old.discarded, received).enumerated() {
            let pages = try AtomicPages(pageCount: discarded.pageCount)
            var position = PageIndex(0)
            while let run = discarded.nextRun(from: position, missingFrom: received) {
                // A part of a large page is nothing: without its first bit nobody could take the others.
                let whole = Self.widened(run, to: old.hostPages[index])
                count += pages.insert(whole)
                position = whole.upperBound
            }
            wanted.append(pages)
        }
        self.wanted = wanted
        left.store(count, ordering: .relaxed)
    }

    /// Pages that nobody has taken.
    var count: UInt64 { left.load(ordering: .acquiring) }

    /// All that is to be sent, run by run.
    func forEachRun<E: Error>(_ body: (_ block: Int, _ pages: Range<PageIndex>) throws(E) -> Void) throws(E) {
        for block in wanted.indices {
            var position = PageIndex(0)
            while let run = wanted[block].nextRun(from: position) {
                try body(block, run)
                position = run.upperBound
            }
        }
    }

    /// All that there was to be sent, whether or not it was taken since.
    func forEachDiscarded(_ body: (_ block: Int, _ pages: Range<PageIndex>) -> Void) {
        for block in discarded.indices {
            var position = PageIndex(0)
            while let run = discarded[block].nextRun(from: position) {
                body(block, run)
                position = run.upperBound
            }
        }
    }

    /// Takes what is asked for, as far as nobody took it before. Pages that the destination has, or has on its way, are in no piece.
    /// - Parameter request: of a known block, inside it.
    func take(_ request: PageRequest) -> [Piece] {
        guard let block = indices[request.block] else { return [] }
        let start = RAMOffset(request.offset).page
        let end = start.advanced(by: Int(request.length) / Wire.pageSize)
        if hostPages[block] > 1 { return takeWhole(start..<end, of: block) }
        var pieces: [Piece] = []
        for page in start..<end {
            let isLeft = wanted[block].remove(page)
            let isFirst = asked?[block].insert(page) ?? false
            // What was never known has never been sent: zeroes.
            let isHole = !isLeft && known[block].insert(page)
            guard isLeft || isHole || isFirst else { continue }
            let isData = !isHole
            if isLeft { left.wrappingSubtract(1, ordering: .acquiringAndReleasing) }
            if isHole { discarded[block].insert(page) }
            if let last = pieces.last, last.pages.upperBound == page, last.isHole == !isData {
                pieces[pieces.count - 1] = Piece(
                    block: block, pages: last.pages.lowerBound..<page.advanced(by: 1), isHole: !isData)
            } else {
                pieces.append(Piece(block: block, pages: page..<page.advanced(by: 1), isHole: !isData))
            }
        }
        return pieces
    }

    /// How many of the pages that a request names, counted in pages of the destination's memory, are in none of its pieces: each was looked
    /// at for nothing.
    func countOfVain(_ request: PageRequest, _ pieces: [Piece]) -> UInt64 {
        guard let block = indices[request.block] else { return 1 }
        let size = hostPages[block]
        let start = RAMOffset(request.offset).page
        let all = Self.widened(start..<start.advanced(by: Int(request.length) / Wire.pageSize), to: size)
        let named = (all.upperBound.value - all.lowerBound.value) / size
        return named - min(named, pieces.reduce(0) { $0 + $1.pageCount } / size)
    }

    /// Pages of the destination's memory that there are.
    var hostPageCount: UInt64 { zip(wanted, hostPages).reduce(0) { $0 + $1.0.pageCount / $1.1 } }

    private func takeWhole(_ pages: Range<PageIndex>, of block: Int) -> [Piece] {
        let size = hostPages[block]
        let all = Self.widened(pages, to: size)
        return stride(from: all.lowerBound.value, to: all.upperBound.value, by: Int(size)).compactMap { first in
            let whole = PageIndex(first)..<PageIndex(first + size)
            if claim(whole, of: block) { return Piece(block: block, pages: whole) }
            guard known[block].insert(whole.lowerBound) else { return nil }
            known[block].insert(whole)
            discarded[block].insert(whole)
            return Piece(block: block, pages: whole, isHole: true)
        }
    }

    /// - Returns: whether the caller is to send them all.
    private func claim(_ whole: Range<PageIndex>, of block: Int) -> Bool {
        guard wanted[block].remove(whole.lowerBound) else { return false }
        let gone = 1 + wanted[block].remove(whole)
        left.wrappingSubtract(gone, ordering: .acquiringAndReleasing)
        return true
    }

    /// Takes the next pages from `place` on, round all blocks: of one block, at most `limit`, or one page of the
    /// destination's memory. - Returns: empty: there is nothing left.
    func take(from place: inout Place, limit: UInt64) -> [Piece] {
        for step in 0...wanted.count {
            let block = (place.block + step) % wanted.count
            let start = step == 0 ? place.page : PageIndex(0)
            let pieces =
                hostPages[block] > 1
                ? takeNextWhole(of: block, from: start) : take(of: block, from: start, limit: limit)
            guard let last = pieces.last else { continue }
            place = Place(block: block, page: last.pages.upperBound)
            return pieces
        }
        return []
    }

    /// Takes pages as ``take(from:limit:)`` does, in front of the end of the place's block, if there are any and they go one by one.
    func takeMore(from place: inout Place, limit: UInt64) -> [Piece] {
        guard hostPages[place.block] == 1 else { return [] }
        let pieces = take(of: place.block, from: place.page, limit: limit)
        if let last = pieces.last { place.page = last.pages.upperBound }
        return pieces
    }

    // MARK: Page by page

    /// - Returns: `nil`: there is no such block.
    func place(of request: PageRequest) -> Place? {
        indices[request.block].map { Place(block: $0, page: RAMOffset(request.offset).page) }
    }

    /// Pages that go together, or not at all.
    func pagesTogether(of block: Int) -> UInt64 { hostPages[block] }

    func pageCount(of block: Int) -> UInt64 { wanted[block].pageCount }

    /// Whether nobody has taken a page that is to be sent.
    func isLeft(_ page: PageIndex, of block: Int) -> Bool { wanted[block].contains(page) }

    /// Whether there is something to be sent from a place on, in its block before that page.
    func isAnyLeft(from place: Place, before end: PageIndex) -> Bool {
        wanted[place.block].nextRun(from: place.page, before: end, limit: 1) != nil
    }

    /// Takes a page that is to be sent, with those that go with it, of which it is the first; `nil`: it is gone, or not needed.
    func take(_ page: PageIndex, of block: Int) -> Piece? {
        let all = page..<page.advanced(by: Int(hostPages[block]))
        // A look costs less than a write, and many of those that are foreseen have gone.
        guard wanted[block].contains(page), claim(all, of: block) else { return nil }
        return Piece(block: block, pages: all)
    }

    private func takeNextWhole(of block: Int, from start: PageIndex) -> [Piece] {
        var position = start
        while position.value < wanted[block].pageCount, let run = wanted[block].nextRun(from: position, limit: 1) {
            let whole = Self.widened(run, to: hostPages[block])
            if claim(whole, of: block) { return [Piece(block: block, pages: whole)] }
            position = whole.upperBound
        }
        return []
    }

    private func take(of block: Int, from start: PageIndex, limit: UInt64) -> [Piece] {
        var pieces: [Piece] = []
        var room = limit
        var position = start
        while room > 0, position.value < wanted[block].pageCount,
            let run = wanted[block].nextRun(from: position, limit: room)
        {
            // Somebody may be taking the same pages one by one.
            var first = run.lowerBound
            for page in run {
                if wanted[block].remove(page) { continue }
                if first < page { pieces.append(Piece(block: block, pages: first..<page)) }
                first = page.advanced(by: 1)
            }
            if first < run.upperBound { pieces.append(Piece(block: block, pages: first..<run.upperBound)) }
            position = run.upperBound
            room = limit - pieces.reduce(0) { $0 + $1.pageCount }
        }
        left.wrappingSubtract(limit - room, ordering: .acquiringAndReleasing)
        return pieces
    }
}
