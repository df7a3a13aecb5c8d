import GuestMemory
import Host
import Machine
import TestSupport
import Testing

@Suite("serial port", .serialized, .enabled(if: hasKVM, needsKVM))
struct SerialPortTests {
    @Test("a client of the unix socket gets what the guest sends, and the guest what the client sends")
    func echo() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 20) {
                let path = temporaryPath("echo")
                let serial = try SerialPort(.unix(path))
                let machine = try VirtualMachine.bootSector(BootCode.echo, serial: serial)
                try machine.resume()
                var line = try SerialLine(path: path)
                // More than the UART's FIFO holds.
                let text = String(repeating: "0123456789abcdef", count: 16)
                try line.send(text)
                line.awaitText("the echo") { $0 == text }
                for number in 0..<5 {
                    line.close()
                    line = try SerialLine(path: path)
                    try line.send("again \(number)")
                    line.awaitText("the echo after reconnecting") { $0 == "again \(number)" }
                }
                // The newest client wins.
                let newer = try SerialLine(path: path)
                try newer.send("newer")
                newer.awaitText("the echo to the newer client") { $0 == "newer" }
                serial.close()
            }
        }
    }

    @Test("a client that never reads does not stop the guest")
    func deaf() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 20) {
                let path = temporaryPath("deaf")
                let serial = try SerialPort(.unix(path))
                let machine = try VirtualMachine.bootSector(BootCode.flood, serial: serial)
                let client = try Socket.connect(unix: path)
                Clock.sleep(nanoseconds: 20_000_000)
                try machine.resume()
                func count() -> UInt32 { machine.memory.blocks[0].mapping.load(at: 0x9000, as: UInt32.self) }
                // The socket's buffer and the backlog take some 300,000 bytes.
                var last: UInt32 = 0
                for _ in 0..<5 {
                    let before = last
                    try waitFor("the guest to go on") { count() > before + 2000 }
                    last = count()
                }
                withExtendedLifetime(client) {}
                serial.close()
            }
        }
    }
}
