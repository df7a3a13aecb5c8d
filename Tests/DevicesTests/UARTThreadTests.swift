import Devices
import Host
import Testing

@Suite("UART on several threads")
struct UARTThreadTests {
    @Test("a sender and a reader on different threads lose nothing, and interrupt levels arrive alternating")
    func senderAndReader() throws {
        let count = 3_000
        let levels = Recorder<Bool>()
        let uart = UART16550(transmit: { _ in }, interrupt: { levels.record($0) })
        uart.write(port: 0x3fa, size: .byte, value: 0x01)
        uart.write(port: 0x3f9, size: .byte, value: 0x01)
        let sender = try HostThread(name: "sender") {
            var sent = 0
            while sent < count {
                let burst = (sent..<min(sent + 20, count)).map { UInt8(truncatingIfNeeded: $0) }
                sent += uart.receive(burst)
            }
        }
        var received = 0
        var inOrder = true
        while received < count {
            guard uart.read(port: 0x3fd, size: .byte) & 0x01 != 0 else { continue }
            let value = uart.read(port: 0x3f8, size: .byte)
            if value != UInt32(received & 0xff) { inOrder = false }
            received += 1
        }
        sender.join()
        #expect(inOrder)
        #expect(uart.read(port: 0x3fd, size: .byte) == 0x60)
        let seen = levels.take()
        #expect(seen.last == false)
        #expect(seen.enumerated().allSatisfy { $0.element == ($0.offset % 2 == 0) })
    }
}
