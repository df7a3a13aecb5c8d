/// A part of a RAM block as the guest sees it: `byteCount` bytes from `guestAddress` on are the block's from `offset` on.
public struct FlatRange: Sendable {
    public let guestAddress: GuestPhysicalAddress
    public let byteCount: UInt64
    public let block: RAMBlock
    public let offset: RAMOffset
    /// Guest writes are discarded.
    public let isReadOnly: Bool

    public init(
        guestAddress: GuestPhysicalAddress, byteCount: UInt64, block: RAMBlock, offset: RAMOffset,
        isReadOnly: Bool = false
    ) {
        self.guestAddress = guestAddress
        self.byteCount = byteCount
        self.block = block
        self.offset = offset
        self.isReadOnly = isReadOnly
    }

    public var end: GuestPhysicalAddress { guestAddress + byteCount }
}

/// What the guest-physical address space shows, as an immutable list of ranges in order. Readers hold one view or the next.
public struct FlatView: Sendable {
    public let ranges: [FlatRange]

    /// - Precondition: the ranges do not overlap.
    public init(_ ranges: [FlatRange]) {
        self.ranges = ranges.sorted { $0.guestAddress < $1.guestAddress }
        for (a, b) in zip(self.ranges, self.ranges.dropFirst()) {
            precondition(a.end <= b.guestAddress, "ranges of a flat view do not overlap")
        }
    }

    /// The range that holds an address.
    public func range(at address: GuestPhysicalAddress) -> FlatRange? {
        var low = 0
        var high = ranges.count
        while low < high {
            let middle = (low + high) / 2
            if ranges[middle].end <= address { low = middle + 1 } else { high = middle }
        }
        guard low < ranges.count, ranges[low].guestAddress <= address else { return nil }
        return ranges[low]
    }
}
