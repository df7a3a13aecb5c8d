import GuestMemory
import Host
import MigrationStream

/// What a source with `x-verify` keeps: the digests of all it sent. Used by every thread that sends pages.
final class OutgoingVerification: Sendable {
    let hasher: PageHasher
    let ledger: PageLedger

    init(_ memory: GuestMemory, _ migration: MigrationIdentifier) throws(SystemError) {
        hasher = try PageHasher(migration)
        ledger = try PageLedger(pageCounts: memory.blocks.map(\.pageCount))
    }

    /// The digest of a page that is about to be sent from `memory`, which may be the guest's or a copy.
    func digest(_ memory: Mapping, at offset: Int, block: Int, page: UInt64) -> UInt64 {
        hasher.digest(memory, at: offset, block: block, page: page)
    }

    /// The digests of pages that are about to be sent from guest memory.
    /// - Parameter findsZeroes: a page of zeros has 0 instead of one.
    func digests(
        of pages: Range<PageIndex>, in block: Int, _ memory: Mapping, findsZeroes: Bool = false
    ) -> [UInt64] {
        let numbers = pages.lowerBound.value..<pages.upperBound.value
        let offset = Int(pages.lowerBound.offset.value)
        return hasher.digests(numbers, of: block, memory, at: offset, findsZeroes: findsZeroes)
    }

    /// Pages that go out as zeros, without digests on the wire.
    func sentZeroes(_ pages: some Sequence<UInt64>, of block: Int) {
        ledger.record(pages, of: block) { [hasher] in hasher.zeroDigest(block: block, page: $0) }
    }

    /// Pages that go out with these digests: those of the runs in their order.
    func sent(_ runs: some Sequence<Range<PageIndex>>, of block: Int, digests: ArraySlice<UInt64>) {
        ledger.record(runs, of: block, digests: digests)
    }

    /// The answer to what the destination asks, to find out what differs; nothing where there is nothing.
    func answer(_ range: DigestRange) -> ForwardCommand {
        .digests(range, ledger.values(range) ?? [])
    }
}
