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

    /// Whether both show the same byte of the same block, in the same way, at any address at all.
    func agrees(with other: FlatRange) -> Bool {
        block === other.block && isReadOnly == other.isReadOnly
            && offset.value &- guestAddress.value == other.offset.value &- other.guestAddress.value
    }

    func extended(by more: UInt64) -> FlatRange {
        FlatRange(
            guestAddress: guestAddress, byteCount: byteCount + more, block: block, offset: offset,
            isReadOnly: isReadOnly)
    }

    /// - Precondition: the part lies inside.
    func part(from start: GuestPhysicalAddress, to end: GuestPhysicalAddress) -> FlatRange {
        FlatRange(
            guestAddress: start, byteCount: end.value - start.value, block: block,
            offset: RAMOffset(offset.value + start.value - guestAddress.value), isReadOnly: isReadOnly)
    }
}

/// A part of the address space that one region answers, to the byte: what an access that leaves the guest goes by.
public struct FlatSection: Sendable {
    public enum Content: Sendable {
        /// A RAM block's bytes from an offset on.
        case memory(RAMBlock, RAMOffset)
        /// A device's, from an offset in its region on.
        case device(any MemoryMappedDevice, offset: UInt64)
    }

    public let guestAddress: GuestPhysicalAddress
    public let byteCount: UInt64
    public let content: Content
    /// Guest writes are discarded.
    public let isReadOnly: Bool
    public let region: MemoryRegionID

    public var end: GuestPhysicalAddress { guestAddress + byteCount }

    /// - Precondition: the part lies inside.
    func part(from start: GuestPhysicalAddress, to end: GuestPhysicalAddress) -> FlatSection {
        let skipped = start.value - guestAddress.value
        let content: Content =
            switch self.content {
            case .memory(let block, let offset): .memory(block, RAMOffset(offset.value + skipped))
            case .device(let device, let offset): .device(device, offset: offset + skipped)
            }
        return FlatSection(
            guestAddress: start, byteCount: end.value - start.value, content: content, isReadOnly: isReadOnly,
            region: region)
    }
}

/// What the guest-physical address space shows, as immutable lists of ranges in order. Readers hold one view or the next.
public struct FlatView: Sendable {
    /// Memory in whole pages, as listeners show it to the guest; ranges that continue each other are one.
    public let ranges: [FlatRange]
    /// Everything, to the byte. A page of memory that a device covers in part is here and not in `ranges`: it is accessed from outside.
    public let sections: [FlatSection]

    /// A view of memory alone.
    ///
    /// - Precondition: the ranges do not overlap.
    public init(_ ranges: [FlatRange]) {
        self.init(
            sections: ranges.map {
                FlatSection(
                    guestAddress: $0.guestAddress, byteCount: $0.byteCount, content: .memory($0.block, $0.offset),
                    isReadOnly: $0.isReadOnly, region: MemoryRegionID(name: $0.block.name))
            })
    }

    /// - Precondition: the sections do not overlap.
    init(sections: [FlatSection]) {
        self.sections = sections.sorted { $0.guestAddress < $1.guestAddress }
        for (a, b) in zip(self.sections, self.sections.dropFirst()) {
            precondition(a.end <= b.guestAddress, "parts of a flat view do not overlap")
        }
        ranges = Self.wholePages(of: self.sections)
    }

    private static func wholePages(of sections: [FlatSection]) -> [FlatRange] {
        var joined: [FlatRange] = []
        for section in sections {
            guard case .memory(let block, let offset) = section.content else { continue }
            let range = FlatRange(
                guestAddress: section.guestAddress, byteCount: section.byteCount, block: block, offset: offset,
                isReadOnly: section.isReadOnly)
            if let last = joined.last, last.end == range.guestAddress, last.agrees(with: range) {
                joined[joined.count - 1] = last.extended(by: range.byteCount)
            } else {
                joined.append(range)
            }
        }
        let page = GuestPage.byteCount
        return joined.compactMap { range in
            let start = (range.guestAddress.value + page - 1) / page * page
            let end = range.end.value / page * page
            return start < end ? range.part(from: GuestPhysicalAddress(start), to: GuestPhysicalAddress(end)) : nil
        }
    }

    /// The range of whole pages that holds an address.
    public func range(at address: GuestPhysicalAddress) -> FlatRange? {
        let index = ranges.firstIndex(endingAfter: address)
        return index < ranges.count && ranges[index].guestAddress <= address ? ranges[index] : nil
    }

    /// The section that holds an address; `nil` where nothing answers.
    public func section(at address: GuestPhysicalAddress) -> FlatSection? {
        let index = sections.firstIndex(endingAfter: address)
        return index < sections.count && sections[index].guestAddress <= address ? sections[index] : nil
    }

    /// Where devices answer, in order.
    public var deviceRanges: [Range<UInt64>] {
        sections.compactMap { section in
            guard case .device = section.content else { return nil }
            return section.guestAddress.value..<section.end.value
        }
    }

    /// The first address behind `address` where a section begins.
    func nextSection(after address: GuestPhysicalAddress) -> GuestPhysicalAddress? {
        let index = sections.firstIndex(endingAfter: address)
        guard index < sections.count else { return nil }
        if sections[index].guestAddress > address { return sections[index].guestAddress }
        return index + 1 < sections.count ? sections[index + 1].guestAddress : nil
    }
}

/// Something with a place in the address space, so that lists of both kinds are searched in the same way.
protocol AddressSpan {
    var end: GuestPhysicalAddress { get }
}

extension FlatRange: AddressSpan {}
extension FlatSection: AddressSpan {}

extension Array where Element: AddressSpan {
    /// The index of the first that ends behind an address; `count` if none does. The list is in order.
    func firstIndex(endingAfter address: GuestPhysicalAddress) -> Int {
        var low = 0
        var high = count
        while low < high {
            let middle = (low + high) / 2
            if self[middle].end <= address { low = middle + 1 } else { high = middle }
        }
        return low
    }
}

// MARK: Differences

extension FlatViewChange {
    /// What differs between two views. Memory that both show at an address in the same way is in neither list, whatever became of the
    /// range it is a part of.
    public init(from old: FlatView, to new: FlatView) {
        self.init(
            old: old, new: new, removed: Self.parts(of: old.ranges, notIn: new.ranges),
            added: Self.parts(of: new.ranges, notIn: old.ranges))
    }

    /// No memory comes, goes or changes, and devices answer where they did before.
    public var isEmpty: Bool { removed.isEmpty && added.isEmpty && old.deviceRanges == new.deviceRanges }

    private static func parts(of ranges: [FlatRange], notIn others: [FlatRange]) -> [FlatRange] {
        var parts: [FlatRange] = []
        for range in ranges {
            var position = range.guestAddress
            var index = others.firstIndex(endingAfter: position)
            while index < others.count, others[index].guestAddress < range.end {
                let other = others[index]
                index += 1
                guard other.agrees(with: range) else { continue }
                if position < other.guestAddress { parts.append(range.part(from: position, to: other.guestAddress)) }
                position = min(other.end, range.end)
            }
            if position < range.end { parts.append(range.part(from: position, to: range.end)) }
        }
        return parts
    }
}
