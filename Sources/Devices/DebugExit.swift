/// Ends the VM with a status of the guest's choice: a test guest writes its verdict to ports 0xf4 to 0xf7.
///
/// The exit status is `(value << 1) | 1`, so that no guest can fake the status 0 of an orderly end.
///
/// Section `godwit/debug-exit`, version 1, no bytes: there is no state.
public final class DebugExit: PortDevice {
    public let name = "debug exit"
    public let sectionName = "godwit/debug-exit"
    public let instance: UInt32 = 0
    public let stateVersion: UInt32 = 1
    public let portRanges = [PortRange(0xf4...0xf7, width: .dword)]

    private let exit: @Sendable (UInt32) -> Void

    /// `exit` takes the status, on the vCPU's thread; a process passes on its low eight bits.
    public init(exit: @escaping @Sendable (UInt32) -> Void) {
        self.exit = exit
    }

    public func read(port: UInt16, size: PortAccessSize) -> UInt32 { 0 }

    public func write(port: UInt16, size: PortAccessSize, value: UInt32) {
        exit(value << 1 | 1)
    }

    public func reset() {}

    public func saveState() -> [UInt8] { [] }

    public func loadState(_ body: [UInt8], version: UInt32) throws(DeviceStateError) {
        try StateReader(body, version: version, for: self).finish()
    }
}
