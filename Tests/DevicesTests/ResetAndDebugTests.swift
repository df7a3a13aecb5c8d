import Devices
import Testing

@Suite("system control port A")
struct SystemControlPortATests {
    private let resets = Recorder<Void>()
    private var port: SystemControlPortA { SystemControlPortA { [resets] in resets.record(()) } }

    @Test("A20 reads as on at power-on and as written afterwards")
    func a20() {
        let port = port
        #expect(port.read(port: 0x92, size: .byte) == 0x02)
        port.write(port: 0x92, size: .byte, value: 0x00)
        #expect(port.read(port: 0x92, size: .byte) == 0x00)
        #expect(resets.take().isEmpty)
    }

    @Test("only the rising edge of bit 0 asks for a reset")
    func fastReset() {
        let port = port
        port.write(port: 0x92, size: .byte, value: 0x03)
        #expect(resets.take().count == 1)
        port.write(port: 0x92, size: .byte, value: 0x01)
        #expect(resets.take().isEmpty)
        port.reset()
        #expect(port.read(port: 0x92, size: .byte) == 0x02)
        port.write(port: 0x92, size: .byte, value: 0x01)
        #expect(resets.take().count == 1)
    }

    @Test("the register migrates, without a reset on arrival")
    func state() throws {
        let source = port
        source.write(port: 0x92, size: .byte, value: 0x01)
        _ = resets.take()
        let destination = port
        try destination.loadState(source.saveState(), version: 1)
        #expect(destination.read(port: 0x92, size: .byte) == 0x01)
        destination.write(port: 0x92, size: .byte, value: 0x01)
        #expect(resets.take().isEmpty)
        #expect(throws: DeviceStateError.self) { try destination.loadState([], version: 1) }
        #expect(throws: DeviceStateError.self) { try destination.loadState([0, 0], version: 1) }
        #expect(throws: DeviceStateError.self) { try destination.loadState([0], version: 0) }
    }
}

@Suite("keyboard controller")
struct KeyboardControllerTests {
    private let resets = Recorder<Void>()
    private let controller: KeyboardController

    init() {
        controller = KeyboardController { [resets] in resets.record(()) }
    }

    private func command(_ value: UInt32) { controller.write(port: 0x64, size: .byte, value: value) }
    private func data(_ value: UInt32) { controller.write(port: 0x60, size: .byte, value: value) }
    private var status: UInt32 { controller.read(port: 0x64, size: .byte) }
    private var answer: UInt32 { controller.read(port: 0x60, size: .byte) }

    @Test("pulses reset the machine exactly when they pulse bit 0", arguments: 0xf0...0xff as ClosedRange<UInt32>)
    func pulse(value: UInt32) {
        command(value)
        #expect(resets.take().count == (value & 1 == 0 ? 1 : 0))
    }

    @Test("the output port resets when its bit 0 goes low, and keeps A20 as written")
    func outputPort() {
        command(0xd0)
        #expect(answer == 0x03)
        command(0xd1)
        data(0x01)
        #expect(resets.take().isEmpty)
        command(0xd0)
        #expect(answer == 0x01)
        command(0xd1)
        data(0x02)
        #expect(resets.take().count == 1)
    }

    @Test(
        "self tests answer that all is well",
        arguments: [(0xaa, 0x55), (0xab, 0x00), (0xa9, 0x00)] as [(UInt32, UInt32)])
    func selfTest(value: UInt32, expected: UInt32) {
        command(value)
        #expect(status & 0x01 == 1)
        #expect(answer == expected)
        #expect(status & 0x01 == 0)
    }

    @Test("the self test sets the system flag")
    func systemFlag() {
        #expect(status & 0x04 == 0)
        command(0xaa)
        #expect(status & 0x04 != 0)
    }

    @Test("the status says whether the last write was a command, and that the input buffer is empty")
    func lastWrite() {
        command(0x20)
        #expect(status & 0x0a == 0x08)
        data(0x00)
        #expect(status & 0x0a == 0x00)
    }

    @Test("the command byte is kept, and enable and disable commands change its bits")
    func commandByte() {
        command(0x60)
        data(0x47)
        func byteAfter(_ value: UInt32) -> UInt32 {
            command(value)
            command(0x20)
            return answer
        }
        #expect([0xad, 0xa7, 0xae, 0xa8].map(byteAfter) == [0x57, 0x77, 0x67, 0x47])
    }

    @Test("data belongs to the command just before it, and otherwise to a keyboard that is not there")
    func strayData() {
        data(0x02)
        command(0xd1)
        command(0xae)
        data(0x00)
        #expect(resets.take().isEmpty)
        #expect(status & 0x01 == 0)
    }

    @Test("a state between a command and its data migrates")
    func state() throws {
        command(0xaa)
        command(0xd1)
        let arrivals = Recorder<Void>()
        let destination = KeyboardController { arrivals.record(()) }
        try destination.loadState(controller.saveState(), version: 1)
        #expect(destination.saveState() == [0x0c, 0x34, 0x03, 1, 0x55, 0xd1])
        #expect(destination.read(port: 0x64, size: .byte) == status)
        #expect(destination.read(port: 0x60, size: .byte) == 0x55)
        destination.write(port: 0x60, size: .byte, value: 0x02)
        #expect(arrivals.take().count == 1)
    }

    @Test(
        "a state that cannot be is refused",
        arguments: [
            [0x01, 0, 0, 0, 0, 0], [0, 0, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0xaa], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0],
        ] as [[UInt8]])
    func refusal(body: [UInt8]) {
        let before = controller.saveState()
        #expect(throws: DeviceStateError.self) { try controller.loadState(body, version: 1) }
        #expect(controller.saveState() == before)
    }
}

@Suite("debug ports")
struct DebugPortTests {
    @Test(
        "the exit status is odd: the value shifted left by one, plus one",
        arguments: [(0, 1), (0x10, 0x21), (0xffff_ffff, 0xffff_ffff)] as [(UInt32, UInt32)])
    func exitStatus(value: UInt32, status: UInt32) throws {
        let statuses = Recorder<UInt32>()
        let bus = try PortBus([DebugExit { statuses.record($0) }])
        bus.write(port: 0xf4, size: .dword, value: value)
        #expect(statuses.take() == [status])
    }

    @Test("the debug console prints bytes and answers with its port number")
    func console() {
        let bytes = Recorder<UInt8>()
        let console = DebugConsole { bytes.record($0) }
        console.write(port: 0xe9, size: .byte, value: 0x41)
        #expect(bytes.take() == [0x41])
        #expect(console.read(port: 0xe9, size: .byte) == 0xe9)
    }

    @Test("devices without state travel as empty sections, and refuse others")
    func state() throws {
        let devices: [any PortDevice] = [DebugExit { _ in }, DebugConsole { _ in }]
        for device in devices {
            #expect(device.saveState().isEmpty)
            try device.loadState([], version: 1)
            #expect(throws: DeviceStateError.self) { try device.loadState([0], version: 1) }
            #expect(throws: DeviceStateError.self) { try device.loadState([], version: 2) }
        }
    }
}
