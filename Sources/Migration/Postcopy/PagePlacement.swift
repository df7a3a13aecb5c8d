import Glibc
import GuestMemory
import Host

/// How contents that are here get to where they are missing. The caller has claimed the pages; from any thread.
struct PagePlacement: Sendable {
    let watched: WatchedMemory
    let memory: GuestMemory
    let pending: PendingPages

    /// Pages side by side.
    struct Run {
        var block = -1
        var pages = PageIndex(0)..<PageIndex(0)

        var bytes: Range<Int> { PagePlacement.bytes(pages) }
    }

    /// Where pages lie in their block.
    static func bytes(_ pages: Range<PageIndex>) -> Range<Int> {
        Int(pages.lowerBound.offset.value)..<Int(pages.upperBound.offset.value)
    }

    /// Puts zeroes there.
    func zero(_ run: Run) throws(SystemError) {
        try place(run) { (target) throws(SystemError) in try watched.faults.zero(target, run.bytes) }
    }

    /// Copies them from another mapping.
    func copy(_ source: Mapping, at offset: Int, to run: Run) throws(SystemError) {
        try place(run) { (target) throws(SystemError) in
            try watched.faults.copy(source, at: offset, into: target, run.bytes)
        }
    }

    /// - Parameter put: returns the bytes that were missing, and are there now.
    private func place(_ run: Run, _ put: (Mapping) throws(SystemError) -> Int) throws(SystemError) {
        guard !run.pages.isEmpty else { return }
        let placed: Int
        do throws(SystemError) { placed = try put(memory.blocks[run.block].mapping) } catch {
            pending.unclaim(run.pages, of: run.block)
            // Memory was given up to the source again: nobody waits for these pages, and they come again.
            if pending.isAbandoned { return }
            throw error
        }
        let bytes = run.bytes
        guard placed == bytes.count || pending.isAbandoned else {
            // It was forgotten at its DISCARD and could only be waited for since: what is there is not the guest's.
            throw SystemError(
                "place",
                "\(bytes.count) bytes at offset \(bytes.lowerBound) of RAM block '\(memory.blocks[run.block].name)'",
                code: EEXIST, remedy: "something else put pages there")
        }
        try arePlaced(run)
    }

    /// The caller has put them there.
    func arePlaced(_ run: Run) throws(SystemError) {
        pending.placed(run.pages, of: run.block)
        // Behind that: a fault in a window that is read in between finds nobody else to end it.
        try watched.wakeWindows(run.pages, of: run.block)
    }
}
