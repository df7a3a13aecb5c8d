import Synchronization

/// System control port A, 0x92: the A20 gate in bit 1, fast reset in bit 0.
///
/// The machine's A20 line is always on; the bit reads back as written, which is all that guests check here.
///
/// Section `godwit/port92`, version 1, 1 byte: the register.
public final class SystemControlPortA: PortDevice {
    public let name = "system control port A"
    public let sectionName = "godwit/port92"
    public let instance: UInt32 = 0
    public let stateVersion: UInt32 = 1
    public let portRanges = [PortRange(0x92...0x92)]

    private static let fastReset: UInt8 = 0x01
    private static let a20: UInt8 = 0x02

    private let register = Mutex(a20)
    private let requestReset: @Sendable () -> Void

    /// The port after power-on; `requestReset` is called without a lock held, on the vCPU's thread.
    public init(requestReset: @escaping @Sendable () -> Void) {
        self.requestReset = requestReset
    }

    public func read(port: UInt16, size: PortAccessSize) -> UInt32 {
        UInt32(register.withLock { $0 })
    }

    public func write(port: UInt16, size: PortAccessSize, value: UInt32) {
        let new = UInt8(truncatingIfNeeded: value)
        let old = register.withLock { register in
            defer { register = new }
            return register
        }
        if new & ~old & Self.fastReset != 0 { requestReset() }
    }

    public func reset() {
        register.withLock { $0 = Self.a20 }
    }

    public func saveState() -> [UInt8] {
        [register.withLock { $0 }]
    }

    public func loadState(_ body: [UInt8], version: UInt32) throws(DeviceStateError) {
        var reader = try StateReader(body, version: version, for: self)
        let value = try reader.readUInt8("register")
        try reader.finish()
        register.withLock { $0 = value }
    }
}
