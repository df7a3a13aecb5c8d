import Synchronization

/// Answers a guest's accesses to an I/O region. Called on vCPU threads, several at once.
public protocol MemoryMappedDevice: AnyObject, Sendable {
    /// `size` is 1 to 8 bytes; `offset` counts from the start of the region. Bits above `size` bytes are not looked at.
    func memoryRead(offset: UInt64, size: Int) -> UInt64
    func memoryWrite(offset: UInt64, size: Int, value: UInt64)
}

/// Names a region of a tree: its identity, and what sentences about it call it.
public struct MemoryRegionID: Hashable, Sendable, CustomStringConvertible {
    public let name: String
    private let number: UInt64
    private static let last = Atomic<UInt64>(0)

    /// The container that is the guest-physical address space.
    public static let system = MemoryRegionID(name: "system", number: 0)

    /// An identity that no other region has.
    init(name: String) {
        self.init(name: name, number: Self.last.add(1, ordering: .relaxed).newValue)
    }

    private init(name: String, number: UInt64) {
        self.name = name
        self.number = number
    }

    public static func == (a: Self, b: Self) -> Bool { a.number == b.number }
    public func hash(into hasher: inout Hasher) { hasher.combine(number) }
    func isOlder(than other: Self) -> Bool { number < other.number }
    public var description: String { "memory region '\(name)'" }
}

/// What lies in the guest's address space: memory, a device, a window to another region, or a container of regions.
public struct MemoryRegion: Sendable {
    public enum Content: Sendable {
        /// Shows its subregions; what they leave free shows what lies below the container.
        case container
        /// Memory of a block, from an offset on.
        case memory(RAMBlock, RAMOffset)
        case device(any MemoryMappedDevice)
        /// A part of another region, from an offset in it on.
        case alias(of: MemoryRegionID, offset: UInt64)
    }

    /// For people: error sentences and `info mtree`. Need not be unique.
    public let name: String
    public internal(set) var byteCount: UInt64
    public internal(set) var content: Content
    /// The guest's writes to what is seen through this region are discarded: a ROM, or an alias that write-protects what it shows.
    public internal(set) var isReadOnly = false
    /// A disabled region shows nothing, nor does an alias of it.
    public internal(set) var isEnabled = true

    /// The size of the address space: 46 bits, what a processor of today reaches.
    public static let addressLimit: UInt64 = 1 << 46

    public static func container(_ name: String, byteCount: UInt64) -> MemoryRegion {
        MemoryRegion(name: name, byteCount: byteCount, content: .container)
    }

    /// `byteCount` bytes of `block` from `offset` on; all the rest of it by default.
    public static func ram(
        _ name: String, _ block: RAMBlock, offset: RAMOffset = RAMOffset(0), byteCount: UInt64? = nil
    ) -> MemoryRegion {
        let rest = block.byteCount > offset.value ? block.byteCount - offset.value : 0
        return MemoryRegion(name: name, byteCount: byteCount ?? rest, content: .memory(block, offset))
    }

    /// The same, but the guest's writes are discarded.
    public static func rom(
        _ name: String, _ block: RAMBlock, offset: RAMOffset = RAMOffset(0), byteCount: UInt64? = nil
    ) -> MemoryRegion {
        var region = ram(name, block, offset: offset, byteCount: byteCount)
        region.isReadOnly = true
        return region
    }

    public static func io(_ name: String, byteCount: UInt64, _ device: any MemoryMappedDevice) -> MemoryRegion {
        MemoryRegion(name: name, byteCount: byteCount, content: .device(device))
    }

    public static func alias(
        _ name: String, of target: MemoryRegionID, offset: UInt64 = 0, byteCount: UInt64, isReadOnly: Bool = false
    ) -> MemoryRegion {
        var region = MemoryRegion(name: name, byteCount: byteCount, content: .alias(of: target, offset: offset))
        region.isReadOnly = isReadOnly
        return region
    }

    init(name: String, byteCount: UInt64, content: Content) {
        self.name = name
        self.byteCount = byteCount
        self.content = content
    }
}
