import Glibc
import GuestMemory
import Host

/// Puts pages where they are missing, for one thread that reads a connection.
///
/// Contents are read into a *staging* area, since nobody may see a page half: the kernel copies whole pages from there, neighbours
/// together. Whoever reads tells when it is about to wait (`flush`), so that no page that is here waits for one that is not.
final class PagePlacer {
    /// Neighbours that are placed by one call: it holds up who changes the address space.
    static let runPages: UInt64 = 16
    private static let zeroRunPages: UInt64 = 512

    private struct Run {
        var block = -1
        var pages = PageIndex(0)..<PageIndex(0)
        var isZero = false

        func continues(at page: PageIndex, of block: Int, zero: Bool) -> Bool {
            self.block == block && pages.upperBound == page && isZero == zero
        }
    }

    private let watched: WatchedMemory
    private let memory: GuestMemory
    private let pending: PendingPages
    /// What the caller fills: at most ``runPages``.
    let staging: Mapping
    private var run = Run()

    init(_ watched: WatchedMemory, _ memory: GuestMemory, _ pending: PendingPages) throws(SystemError) {
        self.watched = watched
        self.memory = memory
        self.pending = pending
        staging = try Mapping(anonymousByteCount: Int(Self.runPages * GuestPage.byteCount))
    }

    /// Where in the staging area the contents of a page go; ``came(_:of:)`` follows.
    func room(for page: PageIndex, of block: Int) throws(SystemError) -> Int {
        if !run.continues(at: page, of: block, zero: false) || count(run) == Self.runPages {
            try flush()
            run = Run(block: block, pages: page..<page, isZero: false)
        }
        return Int(count(run) * GuestPage.byteCount)
    }

    /// The page's contents are where `room` said. One that is not missing is dropped.
    func came(_ page: PageIndex, of block: Int) {
        guard pending.claim(page, of: block) else { return }
        run.pages = run.pages.lowerBound..<page.advanced(by: 1)
    }

    /// Pages of zeroes.
    func cameAsZeroes(_ pages: Range<PageIndex>, of block: Int) throws(SystemError) {
        for page in pages {
            guard pending.claim(page, of: block) else { continue }
            if !run.continues(at: page, of: block, zero: true) || count(run) == Self.zeroRunPages {
                // This one is claimed, and placed in any case.
                let last = run
                run = Run(block: block, pages: page..<page, isZero: true)
                try place(last)
            }
            run.pages = run.pages.lowerBound..<page.advanced(by: 1)
        }
    }

    /// The staging area was filled from its start with that run of pages: they are placed, but for those that are not missing.
    func place(staged pages: Range<PageIndex>, of block: Int) throws(SystemError) {
        precondition(
            run.pages.isEmpty && pages.upperBound.value - pages.lowerBound.value <= Self.runPages, "a staged run")
        var start: PageIndex?
        for page in pages {
            if pending.claim(page, of: block) {
                if start == nil { start = page }
            } else if let first = start {
                try place(Run(block: block, pages: first..<page), from: pages.lowerBound)
                start = nil
            }
        }
        if let start { try place(Run(block: block, pages: start..<pages.upperBound), from: pages.lowerBound) }
    }

    /// Places what came so far.
    func flush() throws(SystemError) {
        let last = run
        run = Run()
        try place(last)
    }

    private func count(_ run: Run) -> UInt64 { run.pages.upperBound.value - run.pages.lowerBound.value }

    private func place(_ run: Run, from first: PageIndex? = nil) throws(SystemError) {
        guard !run.pages.isEmpty else { return }
        let mapping = memory.blocks[run.block].mapping
        let range = Int(run.pages.lowerBound.offset.value)..<Int(run.pages.upperBound.offset.value)
        let placed: Int
        do throws(SystemError) {
            if run.isZero {
                placed = try watched.faults.zero(mapping, range)
            } else {
                let skipped = run.pages.lowerBound.value - (first ?? run.pages.lowerBound).value
                placed = try watched.faults.copy(
                    staging, at: Int(skipped * GuestPage.byteCount), into: mapping, range)
            }
        } catch {
            pending.unclaim(run.pages, of: run.block)
            // Memory was given up to the source again: nobody waits for these pages, and they come again.
            if pending.isAbandoned { return }
            throw error
        }
        guard placed == range.count || pending.isAbandoned else {
            // It was forgotten at its DISCARD and could only be waited for since: what is there is not the guest's.
            throw SystemError(
                "place",
                "\(range.count) bytes at offset \(range.lowerBound) of RAM block '\(memory.blocks[run.block].name)'",
                code: EEXIST, remedy: "something else put pages there")
        }
        pending.placed(run.pages, of: run.block)
        // Behind that: a fault in a window that is read in between finds nobody else to end it.
        try watched.wakeWindows(run.pages, of: run.block)
    }
}
