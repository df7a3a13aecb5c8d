public import Devices

/// Where the guest's RAM lies: the first 3 GiB from address 0, the rest from 4 GiB on.
///
/// The gap between belongs to interrupt controllers and devices. RAM backs all of the first part, the BIOS stubs and
/// the old video window included; the memory map tells guests to leave these alone.
public struct RAMLayout: Equatable, Sendable {
    /// RAM sizes are multiples of the page size.
    public static let pageBytes: UInt64 = 4096
    /// The smallest guest: what a PC's memory map needs.
    public static let minimumBytes: UInt64 = 1 << 20
    /// The most RAM that starts at address 0.
    public static let lowLimit: UInt64 = 3 << 30
    /// Where the RAM beyond `lowLimit` bytes starts.
    public static let highBase: UInt64 = 4 << 30

    /// RAM in all.
    public let byteCount: UInt64
    /// RAM from address 0.
    public var lowBytes: UInt64 { min(byteCount, Self.lowLimit) }
    /// RAM from `highBase`; 0 for guests of up to 3 GiB.
    public var highBytes: UInt64 { byteCount - lowBytes }

    /// The layout of `byteCount` bytes of RAM on a processor with physical addresses of `physicalAddressBits` bits.
    ///
    /// - Throws: `RAMLayoutError` when the size is no multiple of the page size, too small, or out of the processor's
    ///   reach.
    public init(byteCount: UInt64, physicalAddressBits: Int) throws(RAMLayoutError) {
        guard byteCount % Self.pageBytes == 0 else { throw .unaligned(bytes: byteCount) }
        guard byteCount >= Self.minimumBytes else { throw .tooSmall(bytes: byteCount) }
        // Addresses have at most 52 bits on x86-64; fewer than 33 leave no room above 4 GiB.
        let addressable: UInt64 = 1 << UInt64(min(max(physicalAddressBits, 32), 52))
        let limit = addressable > Self.highBase ? addressable - (Self.highBase - Self.lowLimit) : Self.lowLimit
        guard byteCount <= limit else {
            throw .tooLarge(bytes: byteCount, limit: limit, physicalAddressBits: physicalAddressBits)
        }
        self.byteCount = byteCount
    }

    /// The RAM as ranges of guest physical addresses, ascending.
    public var ranges: [Range<UInt64>] {
        highBytes == 0 ? [0..<lowBytes] : [0..<lowBytes, Self.highBase..<Self.highBase + highBytes]
    }

    /// True when all of `count` bytes from `address` are RAM, in one piece.
    public func contains(address: UInt64, count: UInt64) -> Bool {
        ranges.contains { $0.lowerBound <= address && address <= $0.upperBound && count <= $0.upperBound - address }
    }

    /// The memory map as a PC's BIOS reports it, ascending; what is not listed belongs to nobody.
    public var e820: [E820Entry] {
        let conventionalEnd = UInt64(BIOSImage.conventionalKiB) << 10
        var map = [
            E820Entry(base: 0, length: conventionalEnd, kind: .ram),
            E820Entry(base: conventionalEnd, length: 0xa0000 - conventionalEnd, kind: .reserved),
            E820Entry(base: BIOSImage.romAddress, length: 0x100000 - BIOSImage.romAddress, kind: .reserved),
        ]
        if lowBytes > 0x100000 { map.append(E820Entry(base: 0x100000, length: lowBytes - 0x100000, kind: .ram)) }
        if highBytes > 0 { map.append(E820Entry(base: Self.highBase, length: highBytes, kind: .ram)) }
        return map
    }
}

/// Why a guest cannot have that much RAM; its description is one sentence.
public enum RAMLayoutError: Error, Equatable, CustomStringConvertible {
    /// The size is no multiple of the page size.
    case unaligned(bytes: UInt64)
    /// The size is below `RAMLayout.minimumBytes`.
    case tooSmall(bytes: UInt64)
    /// The size is beyond the processor's physical addresses.
    case tooLarge(bytes: UInt64, limit: UInt64, physicalAddressBits: Int)

    public var description: String {
        switch self {
        case .unaligned(let bytes):
            "memory size \(bytes): not a multiple of the page size of \(RAMLayout.pageBytes) bytes"
        case .tooSmall(let bytes): "memory size \(bytes): less than the minimum of \(RAMLayout.minimumBytes) bytes (1M)"
        case .tooLarge(let bytes, let limit, let bits):
            "memory size \(bytes): more than the \(limit) bytes that this processor's physical addresses of \(bits) bits "
                + "can reach"
        }
    }
}
