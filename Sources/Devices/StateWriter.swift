/// Builds the body of a state section: big-endian integers and raw bytes, one after the other.
public struct StateWriter {
    /// What has been written so far.
    public private(set) var bytes: [UInt8] = []

    /// An empty body.
    public init() {}

    /// Appends one byte.
    public mutating func write(_ value: UInt8) {
        bytes.append(value)
    }

    /// Appends an integer, most significant byte first.
    public mutating func write(_ value: UInt16) {
        writeBigEndian(value)
    }

    /// Appends an integer, most significant byte first.
    public mutating func write(_ value: UInt32) {
        writeBigEndian(value)
    }

    /// Appends an integer, most significant byte first.
    public mutating func write(_ value: UInt64) {
        writeBigEndian(value)
    }

    /// Appends bytes as they are.
    public mutating func write(bytes raw: some Collection<UInt8>) {
        bytes.append(contentsOf: raw)
    }

    private mutating func writeBigEndian<Value: FixedWidthInteger>(_ value: Value) {
        for shift in stride(from: Value.bitWidth - 8, through: 0, by: -8) {
            bytes.append(UInt8(truncatingIfNeeded: value >> Value(shift)))
        }
    }
}
