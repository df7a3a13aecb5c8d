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

    /// Pages that go out as zeros, without digests on the wire.
    func sentZeroes(_ pages: some Sequence<UInt64>, of block: Int) {
        ledger.record(
            pages.lazy.map { (page: $0, digest: self.hasher.zeroDigest(block: block, page: $0)) }, of: block)
    }

    func sent(_ digests: [(page: UInt64, digest: UInt64)], of block: Int) { ledger.record(digests, of: block) }

    /// The answer to what the destination asks, to find out what differs; nothing where there is nothing.
    func answer(_ range: DigestRange) -> ForwardCommand {
        .digests(range, ledger.values(range) ?? [])
    }
}
