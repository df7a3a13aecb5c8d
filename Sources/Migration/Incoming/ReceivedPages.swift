import GuestMemory
import Host
import Synchronization

/// Which pages of guest memory hold data already: a page of zeros must clear those, and must not touch others.
///
/// One for all channels of a migration. Two channels never bring the same page at once: between them stands a SYNC. But their pages may
/// share a word of the record, so changes are made under a lock, once per packet.
final class ReceivedPages: Sendable {
    private let memory: GuestMemory
    private let records: Mutex<[DirtyBitmap]>
    /// Pages that came as zeros: a difference may refer to those, too, but to no page that never came.
    private let zeroed: Mutex<[DirtyBitmap]>

    init(_ memory: GuestMemory) throws(SystemError) {
        var records: [DirtyBitmap] = []
        var zeroed: [DirtyBitmap] = []
        for block in memory.blocks {
            records.append(try DirtyBitmap(pageCount: block.pageCount))
            zeroed.append(try DirtyBitmap(pageCount: block.pageCount))
        }
        self.memory = memory
        self.records = Mutex(records)
        self.zeroed = Mutex(zeroed)
    }

    func mark(_ pages: Range<PageIndex>, of block: Int) { records.withLock { $0[block].set(pages) } }

    func mark(_ runs: [Range<PageIndex>], of block: Int) {
        records.withLock { records in
            for run in runs { records[block].set(run) }
        }
    }

    /// Whether that page came before, as data or as zeros.
    func holds(_ page: PageIndex, of block: Int) -> Bool {
        records.withLock { $0[block].contains(page) } || zeroed.withLock { $0[block].contains(page) }
    }

    /// Whether nothing of that range was received.
    func isFresh(_ pages: Range<PageIndex>, of block: Int) -> Bool {
        records.withLock { $0[block].nextRun(from: pages.lowerBound, limit: 1) }
            .map { $0.lowerBound >= pages.upperBound } ?? true
    }

    /// Makes pages zero.
    func clear(_ pages: Range<PageIndex>, of block: Int) {
        zeroed.withLock { $0[block].set(pages) }
        var position = pages.lowerBound
        let count = pages.upperBound.value - pages.lowerBound.value
        while let run = records.withLock({ $0[block].nextRun(from: position, limit: count) }),
            run.lowerBound < pages.upperBound
        {
            let part = run.clamped(to: position..<pages.upperBound)
            memory.blocks[block].mapping.zero(
                at: Int(part.lowerBound.offset.value), count: Int(part.upperBound.value - part.lowerBound.value) * 4096)
            position = part.upperBound
        }
    }
}
