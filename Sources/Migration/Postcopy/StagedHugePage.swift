import GuestMemory
import Host
import Synchronization

/// A transparent huge page of the guest that is put together beside guest memory, and then moved there whole: that costs nothing, and leaves
/// nothing to be collapsed.
///
/// One thread fills it. Whoever touches a page of it that is here does not wait for the rest: the thread that serves faults places it from
/// here (``serve(_:of:)``). Pages that are in guest memory when the others are here, those that were asked for, are moved out, copied, and
/// come back with them: who touches one in these microseconds waits. Of what does not become whole, pages are placed by themselves.
///
/// Source: the kernel's Documentation/admin-guide/mm/userfaultfd.rst (UFFDIO_MOVE).
final class StagedHugePage: Sendable {
    private struct Contents {
        let block: Int
        /// All that it will hold.
        let pages: Range<PageIndex>
        var here = HugePageSet()
        var zeroes = 0
        /// Nothing of it is placed or taken by others.
        var isMoving = false

        func isHere(_ page: PageIndex) -> Bool { here.contains(index(of: page)) }
        func index(of page: PageIndex) -> Int { Int(page.value - pages.lowerBound.value) }
    }

    private let placement: PagePlacement
    private let room: Mapping
    /// In `room`, where a huge page can lie.
    private let start: Int
    /// Where pages go that are moved out, each to its place, until the huge page is there: to move them back takes no memory.
    private let aside: Mapping
    private let pageMap: PageMap
    private let contents = Mutex<Contents?>(nil)

    /// A run that long begins one, wherever; a shorter one only with the first page that is missing, if nobody asked for it: pages here and
    /// there are no walk.
    private static let runPages = 32
    /// So many pages are read at once.
    private static let roomPages = 64
    /// So many pages are placed by one call, of those that do not move: it holds up who changes the address space.
    private static let copiedPages = 16
    /// With more pages of it in guest memory it is left to `Collapser`: to move one out takes microseconds, in which the guest misses it.
    private static let mostPresent: UInt64 = 64
    /// Zeroes for which memory is taken all the same: so many in a row, and in all.
    private static let zeroes = (run: 32, all: 256)

    private var faults: UserFault { placement.watched.faults }
    private var pending: PendingPages { placement.pending }

    /// - Returns: `nil` where pages cannot be moved (before Linux 6.8), or where no block has transparent huge pages.
    init?(_ placement: PagePlacement) throws(SystemError) {
        guard placement.watched.faults.features.contains(.move), HostMemory.hasTransparentHugePages,
            placement.memory.blocks.contains(where: \.wantsHugePages)
        else { return nil }
        self.placement = placement
        pageMap = try PageMap()
        let byteCount = Int(RAMBlock.transparentHugePages * GuestPage.byteCount)
        room = try Mapping(anonymousByteCount: 2 * byteCount)
        start = (byteCount - Int(room.hostAddress(at: 0) % UInt(byteCount))) % byteCount
        try? room.advise(.hugePages, at: start, count: byteCount)
        try? room.advise(.dontDump)
        aside = try Mapping(anonymousByteCount: byteCount)
        try? aside.advise(.noHugePages)
        try? aside.advise(.dontDump)
        // Pages only move to where the kernel tells of missing ones.
        try placement.watched.faults.register(aside, 0..<byteCount, .missing)
    }

    // MARK: The thread that fills it

    /// Where the contents of the first pages of a run go. - Returns: `nil`: they are no part of a page that can be put together.
    func room(for run: Range<PageIndex>, of block: Int) throws(SystemError) -> PagePlacer.Room? {
        let first = run.lowerBound
        guard let pages = try opened(for: run, of: block) else { return nil }
        let end = min(first.advanced(by: Self.roomPages), run.upperBound, pages.upperBound)
        return PagePlacer.Room(mapping: room, offset: offset(of: first, in: pages), pages: first..<end)
    }

    /// The pages that there was room for are there. - Returns: false: there was none here.
    func came(_ run: Range<PageIndex>, of block: Int) throws(SystemError) -> Bool {
        let last = contents.withLock { contents -> Contents? in
            guard let now = contents, now.block == block, now.pages.contains(run.lowerBound) else { return nil }
            contents?.here.insert(now.index(of: run.lowerBound)..<now.index(of: run.upperBound))
            return contents
        }
        guard let last else { return false }
        pending.cameAgain(pending.blocks[block].claimed.count(in: run))
        // Who asks is known as asking before it looks here.
        let record = pending.blocks[block]
        var position = run.lowerBound
        while let asked = record.asked.nextRun(from: position, before: run.upperBound) {
            try copy(claimed(asked, of: block), of: last)
            position = asked.upperBound
        }
        if isWhole(last) { try close() }
        return true
    }

    /// Pages of zeroes. - Returns: false: they are not worth the memory, or of another page.
    func cameAsZeroes(_ run: Range<PageIndex>, of block: Int) throws(SystemError) -> Bool {
        let pages = contents.withLock { contents -> Range<PageIndex>? in
            guard let now = contents, now.block == block, now.pages.contains(run.lowerBound),
                run.upperBound <= now.pages.upperBound, run.count <= Self.zeroes.run,
                now.zeroes + run.count <= Self.zeroes.all
            else { return nil }
            contents?.zeroes += run.count
            return now.pages
        }
        guard let pages else { return false }
        room.zero(at: offset(of: run.lowerBound, in: pages), count: run.count * Int(GuestPage.byteCount))
        return try came(run, of: block)
    }

    /// Places what is here: whole, if it is whole, else page by page.
    func close() throws(SystemError) {
        let last = contents.withLock { contents in
            contents?.isMoving = true
            return contents
        }
        guard let last else { return }
        defer {
            contents.withLock { $0 = nil }
            // Whoever touched a page meanwhile was not answered. It is registered as long as faults are served at all.
            try? faults.wake(placement.memory.blocks[last.block].mapping, PagePlacement.bytes(last.pages))
        }
        let mine = claimed(last.pages, of: last.block) { last.isHere($0) }
        guard isWhole(last), !pending.isAbandoned else { return try copy(mine, of: last) }
        let left: [Range<PageIndex>]
        do throws(SystemError) { left = try moveWhole(last, claimed: mine) } catch {
            let placed = pending.blocks[last.block].placed
            for page in mine.joined() where !placed.contains(page) {
                pending.unclaim(page..<page.advanced(by: 1), of: last.block)
            }
            throw error
        }
        try copy(left, of: last)
        guard !pending.blocks[last.block].cameHuge.contains(last.pages.lowerBound) else { return }
        // It was, or has become, single pages: the next one is to be huge again.
        try? room.advise(.forget, at: start, count: PagePlacement.bytes(last.pages).count)
    }

    /// - Returns: the pages of the one that is filled from now on; `nil`: that is none.
    private func opened(for run: Range<PageIndex>, of block: Int) throws(SystemError) -> Range<PageIndex>? {
        let first = run.lowerBound
        let now = contents.withLock { $0 }
        if let now, now.block == block, now.pages.contains(first) { return now.pages }
        guard let pages = placement.memory.blocks[block].hugePlace(holding: first) else { return nil }
        let record = pending.blocks[block]
        let before = pages.lowerBound..<first
        let isNext = record.claimed.count(in: before) == UInt64(before.count) && !record.asked.contains(first)
        guard run.count >= Self.runPages || isNext,
            record.expected.count(in: pages) == UInt64(pages.count),
            record.claimed.count(in: pages) <= Self.mostPresent
        else { return nil }
        try close()
        contents.withLock { $0 = Contents(block: block, pages: pages) }
        return pages
    }

    private func offset(of page: PageIndex, in pages: Range<PageIndex>) -> Int {
        start + Int((page.value - pages.lowerBound.value) * GuestPage.byteCount)
    }

    /// Each page is here, or in guest memory; of those not too many.
    private func isWhole(_ contents: Contents) -> Bool {
        let placed = pending.blocks[contents.block].placed
        let present = placed.count(in: contents.pages)
        guard present <= Self.mostPresent, contents.here.count + Int(present) >= contents.pages.count else {
            return false
        }
        return contents.pages.allSatisfy { contents.isHere($0) || placed.contains($0) }
    }

    /// Of those pages, the ones that fell to the caller.
    private func claimed(
        _ pages: Range<PageIndex>, of block: Int, where isHere: (PageIndex) -> Bool = { _ in true }
    ) -> [Range<PageIndex>] {
        let before = pending.blocks[block].claimed
        var runs: [Range<PageIndex>] = []
        for page in pages where isHere(page) && !before.contains(page) && pending.claim(page, of: block) {
            if let last = runs.last, last.upperBound == page {
                runs[runs.count - 1] = last.lowerBound..<page.advanced(by: 1)
            } else {
                runs.append(page..<page.advanced(by: 1))
            }
        }
        return runs
    }

    /// What the caller claimed is placed, or given back.
    private func copy(_ runs: [Range<PageIndex>], of contents: Contents) throws(SystemError) {
        for (index, run) in runs.enumerated() {
            var first = run.lowerBound
            while first < run.upperBound {
                let end = min(first.advanced(by: Self.copiedPages), run.upperBound)
                do throws(SystemError) {
                    try placement.copy(
                        room, at: offset(of: first, in: contents.pages),
                        to: PagePlacement.Run(block: contents.block, pages: first..<end))
                } catch {
                    for rest in [end..<run.upperBound] + runs[(index + 1)...] {
                        pending.unclaim(rest, of: contents.block)
                    }
                    throw error
                }
                first = end
            }
        }
    }

    // MARK: Moving

    /// - Parameter mine: the pages that are placed by this.
    /// - Returns: those of them that could not be moved. What was in guest memory is there.
    private func moveWhole(
        _ contents: Contents, claimed mine: [Range<PageIndex>]
    ) throws(SystemError) -> [Range<PageIndex>] {
        let others = Self.gaps(in: contents.pages, between: mine)
        // Somebody may have claimed one and not placed it yet.
        let record = pending.blocks[contents.block]
        guard others.allSatisfy({ $0.allSatisfy(record.placed.contains) }) else { return mine }
        var out: [Range<PageIndex>] = []
        // Only memory that is not needed stays if that fails, and then nothing moves there any more.
        defer { if !out.isEmpty { try? aside.advise(.forget) } }
        for run in others {
            record.wasMoved.insert(run)
            let moved = moveOut(run, of: contents)
            out.append(run.lowerBound..<run.lowerBound.advanced(by: moved))
            guard moved == run.count else {
                try putBack(out, of: contents)
                return mine
            }
        }
        let (guest, bytes) = (placement.memory.blocks[contents.block].mapping, PagePlacement.bytes(contents.pages))
        // Nothing is there any more, and all of it is the caller's. A table of single pages may be left, in the way of a huge one: newer
        // kernels (Linux 6.14) give it back with what it shows.
        if !out.isEmpty { try? guest.advise(.forget, at: bytes.lowerBound, count: bytes.count) }
        let moved = faults.move(room, at: start, into: guest, bytes)
        let left = contents.pages.lowerBound.advanced(by: moved / Int(GuestPage.byteCount))..<contents.pages.upperBound
        try putBack(out.map { $0.clamped(to: left) }, of: contents)
        for run in mine {
            let there = run.clamped(to: contents.pages.lowerBound..<left.lowerBound)
            try placement.arePlaced(PagePlacement.Run(block: contents.block, pages: there))
        }
        if left.isEmpty, ((try? pageMap.hugeBytes(in: guest, bytes)) ?? nil) ?? 0 == bytes.count {
            record.cameHuge.insert(contents.pages.lowerBound)
        }
        return mine.map { $0.clamped(to: left) }
    }

    /// From guest memory to where the rest is. - Returns: how many pages.
    private func moveOut(_ run: Range<PageIndex>, of contents: Contents) -> Int {
        let guest = placement.memory.blocks[contents.block].mapping
        let (from, bytes) = (offset(of: run.lowerBound, in: contents.pages), PagePlacement.bytes(run))
        let place = from - start
        let moved = faults.move(guest, at: bytes.lowerBound, into: aside, place..<place + bytes.count)
        guard moved > 0 else { return 0 }
        room.copy(from: aside, at: place, count: moved, to: from)
        return moved / Int(GuestPage.byteCount)
    }

    private func putBack(_ runs: [Range<PageIndex>], of contents: Contents) throws(SystemError) {
        let guest = placement.memory.blocks[contents.block].mapping
        for run in runs where !run.isEmpty {
            let (from, bytes) = (offset(of: run.lowerBound, in: contents.pages), PagePlacement.bytes(run))
            let moved = faults.move(aside, at: from - start, into: guest, bytes)
            let left = bytes.lowerBound + moved..<bytes.upperBound
            guard !left.isEmpty else { continue }
            // Where the kernel will not move it, a copy may do.
            do throws(SystemError) { try faults.copy(room, at: from + moved, into: guest, left) } catch {
                // Given up to the source again, and not watched any more: they come again, and may have come already.
                guard pending.isAbandoned else { throw error }
            }
        }
    }

    private static func gaps(
        in pages: Range<PageIndex>, between runs: [Range<PageIndex>]
    ) -> [Range<PageIndex>] {
        var gaps: [Range<PageIndex>] = []
        var position = pages.lowerBound
        for run in runs {
            if position < run.lowerBound { gaps.append(position..<run.lowerBound) }
            position = run.upperBound
        }
        if position < pages.upperBound { gaps.append(position..<pages.upperBound) }
        return gaps
    }

    // MARK: The thread that serves faults

    /// Somebody waits for a page, and is known to. - Returns: whether it was here: then it is placed, or about to be.
    func serve(_ page: PageIndex, of block: Int) throws(SystemError) -> Bool {
        try contents.withLock { (contents) throws(SystemError) in
            guard let contents, contents.block == block, contents.pages.contains(page) else { return false }
            let isHere = contents.isHere(page)
            // Whoever moves it wakes all who sleep there.
            guard !contents.isMoving else {
                if isHere { pending.latency.withdraw(PageLatency.Place(block: block, page: page)) }
                return isHere || pending.blocks[block].placed.contains(page)
            }
            guard isHere else { return false }
            // Else somebody else has it, and ends the fault.
            if pending.claim(page, of: block) {
                pending.latency.withdraw(PageLatency.Place(block: block, page: page))
                try placement.copy(
                    room, at: offset(of: page, in: contents.pages),
                    to: PagePlacement.Run(block: block, pages: page..<page.advanced(by: 1)))
            }
            return true
        }
    }
}

/// Which of the 512 pages of a huge page.
struct HugePageSet: Sendable, Equatable {
    private var words = SIMD8<UInt64>()

    func contains(_ index: Int) -> Bool { words[index / 64] & 1 << UInt64(index % 64) != 0 }

    mutating func insert(_ range: Range<Int>) {
        for index in range { words[index / 64] |= 1 << UInt64(index % 64) }
    }

    var count: Int {
        var count = 0
        for index in 0..<8 { count += words[index].nonzeroBitCount }
        return count
    }
}
