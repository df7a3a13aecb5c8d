import Devices
import Synchronization

/// Remembers what a device's delegate was told, in order.
final class Recorder<Value: Sendable>: Sendable {
    private let values = Mutex<[Value]>([])

    func record(_ value: Value) {
        values.withLock { $0.append(value) }
    }

    /// What was recorded since the last call.
    func take() -> [Value] {
        values.withLock { values in
            defer { values = [] }
            return values
        }
    }
}

/// RAM of a fixed size from address 0.
final class TestMemory: BIOSMemory {
    private(set) var bytes: [UInt8]

    init(byteCount: Int = 1 << 20) {
        bytes = [UInt8](repeating: 0, count: byteCount)
    }

    func read(at address: UInt64, count: Int) -> [UInt8]? {
        guard address <= UInt64(bytes.count), count <= bytes.count - Int(address) else { return nil }
        return Array(bytes[Int(address)..<Int(address) + count])
    }

    func write(_ data: ArraySlice<UInt8>, at address: UInt64) -> Bool {
        guard address <= UInt64(bytes.count), data.count <= bytes.count - Int(address) else { return false }
        bytes.replaceSubrange(Int(address)..<Int(address) + data.count, with: data)
        return true
    }
}
