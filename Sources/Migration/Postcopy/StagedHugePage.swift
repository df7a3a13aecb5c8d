import GuestMemory
import Host
import Synchronization

/// A huge page of the guest that comes from its first page to its last: it is put together beside guest memory, and then moved there whole.
/// That costs nothing, and leaves nothing to be collapsed.
///
/// One thread fills it. Whoever touches a page of it that is here does not wait for the rest: the thread that serves faults takes the page
/// from here (``serve(_:of:)``). Then it becomes no huge page any more, and what came is placed page by page.
///
/// Source: the kernel's Documentation/admin-guide/mm/userfaultfd.rst (UFFDIO_MOVE).
final class StagedHugePage: Sendable {
    private struct Contents {
        let block: Int
        /// All that it will hold.
        let pages: Range<PageIndex>
        /// The first page that is not here.
        var end: PageIndex
    }

    let room: Mapping
    private let placement: PagePlacement
    /// In `room`, where a huge page can lie.
    private let start: Int
    private let contents = Mutex<Contents?>(nil)

    /// So many pages are placed by one call, of those that do not move: it holds up who changes the address space.
    private static let copiedPages: UInt64 = 16

    /// - Returns: `nil` where pages cannot be moved (before Linux 6.8), or where no block has transparent huge pages.
    init?(_ placement: PagePlacement) throws(SystemError) {
        guard placement.watched.faults.features.contains(.move), HostMemory.hasTransparentHugePages,
            placement.memory.blocks.contains(where: \.wantsHugePages)
        else { return nil }
        self.placement = placement
        let byteCount = Int(RAMBlock.transparentHugePages * GuestPage.byteCount)
        room = try Mapping(anonymousByteCount: 2 * byteCount)
        start = (byteCount - Int(room.hostAddress(at: 0) % UInt(byteCount))) % byteCount
        try? room.advise(.hugePages, at: start, count: byteCount)
        try? room.advise(.dontDump)
    }

    // MARK: The thread that fills it

    /// The pages of the huge one that begins with that page, if all of them are still to come, and nobody waits for any.
    func begins(at page: PageIndex, of block: Int) -> Range<PageIndex>? {
        guard let pages = placement.memory.blocks[block].hugePlace(at: page) else { return nil }
        let record = placement.pending.blocks[block]
        guard record.expected.count(in: pages) == UInt64(pages.count), record.claimed.count(in: pages) == 0,
            record.asked.count(in: pages) == 0
        else { return nil }
        return pages
    }

    /// Those are filled in now. Nothing is open.
    func open(_ pages: Range<PageIndex>, of block: Int) {
        contents.withLock { $0 = Contents(block: block, pages: pages, end: pages.lowerBound) }
    }

    /// Where in `room` a page of those goes.
    func offset(of page: PageIndex, in pages: Range<PageIndex>) -> Int {
        start + Int((page.value - pages.lowerBound.value) * GuestPage.byteCount)
    }

    /// Pages up to that one are here. - Returns: whether somebody waits for one of all: then it is to be closed.
    func filled(to end: PageIndex) -> Bool {
        let (block, pages) = contents.withLock { contents in
            contents?.end = end
            return (contents?.block ?? 0, contents?.pages ?? end..<end)
        }
        // Who asks is known as asking before it looks here.
        return placement.pending.blocks[block].asked.nextRun(from: pages.lowerBound, before: pages.upperBound) != nil
    }

    /// Places what is here: whole, if it is whole, else page by page, those first that somebody waits for.
    func close() throws(SystemError) {
        let last = contents.withLock { contents in
            defer { contents = nil }
            return contents
        }
        guard let last else { return }
        let here = last.pages.lowerBound..<last.end
        let record = placement.pending.blocks[last.block]
        var position = here.lowerBound
        while let run = record.asked.nextRun(from: position, before: here.upperBound) {
            try copy(claimed(run, of: last.block), of: last)
            position = run.upperBound
        }
        let runs = claimed(here, of: last.block)
        guard here == last.pages, runs == [here] else { return try copy(runs, of: last) }
        try placement.move(room, at: start, to: PagePlacement.Run(block: last.block, pages: here))
    }

    /// Of those pages, the ones that fell to the caller.
    private func claimed(_ pages: Range<PageIndex>, of block: Int) -> [Range<PageIndex>] {
        var runs: [Range<PageIndex>] = []
        for page in pages where placement.pending.claim(page, of: block) {
            if let last = runs.last, last.upperBound == page {
                runs[runs.count - 1] = last.lowerBound..<page.advanced(by: 1)
            } else {
                runs.append(page..<page.advanced(by: 1))
            }
        }
        return runs
    }

    private func copy(_ runs: [Range<PageIndex>], of contents: Contents) throws(SystemError) {
        for run in runs {
            var first = run.lowerBound
            while first < run.upperBound {
                let end = min(first.advanced(by: Int(Self.copiedPages)), run.upperBound)
                try placement.copy(
                    room, at: offset(of: first, in: contents.pages),
                    to: PagePlacement.Run(block: contents.block, pages: first..<end))
                first = end
            }
        }
    }

    // MARK: The thread that serves faults

    /// Somebody waits for a page, and is known to. - Returns: whether it was here: then it is placed.
    func serve(_ page: PageIndex, of block: Int) throws(SystemError) -> Bool {
        try contents.withLock { (contents) throws(SystemError) in
            guard let contents, contents.block == block, contents.pages.contains(page), page < contents.end else {
                return false
            }
            // Else somebody else has it, and ends the fault.
            if placement.pending.claim(page, of: block) {
                try placement.copy(
                    room, at: offset(of: page, in: contents.pages),
                    to: PagePlacement.Run(block: block, pages: page..<page.advanced(by: 1)))
            }
            return true
        }
    }
}
