//! The GuestMemory room: what guest memory is, and what is known about who wrote to it.
//!
//! A `RAMBlock` is host memory with a name. A `FlatView` says where the guest sees which part of which block. `GuestMemory` holds
//! both and reads and writes by guest-physical address. A `DirtyBitmap` is one client's record of written pages of one block.

import Host

/// The memory of one virtual machine.
public final class GuestMemory: Sendable {
    public let blocks: [RAMBlock]
    public let view: FlatView
    /// Pages which this process wrote, not the guest: the accelerator does not see them.
    public let hostWrites = HostWriteLog()

    public init(blocks: [RAMBlock], view: FlatView) {
        self.blocks = blocks
        self.view = view
    }

    /// All RAM, in bytes.
    public var byteCount: UInt64 { blocks.reduce(0) { $0 + $1.byteCount } }

    /// An access outside RAM.
    public struct AccessError: Error, Equatable, Sendable, CustomStringConvertible {
        public let address: GuestPhysicalAddress
        public let byteCount: UInt64

        public init(address: GuestPhysicalAddress, byteCount: UInt64) {
            self.address = address
            self.byteCount = byteCount
        }

        public var description: String {
            "guest memory: no RAM at \(address) (\(byteCount) bytes from there asked for)"
        }
    }

    /// Visits the pieces of a guest-physical range in order, as (block, offset in it, bytes).
    public func forEachPiece<E: Error>(
        at address: GuestPhysicalAddress, byteCount: UInt64, _ body: (RAMBlock, Int, Int) throws(E) -> Void,
        orThrow failure: (AccessError) -> E
    ) throws(E) {
        var position = address
        var left = byteCount
        while left > 0 {
            guard let range = view.range(at: position) else {
                throw failure(AccessError(address: position, byteCount: left))
            }
            let skip = position.value - range.guestAddress.value
            let count = min(left, range.byteCount - skip)
            try body(range.block, Int(range.offset.value + skip), Int(count))
            left -= count
            guard left > 0 else { return }
            position = GuestPhysicalAddress(position.value &+ count)
        }
    }

    /// Bytes of guest memory; never-touched pages read as zeroes and stay untouched. - Throws: `AccessError` if a part of the range is not RAM.
    public func read(at address: GuestPhysicalAddress, count: Int) throws(AccessError) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(count)
        try forEachPiece(
            at: address, byteCount: UInt64(count),
            { (block, offset, count) throws(AccessError) in bytes += block.read(at: offset, count: count) },
            orThrow: { $0 })
        return bytes
    }

    /// Writes bytes to guest memory; nothing is written if a part of the range is not RAM. - Throws: `AccessError`.
    public func write(_ bytes: [UInt8], at address: GuestPhysicalAddress) throws(AccessError) {
        try forEachPiece(
            at: address, byteCount: UInt64(bytes.count), { (_, _, _) throws(AccessError) in }, orThrow: { $0 })
        var rest = bytes[...]
        try forEachPiece(
            at: address, byteCount: UInt64(bytes.count),
            { (block, offset, count) throws(AccessError) in
                block.mapping.write(rest.prefix(count), at: offset)
                hostWrites.record(block, offset: offset, count: count)
                rest = rest.dropFirst(count)
            }, orThrow: { $0 })
    }

    /// Makes a range zero. Holes stay holes. - Throws: `AccessError` if a part of the range is not RAM.
    public func zero(at address: GuestPhysicalAddress, byteCount: UInt64) throws(AccessError) {
        try forEachPiece(
            at: address, byteCount: byteCount,
            { (block, offset, count) throws(AccessError) in
                let end = offset + count
                let pages = RAMOffset(UInt64(offset)).page..<RAMOffset(UInt64(end) + GuestPage.byteCount - 1).page
                // Where holes cannot be told apart, all is zeroed: that only costs memory.
                for run in (try? block.allocatedRuns(in: pages)) ?? [pages] {
                    let start = max(offset, Int(run.lowerBound.offset.value))
                    block.mapping.zero(at: start, count: min(end, Int(run.upperBound.offset.value)) - start)
                }
                hostWrites.record(block, offset: offset, count: count)
            }, orThrow: { $0 })
    }
}
