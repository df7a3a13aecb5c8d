import Devices
import Testing

@Suite("state reader")
struct StateReaderTests {
    private let device = DebugConsole { _ in }

    @Test("integers are written most significant byte first, and read back")
    func integers() throws {
        var writer = StateWriter()
        writer.write(UInt8(0x01))
        writer.write(UInt16(0x0203))
        writer.write(UInt32(0x0405_0607))
        writer.write(UInt64(0x0809_0a0b_0c0d_0e0f))
        writer.write(bytes: [0x10, 0x11])
        #expect(writer.bytes == Array(0x01...0x11))
        var reader = try StateReader(writer.bytes, version: 1, for: device)
        #expect(try reader.readUInt8("a") == 0x01)
        #expect(try reader.readUInt16("b") == 0x0203)
        #expect(try reader.readUInt32("c") == 0x0405_0607)
        #expect(try reader.readUInt64("d") == 0x0809_0a0b_0c0d_0e0f)
        #expect(try reader.readBytes("e", count: 2) == [0x10, 0x11])
        try reader.finish()
    }

    @Test("a field cut short is named", arguments: 0..<8)
    func truncated(count: Int) throws {
        var reader = try StateReader([UInt8](repeating: 0, count: count), version: 1, for: device)
        let error = #expect(throws: DeviceStateError.self) { try reader.readUInt64("ticks") }
        #expect(error?.reason == .truncated(field: "ticks", bytes: count))
        #expect(error?.description.contains("ends after \(count) bytes, inside the field ticks") == true)
    }

    @Test("a count beyond the body is refused, however large or negative", arguments: [4, Int.max, -1, Int.min])
    func count(count: Int) throws {
        var reader = try StateReader([1, 2, 3], version: 1, for: device)
        #expect(throws: DeviceStateError.self) { try reader.readBytes("bytes", count: count) }
    }

    @Test("bytes after the last field are refused")
    func trailing() throws {
        var reader = try StateReader([1, 2, 3], version: 1, for: device)
        _ = try reader.readUInt8("first")
        let error = #expect(throws: DeviceStateError.self) { try reader.finish() }
        #expect(error?.reason == .trailing(bytes: 3, expected: 1))
    }
}
