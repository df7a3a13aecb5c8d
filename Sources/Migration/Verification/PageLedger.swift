import GuestMemory
import Host
import MigrationStream
import Synchronization

/// One side's record of a verified migration: the digest of every page as it was last sent (or last announced to have been), with sums
/// over 512 pages and over all, which follow each change.
///
/// Memory that costs nothing until it is touched: what it takes follows the pages that moved, never the size of RAM. The root of two equal
/// records is equal; of two that differ, the sums tell where.
final class PageLedger: Sendable {
    /// Pages of one sum.
    static let groupPages: UInt64 = 512

    private struct Block: Sendable {
        let pages: UInt64
        let digests: Mapping
        let sums: Mapping

        var groups: UInt64 { (pages + groupPages - 1) / groupPages }

        init(pages: UInt64) throws(SystemError) {
            self.pages = pages
            digests = try Mapping(anonymousByteCount: Int(pages) * 8)
            sums = try Mapping(anonymousByteCount: Int((pages + groupPages - 1) / groupPages) * 8)
        }

        /// Pages from `first` on, as many as there are digests. - Returns: by how much the sum over all pages grows.
        func replace(from first: UInt64, by values: ArraySlice<UInt64>) -> UInt64 {
            var (total, position) = (UInt64(0), first)
            var rest = values
            while !rest.isEmpty {
                // Those of one sum.
                let part = rest.prefix(Int(groupPages - position % groupPages))
                var growth: UInt64 = 0
                unsafe digests.withMutableBytes(at: Int(position) * 8, count: part.count * 8) { bytes in
                    for (place, value) in part.enumerated() {
                        // SAFETY: a word for each of the part.
                        growth &+= value &- (unsafe bytes.loadUnaligned(fromByteOffset: place * 8, as: UInt64.self))
                        unsafe bytes.storeBytes(of: value, toByteOffset: place * 8, as: UInt64.self)
                    }
                }
                if growth != 0 {
                    let group = Int(position / groupPages) * 8
                    sums.store(sums.load(at: group, as: UInt64.self) &+ growth, at: group)
                    total &+= growth
                }
                position += UInt64(part.count)
                rest = rest.dropFirst(part.count)
            }
            return total
        }

        /// - Returns: by how much the sum over all pages grows.
        @inline(__always)
        func replace(_ page: UInt64, by digest: UInt64) -> UInt64 {
            let growth = digest &- digests.load(at: Int(page) * 8, as: UInt64.self)
            guard growth != 0 else { return 0 }
            digests.store(digest, at: Int(page) * 8)
            let group = Int(page / groupPages) * 8
            sums.store(sums.load(at: group, as: UInt64.self) &+ growth, at: group)
            return growth
        }
    }
    private let blocks: [Block]
    /// The lock of everything in `blocks`; its value is the sum over all pages.
    private let sum = Mutex<UInt64>(0)

    /// - Parameter pageCounts: of all blocks, in their order.
    init(pageCounts: [UInt64]) throws(SystemError) {
        var blocks: [Block] = []
        for pages in pageCounts { blocks.append(try Block(pages: pages)) }
        self.blocks = blocks
    }

    var root: UInt64 { sum.withLock { $0 } }

    /// The digest of a page as it was sent last; 0: it was not.
    func digest(of page: UInt64, in block: Int) -> UInt64 {
        sum.withLock { _ in blocks[block].digests.load(at: Int(page) * 8, as: UInt64.self) }
    }

    /// Pages were sent: those of the runs in their order, each with its digest.
    func record(_ runs: some Sequence<Range<PageIndex>>, of block: Int, digests: ArraySlice<UInt64>) {
        let record = blocks[block]
        sum.withLock { sum in
            var rest = digests
            for run in runs {
                let part = rest.prefix(run.count)
                sum = sum &+ record.replace(from: run.lowerBound.value, by: part)
                rest = rest.dropFirst(part.count)
            }
        }
    }

    /// Pages were sent, with the digests that `digest` makes.
    func record(_ pages: some Sequence<UInt64>, of block: Int, digest: (UInt64) -> UInt64) {
        let record = blocks[block]
        sum.withLock { sum in
            for page in pages { sum = sum &+ record.replace(page, by: digest(page)) }
        }
    }

    // MARK: Finding what differs

    /// How many values of a level a block has.
    func count(_ level: DigestLevel, of block: Int) -> UInt64 {
        level == .groups ? blocks[block].groups : blocks[block].pages
    }

    var blockCount: Int { blocks.count }

    /// The values of a range; `nil` when there is no such range.
    func values(_ range: DigestRange) -> [UInt64]? {
        guard range.block < blocks.count, range.count <= StreamLimit.digests else { return nil }
        let count = count(range.level, of: Int(range.block))
        guard range.first <= count, UInt64(range.count) <= count - range.first else { return nil }
        let values = range.level == .groups ? blocks[Int(range.block)].sums : blocks[Int(range.block)].digests
        return sum.withLock { _ in
            (0..<Int(range.count)).map { values.load(at: (Int(range.first) + $0) * 8, as: UInt64.self) }
        }
    }
}
