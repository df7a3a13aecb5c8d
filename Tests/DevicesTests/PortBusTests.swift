import Devices
import Testing

/// Answers every read with a fixed value, and records accesses.
private final class Probe: PortDevice {
    struct Access: Equatable {
        let port: UInt16
        let size: PortAccessSize
        var value: UInt32?
    }

    let name: String
    let sectionName = "test/probe"
    let instance: UInt32 = 0
    let stateVersion: UInt32 = 1
    let portRanges: [PortRange]
    let answer: UInt32
    let accesses = Recorder<Access>()
    let resets = Recorder<Void>()

    init(_ name: String, _ portRanges: PortRange..., answer: UInt32 = 0) {
        self.name = name
        self.portRanges = portRanges
        self.answer = answer
    }

    func read(port: UInt16, size: PortAccessSize) -> UInt32 {
        accesses.record(Access(port: port, size: size))
        return answer
    }

    func write(port: UInt16, size: PortAccessSize, value: UInt32) {
        accesses.record(Access(port: port, size: size, value: value))
    }

    func reset() { resets.record(()) }
    func saveState() -> [UInt8] { [] }
    func loadState(_ body: [UInt8], version: UInt32) throws(DeviceStateError) {}
}

@Suite("port bus")
struct PortBusTests {
    @Test(
        "an unclaimed port reads as all-ones of the access's width",
        arguments: [(.byte, 0xff), (.word, 0xffff), (.dword, 0xffff_ffff)] as [(PortAccessSize, UInt32)])
    func unclaimed(size: PortAccessSize, value: UInt32) throws {
        let bus = try PortBus([])
        for port in [0, 0x3f8, 0xfffe, 0xffff] as [UInt16] {
            #expect(bus.read(port: port, size: size) == value)
            bus.write(port: port, size: size, value: 0)
        }
    }

    @Test("an access reaches the device that claims the port, at both ends of its range and not beside it")
    func dispatch() throws {
        let first = Probe("first", PortRange(0x10...0x13), answer: 1)
        let second = Probe("second", PortRange(0x14...0x14), PortRange(0xffff...0xffff), answer: 2)
        let bus = try PortBus([first, second])
        let answers = [0x0f, 0x10, 0x13, 0x14, 0x15, 0xffff].map { bus.read(port: $0, size: .byte) }
        #expect(answers == [0xff, 1, 1, 2, 0xff, 2])
        bus.write(port: 0x12, size: .byte, value: 0x1ab)
        #expect(first.accesses.take().last == .init(port: 0x12, size: .byte, value: 0xab))
    }

    @Test("a wide access to 8-bit ports is split into bytes, low port first, across devices and holes")
    func split() throws {
        let low = Probe("low", PortRange(0x10...0x11), answer: 0x1a)
        let high = Probe("high", PortRange(0x12...0x12), answer: 0x2b)
        let bus = try PortBus([low, high])
        #expect(bus.read(port: 0x10, size: .dword) == 0xff2b_1a1a)
        _ = low.accesses.take()
        _ = high.accesses.take()
        bus.write(port: 0x10, size: .dword, value: 0x4433_2211)
        #expect(
            low.accesses.take() == [
                .init(port: 0x10, size: .byte, value: 0x11), .init(port: 0x11, size: .byte, value: 0x22),
            ])
        #expect(high.accesses.take() == [.init(port: 0x12, size: .byte, value: 0x33)])
    }

    @Test("an access that begins before a device reaches the ports of it that it covers")
    func straddle() throws {
        let device = Probe("device", PortRange(0x11...0x12), answer: 0x5c)
        #expect(try PortBus([device]).read(port: 0x10, size: .word) == 0x5cff)
    }

    @Test("a device of 32-bit ports takes wide accesses whole, unless they leave its range")
    func wide() throws {
        let device = Probe("device", PortRange(0xf4...0xf7, width: .dword))
        let bus = try PortBus([device])
        bus.write(port: 0xf4, size: .dword, value: 0x0102_0304)
        bus.write(port: 0xf6, size: .word, value: 0x0506)
        bus.write(port: 0xf7, size: .word, value: 0x0708)
        #expect(
            device.accesses.take() == [
                .init(port: 0xf4, size: .dword, value: 0x0102_0304), .init(port: 0xf6, size: .word, value: 0x0506),
                .init(port: 0xf7, size: .byte, value: 0x08),
            ])
    }

    @Test("an access past the last port does not wrap around to the first")
    func noWrap() throws {
        let device = Probe("device", PortRange(0...0), PortRange(0xffff...0xffff), answer: 0)
        let bus = try PortBus([device])
        #expect(bus.read(port: 0xffff, size: .word) == 0xff00)
        bus.write(port: 0xffff, size: .word, value: 0)
        #expect(device.accesses.take().allSatisfy { $0.port == 0xffff })
    }

    @Test("devices that claim the same port are refused by name")
    func overlap() {
        let error = #expect(throws: PortBusError.self) {
            try PortBus([Probe("first", PortRange(0x10...0x17)), Probe("second", PortRange(0x17...0x18))])
        }
        #expect(error?.description == "I/O port 0x17: claimed by first and by second")
    }

    @Test("255 ranges fit and one more is refused")
    func tooMany() throws {
        func devices(_ count: UInt16) -> [any PortDevice] { (0..<count).map { Probe("device", PortRange($0...$0)) } }
        #expect(try PortBus(devices(255)).read(port: 254, size: .byte) == 0)
        #expect(throws: PortBusError.tooManyRanges) { try PortBus(devices(256)) }
    }

    @Test("a reset reaches every device")
    func reset() throws {
        let devices = [Probe("first", PortRange(1...1)), Probe("second", PortRange(2...2))]
        try PortBus(devices).reset()
        #expect(devices.map { $0.resets.take().count } == [1, 1])
    }

    @Test("the devices of a PC and the BIOS's hypercall ports share the port space without overlap")
    func pc() throws {
        let bus = try PortBus([
            UART16550(transmit: { _ in }, interrupt: { _ in }), SystemControlPortA(requestReset: {}),
            KeyboardController(requestReset: {}), DebugExit(exit: { _ in }), DebugConsole(sink: { _ in }),
        ])
        for interrupt in BIOSImage.servedInterrupts {
            #expect(bus.read(port: BIOSImage.hypercallPort(interrupt: interrupt), size: .byte) == 0xff)
        }
        let sections = Set(bus.devices.map(\.sectionName))
        #expect(sections.count == bus.devices.count)
    }
}
