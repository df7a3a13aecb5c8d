/// Reads the body of a state section field by field, and refuses what is not exactly there.
///
/// A device reads everything into locals, calls `finish()`, and only then changes itself.
public struct StateReader {
    private let body: [UInt8]
    private let section: String
    private let instance: UInt32
    private var offset = 0

    /// Starts at the first field of a section for `device`.
    ///
    /// - Throws: `DeviceStateError` with reason `version` when the device reads another version.
    public init(
        _ body: [UInt8], version: UInt32, for device: some MigratableDevice
    ) throws(DeviceStateError) {
        self.body = body
        section = device.sectionName
        instance = device.instance
        guard version == device.stateVersion else {
            throw refusal(.version(found: version, known: device.stateVersion))
        }
    }

    /// Reads a byte, of which only bits in `mask` may be set.
    public mutating func readUInt8(_ field: String, mask: UInt8 = .max) throws(DeviceStateError) -> UInt8 {
        let value: UInt8 = try readBigEndian(field)
        guard value & ~mask == 0 else { throw impossible(field, UInt64(value)) }
        return value
    }

    /// Reads a big-endian 16-bit integer.
    public mutating func readUInt16(_ field: String) throws(DeviceStateError) -> UInt16 {
        try readBigEndian(field)
    }

    /// Reads a big-endian 32-bit integer.
    public mutating func readUInt32(_ field: String) throws(DeviceStateError) -> UInt32 {
        try readBigEndian(field)
    }

    /// Reads a big-endian 64-bit integer.
    public mutating func readUInt64(_ field: String) throws(DeviceStateError) -> UInt64 {
        try readBigEndian(field)
    }

    /// Reads `count` bytes as they are; a negative count is an impossible one.
    public mutating func readBytes(_ field: String, count: Int) throws(DeviceStateError) -> ArraySlice<UInt8> {
        guard count >= 0, count <= body.count - offset else {
            throw refusal(.truncated(field: field, bytes: body.count))
        }
        defer { offset += count }
        return body[offset..<offset + count]
    }

    /// Checks that nothing follows the last field.
    public func finish() throws(DeviceStateError) {
        guard offset == body.count else { throw refusal(.trailing(bytes: body.count, expected: offset)) }
    }

    /// The error for a field whose value the device can never have.
    public func impossible(_ field: String, _ value: UInt64) -> DeviceStateError {
        refusal(.impossible(field: field, value: value))
    }

    private mutating func readBigEndian<Value: FixedWidthInteger>(
        _ field: String
    ) throws(DeviceStateError) -> Value {
        try readBytes(field, count: Value.bitWidth / 8).reduce(0) { $0 << 8 | Value($1) }
    }

    private func refusal(_ reason: DeviceStateError.Reason) -> DeviceStateError {
        DeviceStateError(section: section, instance: instance, reason: reason)
    }
}
