import GuestMemory
import Host
import TestSupport
import Testing

@testable import Machine

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

    @Test("what a guest says in an epoch is heard with that epoch, in order, and too much of it is told")
    func held() throws {
        let path = temporaryPath("held")
        let port = try SerialPort(.file(path))
        defer { Descriptor.remove(path) }
        let tooMuch = Monitor(0)
        func say(_ text: String) { for byte in text.utf8 { port.transmit(byte) } }
        func heard() throws -> String { String(decoding: try Descriptor.contents(of: path), as: UTF8.self) }
        func hears(_ text: String) -> Bool {
            let end = Deadline.after(seconds: 10)
            while !end.hasPassed { if (try? heard()) == text { return true } }
            return false
        }
        say("a")
        #expect(hears("a"))
        port.holdOutput { tooMuch.withLock { $0 += 1 } }
        say("b")
        port.cutOutput(epoch: 1)
        say("c")
        port.cutOutput(epoch: 2)
        say("d")
        Clock.sleep(nanoseconds: 20_000_000)
        #expect(try heard() == "a")
        port.releaseOutput(upTo: 1)
        #expect(hears("ab"))
        port.releaseOutput(upTo: 1)
        say(String(repeating: "e", count: HeldOutput.limit - 2))
        #expect(tooMuch.withLock { $0 } == 0)
        say("f")
        #expect(tooMuch.withLock { $0 } == 1)
        port.releaseOutput(upTo: 2)
        #expect(hears("abc"))
        port.cutOutput(epoch: 3)
        say("g")
        #expect(tooMuch.withLock { $0 } == 1)
        port.endHolding()
        let all = "abcd" + String(repeating: "e", count: HeldOutput.limit - 2) + "fg"
        #expect(hears(all))
        say("h")
        #expect(hears(all + "h"))
    }
}
