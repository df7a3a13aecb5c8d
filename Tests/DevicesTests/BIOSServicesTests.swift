import Devices
import TestSupport
import Testing

@Suite("BIOS services")
struct BIOSServicesTests {
    private static let map = [
        E820Entry(base: 0, length: 0x9fc00, kind: .ram),
        E820Entry(base: 0xf0000, length: 0x10000, kind: .reserved),
        E820Entry(base: 0x100000, length: 0xbff0_0000, kind: .ram),
        E820Entry(base: 0x1_0000_0000, length: 0x12_3456_7000, kind: .ram),
    ]
    private let machine: BIOSMachine

    init() throws {
        machine = try BIOSMachine(memoryMap: Self.map)
    }

    @Test("teletype output reaches the console and changes no register")
    func teletype() {
        for byte in "Hi\r\n".utf8 {
            let (registers, _) = machine.call(0x10) { $0.eax = 0x1234_0e00 | UInt32(byte) }
            #expect(registers.eax == 0x1234_0e00 | UInt32(byte))
        }
        #expect(machine.printed.take() == Array("Hi\r\n".utf8))
    }

    @Test("the screen is 80 columns of text with the cursor at home, and setting modes prints nothing")
    func screen() {
        #expect(machine.call(0x10) { $0.ah = 0x0f }.registers.ax == 0x5003)
        #expect(
            machine.call(0x10) {
                $0.ah = 0x03; $0.dx = 0x1234
            }.registers.dx == 0)
        for function in [0x00, 0x02, 0x06, 0x13] as [UInt8] {
            #expect(machine.call(0x10) { $0.ah = function }.registers.ah == function)
        }
        #expect(machine.printed.take().isEmpty)
    }

    @Test("conventional memory is 639 KiB, in the call as in the BIOS data area")
    func conventionalMemory() {
        #expect(machine.call(0x12) { $0.eax = 0xabcd_0000 }.registers.eax == 0xabcd_027f)
        let area = BIOSImage.dataArea(hardDisks: 1)
        #expect(area[0x13..<0x15] == [0x7f, 0x02])
        #expect(UInt16(area[0x10]) | UInt16(area[0x11]) << 8 == machine.call(0x11) { _ in }.registers.ax)
        #expect(area[0x00..<0x02] == [0xf8, 0x03])
        #expect(area[0x75] == 1)
    }

    @Test("E820h walks the whole map, entry by entry, to the end")
    func e820() {
        var found: [E820Entry] = []
        var continuation: UInt32 = 0
        repeat {
            let (registers, flags) = machine.call(0x15, flags: 0xff) {
                $0.eax = 0xe820
                $0.ebx = continuation
                $0.ecx = 24
                $0.edx = 0x534d_4150
                $0.es = 0x2000
                $0.edi = 0x100
            }
            #expect(flags == 0xff & ~BIOSMachine.carry)
            #expect(registers.eax == 0x534d_4150)
            #expect(registers.ecx == 20)
            let kind = E820Entry.Kind(rawValue: UInt32(machine.integer(at: 0x20110, bytes: 4)))
            found.append(
                E820Entry(
                    base: machine.integer(at: 0x20100, bytes: 8), length: machine.integer(at: 0x20108, bytes: 8),
                    kind: kind ?? .reserved))
            continuation = registers.ebx
        } while continuation != 0 && found.count < 10
        #expect(found == Self.map)
    }

    @Test(
        "E820h refuses a wrong signature, a short buffer, an entry past the end and a buffer outside RAM",
        arguments: [
            (0x534d_4151, 0, 20, 0x2000), (0x534d_4150, 0, 19, 0x2000), (0x534d_4150, 4, 20, 0x2000),
            (0x534d_4150, .max, 20, 0x2000), (0x534d_4150, 0, 20, 0xffff),
        ] as [(UInt32, UInt32, UInt32, UInt16)])
    func e820Refusal(signature: UInt32, index: UInt32, bufferBytes: UInt32, segment: UInt16) {
        let (registers, flags) = machine.call(0x15) {
            $0.eax = 0xe820
            $0.ebx = index
            $0.ecx = bufferBytes
            $0.edx = signature
            $0.es = segment
            $0.edi = 0xfff0
        }
        #expect(registers.ah == 0x86)
        #expect(flags & BIOSMachine.carry != 0)
    }

    @Test("E801h and 88h report the RAM above 1 MiB, within their ranges")
    func extendedMemory() throws {
        let (registers, _) = machine.call(0x15) { $0.ax = 0xe801 }
        // 3 GiB: 15 MiB in KiB, then (3072 - 16) MiB in blocks of 64 KiB.
        #expect(registers.ax == 15 * 1024)
        #expect(registers.bx == (3072 - 16) * 16)
        #expect(registers.cx == registers.ax)
        #expect(registers.dx == registers.bx)
        #expect(machine.call(0x15) { $0.ah = 0x88 }.registers.ax == 63 * 1024)

        let small = try BIOSMachine(memoryMap: [E820Entry(base: 0x100000, length: 0x300000, kind: .ram)])
        let answer = small.call(0x15) { $0.ax = 0xe801 }.registers
        #expect(answer.ax == 3 * 1024)
        #expect(answer.bx == 0)
        #expect(small.call(0x15) { $0.ah = 0x88 }.registers.ax == 3 * 1024)
        #expect(try BIOSMachine().call(0x15) { $0.ah = 0x88 }.registers.ax == 0)
    }

    @Test("the A20 gate is open and can be opened but not closed")
    func a20() {
        #expect(machine.call(0x15) { $0.ax = 0x2401 }.registers.ah == 0)
        #expect(machine.call(0x15) { $0.ax = 0x2402 }.registers.ax == 1)
        #expect(machine.call(0x15) { $0.ax = 0x2403 }.registers.bx == 3)
        let closing = machine.call(0x15) { $0.ax = 0x2400 }
        #expect(closing.registers.ah == 0x86)
        #expect(closing.flags & BIOSMachine.carry != 0)
    }

    @Test("a wait succeeds, and an unknown system function fails")
    func system() {
        #expect(machine.call(0x15, flags: 0xff) { $0.ah = 0x86 }.flags & BIOSMachine.carry == 0)
        let unknown = machine.call(0x15) { $0.ah = 0xc1 }
        #expect(unknown.registers.ah == 0x86)
        #expect(unknown.flags & BIOSMachine.carry != 0)
    }

    @Test("there is never a key: asking sets the zero flag, and waiting returns the null key")
    func keyboard() {
        #expect(machine.call(0x16, flags: 0x81) { $0.ah = 0x01 }.flags == 0xc1)
        #expect(machine.call(0x16) { $0.ax = 0x0000 }.registers.ax == 0)
        #expect(machine.call(0x16) { $0.ax = 0x1055 }.registers.ax == 0)
    }

    @Test("the clock stands at zero ticks")
    func clock() {
        let (registers, flags) = machine.call(0x1a, flags: 0xff) {
            $0.ecx = .max; $0.edx = .max; $0.al = 9
        }
        #expect(registers.al == 0)
        #expect(registers.cx == 0)
        #expect(registers.dx == 0)
        #expect(flags == 0xfe)
        #expect(machine.call(0x1a) { $0.ah = 0x02 }.flags & BIOSMachine.carry != 0)
    }

    @Test("serial output reaches the console, and serial input times out")
    func serial() {
        #expect(machine.call(0x14) { $0.ax = 0x0141 }.registers.ah & 0x80 == 0)
        #expect(machine.printed.take() == [0x41])
        #expect(machine.call(0x14) { $0.ah = 0x02 }.registers.ah & 0x80 != 0)
    }

    @Test("an interrupt that is not served changes nothing")
    func unserved() {
        let (registers, flags) = machine.call(0x21, flags: 0xa5) { $0.eax = 0x1234_5678 }
        #expect(registers.eax == 0x1234_5678)
        #expect(flags == 0xa5)
    }

    @Test("the stack pointer wraps within its segment, and a stack outside RAM is left alone")
    func stack() throws {
        _ = machine.memory.write([0xff], at: 0x30002)
        _ = machine.call(0x15) {
            $0.ah = 0x86
            $0.ss = 0x3000
            $0.esp = 0x1fffe
        }
        #expect(machine.memory.bytes[0x30002] == 0xfe)
        let (registers, _) = machine.call(0x15) {
            $0.ah = 0x86
            $0.ss = 0xffff
            $0.esp = 0xffff_ffff
        }
        #expect(registers.ah == 0)
        _ = machine.call(0x15) {
            $0.ah = 0x86; $0.ss = 0xffff; $0.esp = 0x8000
        }
    }

    @Test("no registers and no memory make a call trap or reach outside RAM")
    func randomCalls() throws {
        var random = SeededRandom(seed: 0xb105)
        let machine = try BIOSMachine(
            image: [UInt8](repeating: 0x42, count: 491_520), memoryMap: Self.map, memoryBytes: 0xa0000)
        for _ in 0..<20_000 {
            var registers = BIOSRegisters()
            registers.eax = UInt32.random(in: 0...UInt32.max, using: &random)
            registers.ebx = UInt32.random(in: 0...UInt32.max, using: &random)
            registers.ecx = UInt32.random(in: 0...UInt32.max, using: &random)
            registers.edx = UInt32.random(in: 0...UInt32.max, using: &random)
            registers.esi = UInt32.random(in: 0...UInt32.max, using: &random)
            registers.esp = UInt32.random(in: 0...UInt32.max, using: &random)
            registers.ds = UInt16.random(in: 0...UInt16.max, using: &random)
            registers.es = UInt16.random(in: 0...UInt16.max, using: &random)
            registers.ss = UInt16.random(in: 0...UInt16.max, using: &random)
            registers.ah = [0x01, 0x02, 0x04, 0x08, 0x15, 0x41, 0x42, 0x44, 0x48, 0xe8].randomElement(using: &random)!
            registers.dl = Bool.random(using: &random) ? 0x80 : registers.dl
            let stack = registers.esp
            let interrupt = BIOSImage.servedInterrupts.randomElement(using: &random)!
            machine.bios.handle(interrupt: interrupt, registers: &registers, memory: machine.memory)
            #expect(registers.esp == stack)
        }
        #expect(machine.memory.bytes.count == 0xa0000)
    }
}

@Suite("BIOS image")
struct BIOSImageTests {
    /// The code that interrupt `vector` leads to.
    private func code(_ vector: Int) -> ArraySlice<UInt8> {
        let table = BIOSImage.vectorTable
        let offset = Int(table[4 * vector]) | Int(table[4 * vector + 1]) << 8
        let segment = Int(table[4 * vector + 2]) | Int(table[4 * vector + 3]) << 8
        return BIOSImage.rom[(segment << 4 + offset - Int(BIOSImage.romAddress))...]
    }

    @Test("the ROM fills its 64 KiB and the table has 256 vectors")
    func sizes() {
        #expect(BIOSImage.rom.count == 0x10000)
        #expect(BIOSImage.vectorTable.count == 1024)
    }

    @Test("a served interrupt leads to a write to its hypercall port and back", arguments: BIOSImage.servedInterrupts)
    func served(interrupt: UInt8) {
        let code = code(Int(interrupt)).prefix(3)
        let port = BIOSImage.hypercallPort(interrupt: interrupt)
        #expect(code.elementsEqual([0xe6, UInt8(port), 0xcf]))
        #expect(BIOSImage.interrupt(hypercallPort: port) == interrupt)
    }

    @Test("every other interrupt returns, and hardware interrupts are acknowledged first")
    func others() {
        for vector in 0..<256 where !BIOSImage.servedInterrupts.contains(UInt8(vector)) {
            switch vector {
            case 0x08...0x0f: #expect(code(vector).prefix(7).elementsEqual([0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf]))
            case 0x70...0x77:
                #expect(code(vector).prefix(9).elementsEqual([0x50, 0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, 0x58, 0xcf]))
            default: #expect(code(vector).first == 0xcf)
            }
        }
    }

    @Test("no other port is a hypercall port")
    func ports() {
        let ports = (UInt16.min...UInt16.max).filter { BIOSImage.interrupt(hypercallPort: $0) != nil }
        #expect(ports == [0xe0, 0xe1, 0xe2, 0xe3, 0xe4, 0xe5, 0xe6, 0xea])
    }

    @Test("the reset vector jumps to a loop that halts with interrupts off")
    func resetVector() {
        let jump = BIOSImage.rom[0xfff0..<0xfff5]
        #expect(jump.first == 0xea)
        let target = Int(jump[0xfff1]) | Int(jump[0xfff2]) << 8
        #expect(jump[0xfff3...].elementsEqual([0x00, 0xf0]))
        #expect(BIOSImage.rom[target..<target + 4] == [0xfa, 0xf4, 0xeb, 0xfd])
    }
}
