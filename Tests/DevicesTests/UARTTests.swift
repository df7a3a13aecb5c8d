import Devices
import TestSupport
import Testing

/// A UART with recorders on its outputs and the registers by name.
private struct Port {
    static let data: UInt16 = 0
    static let interruptEnable: UInt16 = 1
    static let identification: UInt16 = 2
    static let lineControl: UInt16 = 3
    static let modemControl: UInt16 = 4
    static let lineStatus: UInt16 = 5
    static let modemStatus: UInt16 = 6
    static let scratch: UInt16 = 7

    let sent = Recorder<UInt8>()
    let levels = Recorder<Bool>()
    let rooms = Recorder<Void>()
    let uart: UART16550

    init() {
        uart = UART16550(
            transmit: { [sent] in sent.record($0) }, interrupt: { [levels] in levels.record($0) },
            receiveRoom: { [rooms] in rooms.record(()) })
    }

    func read(_ register: UInt16) -> UInt32 { uart.read(port: 0x3f8 + register, size: .byte) }

    func write(_ register: UInt16, _ value: UInt32) { uart.write(port: 0x3f8 + register, size: .byte, value: value) }
}

@Suite("UART registers")
struct UARTRegisterTests {
    private let port = Port()

    @Test("registers have their power-on values")
    func powerOn() {
        let values = (1...7).map { port.read($0) }
        #expect(values == [0x00, 0x01, 0x00, 0x00, 0x60, 0xb0, 0x00])
        #expect(port.read(Port.data) == 0)
    }

    @Test("bits that a 16550 does not have read as zero")
    func reservedBits() {
        port.write(Port.interruptEnable, 0xf0)
        port.write(Port.modemControl, 0xe0)
        #expect(port.read(Port.interruptEnable) == 0)
        #expect(port.read(Port.modemControl) == 0)
    }

    @Test("the scratch register keeps any byte", arguments: [0x00, 0x5a, 0xff] as [UInt32])
    func scratch(value: UInt32) {
        port.write(Port.scratch, value)
        #expect(port.read(Port.scratch) == value)
    }

    @Test("with DLAB set, offsets 0 and 1 are the divisor, and nothing is sent or enabled")
    func divisorLatch() {
        port.write(Port.lineControl, 0x83)
        port.write(Port.data, 0x34)
        port.write(Port.interruptEnable, 0x12)
        #expect(port.read(Port.data) == 0x34)
        #expect(port.read(Port.interruptEnable) == 0x12)
        port.write(Port.lineControl, 0x03)
        #expect(port.read(Port.interruptEnable) == 0)
        #expect(port.sent.take().isEmpty)
        #expect(port.levels.take().isEmpty)
    }

    @Test("a character written leaves at once and the transmitter is empty again")
    func transmit() {
        for byte in "hello".utf8 { port.write(Port.data, UInt32(byte)) }
        #expect(port.sent.take() == Array("hello".utf8))
        #expect(port.read(Port.lineStatus) == 0x60)
    }

    @Test("without FIFO one character is accepted at a time")
    func holdingRegister() {
        #expect(port.uart.receive([1, 2, 3]) == 1)
        #expect(port.read(Port.lineStatus) == 0x61)
        #expect(port.uart.receive([2, 3]) == 0)
        #expect(port.read(Port.data) == 1)
        #expect(port.read(Port.lineStatus) == 0x60)
    }

    @Test("the FIFO accepts 16 characters and returns them in order")
    func fifo() {
        port.write(Port.identification, 0x01)
        #expect(port.uart.receive(Array(1...20)) == 16)
        #expect((1...16).map { _ in port.read(Port.data) } == Array(1...16))
        #expect(port.read(Port.lineStatus) == 0x60)
    }

    @Test("identification shows the FIFO bits only while FIFOs are enabled, and toggling them empties the receiver")
    func fifoEnable() {
        port.write(Port.identification, 0x01)
        #expect(port.read(Port.identification) == 0xc1)
        #expect(port.uart.receive([1, 2]) == 2)
        port.write(Port.identification, 0xc0)
        #expect(port.read(Port.identification) == 0x01)
        #expect(port.read(Port.lineStatus) == 0x60)
    }

    @Test("a receiver reset drops what was received and keeps the FIFO enabled")
    func receiverReset() {
        port.write(Port.identification, 0x01)
        #expect(port.uart.receive([1, 2]) == 2)
        port.write(Port.identification, 0x03)
        #expect(port.read(Port.lineStatus) == 0x60)
        #expect(port.uart.receive(Array(1...20)) == 16)
    }

    @Test("the sender hears of room once, and only after it was refused")
    func receiveRoom() {
        port.write(Port.identification, 0x01)
        #expect(port.uart.receive(Array(1...16)) == 16)
        _ = port.read(Port.data)
        #expect(port.rooms.take().isEmpty)
        #expect(port.uart.receive([17, 18]) == 1)
        #expect(port.rooms.take().isEmpty)
        _ = port.read(Port.data)
        _ = port.read(Port.data)
        #expect(port.rooms.take().count == 1)
    }

    @Test("a sender that answers at once from the room callback is no deadlock")
    func receiveFromCallback() {
        let sender = Recorder<UART16550>()
        let uart = UART16550(
            transmit: { _ in }, interrupt: { _ in },
            receiveRoom: { for uart in sender.take() { _ = uart.receive([7]) } })
        sender.record(uart)
        #expect(uart.receive([1, 2]) == 1)
        #expect(uart.read(port: 0x3f8, size: .byte) == 1)
        #expect(uart.read(port: 0x3f8, size: .byte) == 7)
    }
}

@Suite("UART interrupts")
struct UARTInterruptTests {
    private let port = Port()

    @Test("enabling the transmitter interrupt raises it, and reading the identification answers it")
    func transmitterEmpty() {
        port.write(Port.interruptEnable, 0x02)
        #expect(port.levels.take() == [true])
        #expect(port.read(Port.identification) == 0x02)
        #expect(port.levels.take() == [false])
        #expect(port.read(Port.identification) == 0x01)
    }

    @Test("each character sent makes a new edge, though the interrupt before it was not answered")
    func transmitterEdge() {
        port.write(Port.interruptEnable, 0x02)
        #expect(port.levels.take() == [true])
        port.write(Port.data, 0x41)
        #expect(port.levels.take() == [false, true])
    }

    @Test("received data holds the line until it is read")
    func receivedData() {
        port.write(Port.interruptEnable, 0x01)
        #expect(port.uart.receive([0x41]) == 1)
        #expect(port.levels.take() == [true])
        #expect(port.read(Port.identification) == 0x04)
        #expect(port.levels.take().isEmpty)
        #expect(port.read(Port.data) == 0x41)
        #expect(port.levels.take() == [false])
    }

    @Test(
        "characters below the trigger level count as timed out, from it on as received",
        arguments: [(0x01, 1), (0x41, 4), (0x81, 8), (0xc1, 14)] as [(UInt32, Int)])
    func triggerLevel(fifoControl: UInt32, level: Int) {
        port.write(Port.identification, fifoControl)
        port.write(Port.interruptEnable, 0x01)
        for count in 1...16 {
            #expect(port.uart.receive([0]) == 1)
            #expect(port.read(Port.identification) == (count < level ? 0xcc : 0xc4), "\(count) characters")
        }
        #expect(port.levels.take() == [true])
    }

    @Test("sources are reported by priority: line status, received data, transmitter, modem")
    func priorities() {
        // Loopback makes all four at once: two characters without FIFO overrun, and a modem line changes.
        port.write(Port.modemControl, 0x10)
        port.write(Port.data, 1)
        port.write(Port.data, 2)
        port.write(Port.interruptEnable, 0x0f)
        #expect(port.read(Port.identification) == 0x06)
        #expect(port.read(Port.lineStatus) == 0x63)
        #expect(port.read(Port.identification) == 0x04)
        #expect(port.read(Port.data) == 2)
        #expect(port.read(Port.identification) == 0x02)
        #expect(port.read(Port.identification) == 0x00)
        #expect(port.levels.take() == [true])
        _ = port.read(Port.modemStatus)
        #expect(port.read(Port.identification) == 0x01)
        #expect(port.levels.take() == [false])
    }

    @Test("identification does not answer a transmitter interrupt that it did not report")
    func maskedByPriority() {
        port.write(Port.interruptEnable, 0x03)
        #expect(port.uart.receive([1]) == 1)
        #expect(port.read(Port.identification) == 0x04)
        _ = port.read(Port.data)
        #expect(port.read(Port.identification) == 0x02)
    }

    @Test("disabling a source lowers the line")
    func disable() {
        port.write(Port.interruptEnable, 0x01)
        #expect(port.uart.receive([1]) == 1)
        port.write(Port.interruptEnable, 0x00)
        #expect(port.levels.take() == [true, false])
    }

    @Test("a reset lowers the line and empties the receiver")
    func reset() {
        port.write(Port.interruptEnable, 0x01)
        #expect(port.uart.receive([1]) == 1)
        port.uart.reset()
        #expect(port.levels.take() == [true, false])
        #expect(port.read(Port.lineStatus) == 0x60)
    }
}

@Suite("UART loopback")
struct UARTLoopbackTests {
    private let port = Port()

    @Test("characters come back and do not leave, and the line is disconnected")
    func characters() {
        port.write(Port.modemControl, 0x10)
        port.write(Port.data, 0x41)
        #expect(port.sent.take().isEmpty)
        #expect(port.uart.receive([1]) == 0)
        #expect(port.read(Port.data) == 0x41)
        port.write(Port.modemControl, 0x00)
        #expect(port.rooms.take().count == 1)
    }

    @Test(
        "control outputs appear as modem lines: DTR as DSR, RTS as CTS, OUT1 as RI, OUT2 as DCD",
        arguments: [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80)] as [(UInt32, UInt32)])
    func modemLines(output: UInt32, line: UInt32) {
        port.write(Port.modemControl, 0x10)
        _ = port.read(Port.modemStatus)
        port.write(Port.modemControl, 0x10 | output)
        // Of the ring indicator only the trailing edge is a change.
        let rising = line == 0x40 ? 0 : line >> 4
        #expect(port.read(Port.modemStatus) == line | rising)
        #expect(port.read(Port.modemStatus) == line)
        port.write(Port.modemControl, 0x10)
        #expect(port.read(Port.modemStatus) == line >> 4)
    }

    @Test("a full FIFO keeps what it has and reports an overrun once")
    func overrun() {
        port.write(Port.identification, 0x01)
        port.write(Port.modemControl, 0x10)
        for value in 1...17 { port.write(Port.data, UInt32(value)) }
        #expect(port.read(Port.lineStatus) == 0x63)
        #expect(port.read(Port.lineStatus) == 0x61)
        #expect((1...16).map { _ in port.read(Port.data) } == Array(1...16))
    }
}

@Suite("UART state")
struct UARTStateTests {
    /// A port in a state where no field has its power-on value.
    private func busyPort() -> Port {
        let port = Port()
        port.write(Port.identification, 0x81)
        port.write(Port.lineControl, 0x80)
        port.write(Port.data, 0x01)
        port.write(Port.interruptEnable, 0x02)
        port.write(Port.lineControl, 0x1b)
        port.write(Port.modemControl, 0x1b)
        for value in 1...17 { port.write(Port.data, UInt32(value)) }
        _ = port.read(Port.data)
        port.write(Port.scratch, 0x77)
        port.write(Port.interruptEnable, 0x0f)
        return port
    }

    @Test("the saved state has the documented layout")
    func layout() {
        let body = busyPort().uart.saveState()
        let fields: [UInt8] = [0x0f, 0x81, 0x1b, 0x1b, 0x77, 0x02, 0xb0, 0x01, 0x02, 0x01, 15]
        #expect(body == fields + Array(2...16) + [0])
    }

    @Test("a loaded port behaves as the saved one, and announces its line")
    func roundTrip() throws {
        let source = busyPort()
        let destination = Port()
        let body = source.uart.saveState()
        try destination.uart.loadState(body, version: 1)
        #expect(destination.uart.saveState() == body)
        #expect(destination.levels.take() == [true])
        let order: [UInt16] = [2, 5, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2, 6, 1, 3, 4, 7]
        #expect(order.map(destination.read) == order.map(source.read))
    }

    @Test("every body that is too short or too long is refused, and changes nothing", arguments: [0, 1, 10, 26, 28])
    func length(count: Int) {
        let port = Port()
        let before = port.uart.saveState()
        let body = Array((busyPort().uart.saveState() + [0]).prefix(count))
        #expect(throws: DeviceStateError.self) { try port.uart.loadState(body, version: 1) }
        #expect(port.uart.saveState() == before)
        #expect(port.levels.take().isEmpty)
    }

    @Test("another version is refused with one sentence that names the section")
    func version() {
        let port = Port()
        let error = #expect(throws: DeviceStateError.self) {
            try port.uart.loadState(port.uart.saveState(), version: 2)
        }
        #expect(error?.reason == .version(found: 2, known: 1))
        #expect(
            error?.description
                == "section godwit/uart instance 0: version 2 is not known, this Godwit reads version 1; "
                + "use the same Godwit on both sides")
    }

    @Test(
        "a field with an impossible value is refused",
        arguments: [(0, 0x10), (1, 0x02), (3, 0x20), (5, 0x01), (7, 0x02), (10, 17)] as [(Int, UInt8)])
    func impossible(position: Int, value: UInt8) {
        let port = busyPort()
        var body = port.uart.saveState()
        body[position] = value
        #expect(throws: DeviceStateError.self) { try port.uart.loadState(body, version: 1) }
    }

    @Test("more than one character without FIFO is refused")
    func fifoWithoutFIFO() {
        let port = busyPort()
        var body = port.uart.saveState()
        body[1] = 0
        let error = #expect(throws: DeviceStateError.self) { try port.uart.loadState(body, version: 1) }
        #expect(error?.reason == .impossible(field: "received-count", value: 15))
    }

    @Test("random bodies are loaded or refused, and what is loaded is saved unchanged but for the padding")
    func randomBodies() {
        var random = SeededRandom(seed: 0x5eed)
        let port = Port()
        var loads = 0
        for _ in 0..<20_000 {
            var body = busyPort().uart.saveState()
            for _ in 0..<Int.random(in: 1...2, using: &random) {
                body[Int.random(in: body.indices, using: &random)] = UInt8.random(in: 0...255, using: &random)
            }
            guard (try? port.uart.loadState(body, version: 1)) != nil else { continue }
            loads += 1
            let used = 11 + Int(body[10])
            #expect(port.uart.saveState().prefix(used) == body.prefix(used))
        }
        #expect(loads > 0)
    }
}
