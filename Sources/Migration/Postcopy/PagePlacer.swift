import GuestMemory
import Host

/// Puts pages where they are missing, for one thread that reads a connection.
///
/// Contents are read into a *staging* area, since nobody may see a page half: the kernel copies whole pages from there, neighbours
/// together. Whoever reads tells when it is about to wait (`flush`), so that no page that is here waits for one that is not. Only the pages
/// of a huge one wait for each other (`StagedHugePage`): who wants one of them takes it from there.
final class PagePlacer {
    /// Neighbours that are placed by one call: it holds up who changes the address space.
    static let runPages: UInt64 = 16
    /// Of a huge page, so many are read at once.
    private static let hugeRunPages: UInt64 = 64
    private static let zeroRunPages: UInt64 = 512
    /// Zeroes of a huge page for which its memory is taken all the same: so many in a row, and in all.
    private static let stagedZeroes = (run: 32, all: 256)

    /// Where contents go.
    struct Room {
        let mapping: Mapping
        let offset: Int
        /// The pages for which there is room.
        let pages: Range<PageIndex>
    }

    private typealias Run = PagePlacement.Run

    private struct Huge {
        let block: Int
        let pages: Range<PageIndex>
        var next: PageIndex
        var zeroes = 0
    }

    private let placement: PagePlacement
    private var pending: PendingPages { placement.pending }
    /// What the caller fills: at most ``runPages``.
    private let staging: Mapping
    /// Pages that came one by one, placed by the next call.
    private var run = Run()
    private var isZero = false
    private let staged: StagedHugePage?
    /// What `staged` is filled with.
    private var huge: Huge?

    /// - Parameter staged: for a connection that brings memory in order.
    init(_ placement: PagePlacement, staged: StagedHugePage? = nil) throws(SystemError) {
        self.placement = placement
        self.staged = staged
        staging = try Mapping(anonymousByteCount: Int(Self.runPages * GuestPage.byteCount))
    }

    // MARK: Page by page

    /// Where the contents of a page go; ``came(_:of:)`` follows.
    func room(for page: PageIndex, of block: Int) throws(SystemError) -> Room {
        let single = page..<page.advanced(by: 1)
        if let room = try hugeRoom(for: single, of: block) { return room }
        if !continues(at: page, of: block, zero: false) || count == Self.runPages {
            try placeRun()
            begin(at: page, of: block, zero: false)
        }
        return Room(mapping: staging, offset: Int(count * GuestPage.byteCount), pages: single)
    }

    /// The page's contents are where `room` said. One that is not missing is dropped.
    func came(_ page: PageIndex, of block: Int) throws(SystemError) {
        let single = page..<page.advanced(by: 1)
        if try cameOfHuge(single, of: block) { return }
        guard pending.claim(page, of: block) else { return }
        run.pages = run.pages.lowerBound..<single.upperBound
    }

    /// Pages of zeroes.
    func cameAsZeroes(_ pages: Range<PageIndex>, of block: Int) throws(SystemError) {
        if try cameOfHugeAsZeroes(pages, of: block) { return }
        for page in pages {
            guard pending.claim(page, of: block) else { continue }
            if !continues(at: page, of: block, zero: true) || count == Self.zeroRunPages {
                // This one is claimed, and placed in any case.
                let last = (run, isZero)
                begin(at: page, of: block, zero: true)
                try place(last.0, zero: last.1)
            }
            run.pages = run.pages.lowerBound..<page.advanced(by: 1)
        }
    }

    // MARK: Runs

    /// Where the contents of the first pages of a run go; ``came(_:of:)-(Range<PageIndex>,_)`` follows. Nothing that came page by page waits.
    func room(for pages: Range<PageIndex>, of block: Int) throws(SystemError) -> Room {
        if let room = try hugeRoom(for: pages, of: block) { return room }
        let end = min(pages.lowerBound.advanced(by: Int(Self.runPages)), pages.upperBound)
        return Room(mapping: staging, offset: 0, pages: pages.lowerBound..<end)
    }

    /// The pages for which there was room are there: they are placed, but for those that are not missing.
    func came(_ pages: Range<PageIndex>, of block: Int) throws(SystemError) {
        if try cameOfHuge(pages, of: block) { return }
        precondition(run.pages.isEmpty, "a run behind single pages")
        var start: PageIndex?
        for page in pages {
            if pending.claim(page, of: block) {
                if start == nil { start = page }
            } else if let first = start {
                try copy(first..<page, of: block, from: pages.lowerBound)
                start = nil
            }
        }
        if let start { try copy(start..<pages.upperBound, of: block, from: pages.lowerBound) }
    }

    /// Places what came page by page.
    func flush() throws(SystemError) { try placeRun() }

    /// Places all that came: nothing comes behind it for now.
    func close() throws(SystemError) {
        try placeRun()
        huge = nil
        try staged?.close()
    }

    // MARK: Huge pages

    /// - Returns: `nil`: those pages are no part of a huge one that comes in order.
    private func hugeRoom(for pages: Range<PageIndex>, of block: Int) throws(SystemError) -> Room? {
        guard let staged else { return nil }
        let first = pages.lowerBound
        if !continuesHuge(at: first, of: block) {
            // One with a gap will not become one.
            if let huge, huge.block == block, huge.pages.contains(first) { try closeHuge() }
            guard let all = staged.begins(at: first, of: block) else { return nil }
            try closeHuge()
            staged.open(all, of: block)
            huge = Huge(block: block, pages: all, next: first)
        }
        guard let huge else { return nil }
        let end = min(first.advanced(by: Int(Self.hugeRunPages)), pages.upperBound, huge.pages.upperBound)
        return Room(mapping: staged.room, offset: staged.offset(of: first, in: huge.pages), pages: first..<end)
    }

    private func continuesHuge(at page: PageIndex, of block: Int) -> Bool {
        huge?.block == block && huge?.next == page
    }

    /// - Returns: false: they are no part of it.
    private func cameOfHuge(_ pages: Range<PageIndex>, of block: Int) throws(SystemError) -> Bool {
        guard let staged, let huge, continuesHuge(at: pages.lowerBound, of: block) else { return false }
        self.huge?.next = pages.upperBound
        let isWanted = staged.filled(to: pages.upperBound)
        if isWanted || pages.upperBound == huge.pages.upperBound { try closeHuge() }
        return true
    }

    private func cameOfHugeAsZeroes(_ pages: Range<PageIndex>, of block: Int) throws(SystemError) -> Bool {
        guard let staged, let huge, huge.block == block else { return false }
        guard continuesHuge(at: pages.lowerBound, of: block), pages.upperBound <= huge.pages.upperBound,
            pages.count <= Self.stagedZeroes.run, huge.zeroes + pages.count <= Self.stagedZeroes.all
        else {
            if huge.pages.overlaps(pages) { try closeHuge() }
            return false
        }
        staged.room.zero(
            at: staged.offset(of: pages.lowerBound, in: huge.pages), count: pages.count * Int(GuestPage.byteCount))
        self.huge?.zeroes += pages.count
        return try cameOfHuge(pages, of: block)
    }

    private func closeHuge() throws(SystemError) {
        huge = nil
        try staged?.close()
    }

    // MARK: Placing

    private var count: UInt64 { run.pages.upperBound.value - run.pages.lowerBound.value }

    private func continues(at page: PageIndex, of block: Int, zero: Bool) -> Bool {
        run.block == block && run.pages.upperBound == page && isZero == zero
    }

    private func begin(at page: PageIndex, of block: Int, zero: Bool) {
        run = Run(block: block, pages: page..<page)
        isZero = zero
    }

    private func placeRun() throws(SystemError) {
        let last = run
        run = Run()
        try place(last, zero: isZero)
    }

    private func place(_ run: Run, zero: Bool) throws(SystemError) {
        if zero { try placement.zero(run) } else { try placement.copy(staging, at: 0, to: run) }
    }

    private func copy(_ pages: Range<PageIndex>, of block: Int, from first: PageIndex) throws(SystemError) {
        let skipped = pages.lowerBound.value - first.value
        try placement.copy(
            staging, at: Int(skipped * GuestPage.byteCount), to: Run(block: block, pages: pages))
    }
}
