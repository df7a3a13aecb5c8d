/// The width of an access to an I/O port.
public enum PortAccessSize: UInt8, Comparable, Sendable {
    case byte = 1
    case word = 2
    case dword = 4

    /// The number of ports, and of bytes, that the access covers.
    public var byteCount: Int { Int(rawValue) }

    /// The value of this width with all bits set: what a bus nobody drives reads as.
    public var allOnes: UInt32 { .max >> (32 - 8 * UInt32(rawValue)) }

    public static func < (left: PortAccessSize, right: PortAccessSize) -> Bool { left.rawValue < right.rawValue }
}

/// Consecutive ports that one device answers.
public struct PortRange: Equatable, Sendable {
    /// The ports, first to last.
    public let ports: ClosedRange<UInt16>
    /// The widest access the device takes whole; the bus splits wider ones into bytes, as ISA does.
    public let width: PortAccessSize

    /// Ports of a device, 8 bits wide unless told otherwise.
    public init(_ ports: ClosedRange<UInt16>, width: PortAccessSize = .byte) {
        self.ports = ports
        self.width = width
    }
}

/// A device behind I/O ports. Calls come from any vCPU thread, several at once: the device does its own locking.
public protocol PortDevice: MigratableDevice {
    /// What error messages call it.
    var name: String { get }
    /// The ports it answers; constant over its life.
    var portRanges: [PortRange] { get }

    /// A guest's read; the bus only passes accesses within one range and no wider than it.
    func read(port: UInt16, size: PortAccessSize) -> UInt32
    /// A guest's write; bits of `value` above `size` are zero.
    func write(port: UInt16, size: PortAccessSize, value: UInt32)
    /// The state after power-on; delegates are told what follows from it.
    func reset()
}

/// Takes the level of an interrupt line, true while the device asks for service.
///
/// Called with the device's lock held, so that levels arrive in order: it must be quick and not call the device.
public typealias InterruptLine = @Sendable (Bool) -> Void

/// Takes one byte that the guest sent, on the vCPU's thread and without a lock held: it must not block.
public typealias ByteSink = @Sendable (UInt8) -> Void
