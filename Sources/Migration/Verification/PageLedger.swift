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

    /// Pages were sent. - Parameter replaced: gets what stood there before; 0: nothing.
    func record(
        _ pages: some Sequence<(page: UInt64, digest: UInt64)>, of block: Int,
        replaced: (_ page: UInt64, _ digest: UInt64, _ former: UInt64) -> Void = { _, _, _ in }
    ) {
        let (digests, sums) = (blocks[block].digests, blocks[block].sums)
        sum.withLock { sum in
            for (page, digest) in pages {
                let former = digests.load(at: Int(page) * 8, as: UInt64.self)
                replaced(page, digest, former)
                guard former != digest else { continue }
                digests.store(digest, at: Int(page) * 8)
                let group = Int(page / Self.groupPages) * 8
                sums.store(sums.load(at: group, as: UInt64.self) &+ digest &- former, at: group)
                sum = sum &+ digest &- former
            }
        }
    }

    /// The pages of a run, with what `digest` says of each.
    func record(
        _ pages: Range<PageIndex>, of block: Int, replaced: (UInt64, UInt64, UInt64) -> Void = { _, _, _ in },
        digest: @escaping (UInt64) -> UInt64
    ) {
        record(
            (pages.lowerBound.value..<pages.upperBound.value).lazy.map { (page: $0, digest: digest($0)) }, of: block,
            replaced: replaced)
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
