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
    private static let zeroRunPages: UInt64 = 512

    /// Where contents go.
    struct Room {
        let mapping: Mapping
        let offset: Int
        /// The pages for which there is room.
        let pages: Range<PageIndex>
    }

    private typealias Run = PagePlacement.Run

    private let placement: PagePlacement
    private var pending: PendingPages { placement.pending }
    /// What the caller fills: at most ``runPages``.
    private let staging: Mapping
    /// Pages that came one by one, placed by the next call.
    private var run = Run()
    private var isZero = false
    private let staged: StagedHugePage?
    private let awake: AwakeProcessors?

    /// - Parameters:
    ///   - staged: for a connection that brings memory in order.
    ///   - awake: lives as long.
    init(
        _ placement: PagePlacement, staged: StagedHugePage? = nil, awake: AwakeProcessors? = nil
    ) throws(SystemError) {
        self.placement = placement
        self.staged = staged
        self.awake = awake
        staging = try Mapping(anonymousByteCount: Int(Self.runPages * GuestPage.byteCount))
    }

    // MARK: Page by page

    /// Where the contents of a page go; ``came(_:of:)`` follows.
    func room(for page: PageIndex, of block: Int) throws(SystemError) -> Room {
        let single = page..<page.advanced(by: 1)
        if let room = try staged?.room(for: single, of: block) { return room }
        if !continues(at: page, of: block, zero: false) || count == Self.runPages {
            try placeRun()
            begin(at: page, of: block, zero: false)
        }
        return Room(mapping: staging, offset: Int(count * GuestPage.byteCount), pages: single)
    }

    /// The page's contents are where `room` said. One that is not missing is dropped.
    func came(_ page: PageIndex, of block: Int) throws(SystemError) {
        let single = page..<page.advanced(by: 1)
        if try staged?.came(single, of: block) == true { return }
        guard pending.claim(page, of: block) else { return }
        run.pages = run.pages.lowerBound..<single.upperBound
    }

    /// Pages of zeroes.
    func cameAsZeroes(_ pages: Range<PageIndex>, of block: Int) throws(SystemError) {
        if try staged?.cameAsZeroes(pages, of: block) == true { return }
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
        if let room = try staged?.room(for: pages, of: block) { return room }
        let end = min(pages.lowerBound.advanced(by: Int(Self.runPages)), pages.upperBound)
        return Room(mapping: staging, offset: 0, pages: pages.lowerBound..<end)
    }

    /// The pages for which there was room are there: they are placed, but for those that are not missing.
    func came(_ pages: Range<PageIndex>, of block: Int) throws(SystemError) {
        if try staged?.came(pages, of: block) == true { return }
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
