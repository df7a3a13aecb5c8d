/// The debug console of PC emulators at port 0xe9: what is written there is printed; it reads as 0xe9, so that a guest
/// can tell that it exists.
///
/// Section `godwit/debug-console`, version 1, no bytes: there is no state.
public final class DebugConsole: PortDevice {
    public let name = "debug console"
    public let sectionName = "godwit/debug-console"
    public let instance: UInt32 = 0
    public let stateVersion: UInt32 = 1
    public let portRanges = [PortRange(0xe9...0xe9)]

    private let sink: ByteSink

    /// `sink` takes each byte written.
    public init(sink: @escaping ByteSink) {
        self.sink = sink
    }

    public func read(port: UInt16, size: PortAccessSize) -> UInt32 { 0xe9 }

    public func write(port: UInt16, size: PortAccessSize, value: UInt32) {
        sink(UInt8(truncatingIfNeeded: value))
    }

    public func reset() {}

    public func saveState() -> [UInt8] { [] }

    public func loadState(_ body: [UInt8], version: UInt32) throws(DeviceStateError) {
        try StateReader(body, version: version, for: self).finish()
    }
}
