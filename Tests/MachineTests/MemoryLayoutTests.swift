import GuestMemory
import Host
import Machine
import Synchronization
import TestSupport
import Testing

@Suite("memory layout of a machine", .serialized, .timeLimit(.minutes(10))) struct MemoryLayoutTests {
    /// Answers reads with 0x2a and remembers what is written.
    private final class Answering: MemoryMappedDevice {
        let writes = Mutex<[String]>([])
        func memoryRead(offset: UInt64, size: Int) -> UInt64 { 0x2a }
        func memoryWrite(offset: UInt64, size: Int, value: UInt64) {
            writes.withLock { $0.append("\(offset) \(size) \(value & 0xff)") }
        }
    }

    /// `mov $0xd000,%ax; mov %ax,%ds; mov 4,%al; mov %al,5; out %al,$0xf4; 1: jmp 1b`
    private static let touchDevice: [UInt8] =
        [0xB8, 0x00, 0xD0, 0x8E, 0xD8, 0xA0, 0x04, 0x00, 0xA2, 0x05, 0x00, 0xE6, 0xF4, 0xEB, 0xFE]

    /// Counts in the byte at D000:0 and copies it to 0x9000: `mov $0xd000,%ax; mov %ax,%ds; 1: incb 0; mov 0,%al; mov %al,%cs:0x9000;
    /// jmp 1b`
    private static let countInWindow: [UInt8] =
        [0xB8, 0x00, 0xD0, 0x8E, 0xD8, 0xFE, 0x06, 0, 0, 0xA0, 0, 0, 0x2E, 0xA2, 0x00, 0x90, 0xEB, 0xF3]

    @Test("a device that a transaction puts over RAM answers the guest", .enabled(if: hasKVM, needsKVM))
    func device() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let machine = try VirtualMachine.bootSector(Self.touchDevice)
                let device = Answering()
                var transaction = MemoryTransaction()
                transaction.add(.io("test", byteCount: 16, device), at: 0xD0000, priority: 1)
                try machine.memory.commit(transaction)
                try machine.resume()
                try waitFor("the guest's end") { machine.runState == .shutdown }
                claim(device.writes.withLock { $0 } == ["5 1 42"], "the device saw \(device.writes.withLock { $0 })")
                claim(machine.memory.mapLines.contains { $0.contains("i/o): test") }, "the device is not shown")
            }
        }
    }

    @Test(
        "RAM that becomes ROM under a running guest keeps what it held, and takes writes again later",
        .enabled(if: hasKVM, needsKVM))
    func protection() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 50) {
                let machine = try VirtualMachine.bootSector(Self.countInWindow)
                let block = machine.memory.blocks[0]
                var transaction = MemoryTransaction()
                let window = transaction.add(
                    .ram("window", block, offset: RAMOffset(0xD0000), byteCount: 0x1000), at: 0xD0000, priority: 1)
                try machine.memory.commit(transaction)
                try machine.resume()
                func changes(within milliseconds: Int) -> Bool {
                    let before = block.mapping.load(at: 0xD0000, as: UInt8.self)
                    for _ in 0..<milliseconds {
                        Clock.sleep(nanoseconds: 1_000_000)
                        if block.mapping.load(at: 0xD0000, as: UInt8.self) != before { return true }
                    }
                    return false
                }
                for _ in 0..<10 {
                    claim(changes(within: 10_000), "the guest does not count")
                    transaction = MemoryTransaction()
                    transaction.setReadOnly(window, true)
                    try machine.memory.commit(transaction)
                    let held = block.mapping.load(at: 0xD0000, as: UInt8.self)
                    let deadline = Deadline.after(seconds: 10)
                    while block.mapping.load(at: 0x9000, as: UInt8.self) != held, !deadline.hasPassed {
                        Clock.sleep(nanoseconds: 1_000_000)
                    }
                    let seen = block.mapping.load(at: 0x9000, as: UInt8.self)
                    claim(
                        seen == held,
                        "the guest sees \(seen), the ROM holds \(held); the machine is \(machine.runState)")
                    claim(!changes(within: 50), "the guest writes to ROM")
                    transaction = MemoryTransaction()
                    transaction.setReadOnly(window, false)
                    try machine.memory.commit(transaction)
                }
                claim(machine.runState == .running, "the machine is \(machine.runState)")
            }
        }
    }
}
