import Devices
import Testing

/// A BIOS with a boot disk, memory and a stack, as a boot sector finds it.
struct BIOSMachine {
    static let carry: UInt8 = 0x01
    static let zero: UInt8 = 0x40
    /// Where `int` has pushed FLAGS: SS:SP+4.
    static let flagsAddress = 0x6ffe

    let printed = Recorder<UInt8>()
    let memory: TestMemory
    let bios: BIOSServices

    init(image: [UInt8] = [], memoryMap: [E820Entry] = [], memoryBytes: Int = 1 << 20) throws {
        memory = TestMemory(byteCount: memoryBytes)
        bios = BIOSServices(bootDisk: try BootDisk(image: image), memoryMap: memoryMap) { [printed] in
            printed.record($0)
        }
    }

    /// Calls an interrupt with `flags` in the FLAGS image; returns the registers and that image afterwards.
    func call(
        _ interrupt: UInt8, flags: UInt8 = 0x00, _ prepare: (inout BIOSRegisters) -> Void
    ) -> (registers: BIOSRegisters, flags: UInt8) {
        var registers = BIOSRegisters()
        registers.esp = 0x6ffa
        prepare(&registers)
        _ = memory.write([flags], at: UInt64(Self.flagsAddress))
        bios.handle(interrupt: interrupt, registers: &registers, memory: memory)
        return (registers, memory.bytes[Self.flagsAddress])
    }

    /// Writes little-endian integers of the given sizes at `address`.
    func place(_ fields: [(value: UInt64, bytes: Int)], at address: UInt64) {
        let bytes = fields.flatMap { field in
            (0..<field.bytes).map { UInt8(truncatingIfNeeded: field.value >> UInt64(8 * $0)) }
        }
        _ = memory.write(bytes[...], at: address)
    }

    /// Reads a little-endian integer.
    func integer(at address: Int, bytes: Int) -> UInt64 {
        memory.bytes[address..<address + bytes].reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }
}

/// `count` sectors, each filled with its number plus one.
private func numberedSectors(_ count: Int) -> [UInt8] {
    (0..<count).flatMap { [UInt8](repeating: UInt8(truncatingIfNeeded: $0 + 1), count: 512) }
}

@Suite("INT 13h")
struct BIOSDiskTests {
    private let machine: BIOSMachine

    init() throws {
        machine = try BIOSMachine(image: numberedSectors(100))
    }

    private func chs(
        function: UInt8 = 0x02, count: UInt8, cylinder: Int = 0, head: UInt8 = 0, sector: UInt8, es: UInt16 = 0x1000,
        bx: UInt16 = 0, drive: UInt8 = 0x80
    ) -> (registers: BIOSRegisters, flags: UInt8) {
        machine.call(0x13) {
            $0.ah = function
            $0.al = count
            $0.ch = UInt8(cylinder & 0xff)
            $0.cl = UInt8(cylinder >> 8) << 6 | sector
            $0.dh = head
            $0.dl = drive
            $0.es = es
            $0.bx = bx
        }
    }

    private func lba(
        function: UInt8 = 0x42, size: UInt64 = 16, count: UInt64, buffer: UInt64 = 0x1000_0000, first: UInt64
    ) -> (registers: BIOSRegisters, flags: UInt8) {
        machine.place([(size, 2), (count, 2), (buffer, 4), (first, 8)], at: 0x50010)
        return machine.call(0x13) {
            $0.ah = function
            $0.dl = 0x80
            $0.ds = 0x5000
            $0.esi = 0xabcd_0010
        }
    }

    @Test("sectors are read by cylinder, head and sector to ES:BX")
    func readByGeometry() {
        let (registers, flags) = chs(count: 3, head: 1, sector: 2, bx: 0x20)
        #expect(registers.ax == 3)
        #expect(flags & BIOSMachine.carry == 0)
        // Head 1, sector 2 is sector number 64, whose bytes are 65.
        for sector in 0..<3 {
            #expect(machine.memory.bytes[0x10020 + 512 * sector] == UInt8(65 + sector))
            #expect(machine.memory.bytes[0x10020 + 512 * sector + 511] == UInt8(65 + sector))
        }
        #expect(machine.memory.bytes[0x1001f] == 0)
        #expect(machine.memory.bytes[0x10020 + 3 * 512] == 0)
    }

    @Test("a read by sector number goes to the buffer of its packet")
    func readByNumber() {
        let (registers, flags) = lba(count: 2, buffer: 0x1234_0008, first: 98)
        #expect(registers.ah == 0)
        #expect(flags & BIOSMachine.carry == 0)
        #expect(machine.memory.bytes[0x12348..<0x12348 + 1024].elementsEqual(numberedSectors(100).suffix(1024)))
        #expect(machine.memory.bytes[0x12347] == 0)
        #expect(machine.memory.bytes[0x12348 + 1024] == 0)
        #expect(machine.integer(at: 0x50012, bytes: 2) == 2)
    }

    @Test(
        "a read that the disk does not have in full reads nothing, and says that a sector was not found",
        arguments: [(1, 100), (2, 99), (101, 0), (0xffff, 99), (1, UInt64.max), (2, UInt64.max)] as [(UInt64, UInt64)])
    func beyondByNumber(count: UInt64, first: UInt64) {
        let (registers, flags) = lba(count: count, first: first)
        #expect(registers.ah == 0x04)
        #expect(flags & BIOSMachine.carry != 0)
        #expect(machine.memory.bytes[0x10000..<0x10200].allSatisfy { $0 == 0 })
        #expect(machine.integer(at: 0x50012, bytes: 2) == 0)
    }

    @Test(
        "a geometry that the disk does not have is refused",
        arguments: [(1, 0, 0, 0), (1, 0, 16, 1), (1, 1, 0, 1), (1, 1023, 0, 1), (38, 0, 1, 1), (255, 0, 0, 1)]
            as [(UInt8, Int, UInt8, UInt8)])
    func beyondByGeometry(count: UInt8, cylinder: Int, head: UInt8, sector: UInt8) {
        let (registers, flags) = chs(count: count, cylinder: cylinder, head: head, sector: sector)
        #expect(registers.ax == 0x0400)
        #expect(flags & BIOSMachine.carry != 0)
        #expect(machine.memory.bytes[0x10000..<0x10200].allSatisfy { $0 == 0 })
    }

    @Test("the last sector is there")
    func lastSector() {
        #expect(chs(count: 37, head: 1, sector: 1).registers.ax == 37)
        #expect(lba(count: 100, first: 0).registers.ah == 0)
    }

    @Test("a buffer, packet or result outside RAM is refused and nothing is written")
    func outsideRAM() throws {
        let before = machine.memory.bytes[0x10000...]
        #expect(chs(count: 100, sector: 1, es: 0xffff, bx: 0xffff).registers.ah == 0x09)
        #expect(chs(count: 2, sector: 1, es: 0xffff, bx: 0).registers.ah == 0x09)
        #expect(lba(count: 1, buffer: 0xffff_ffff, first: 0).registers.ah == 0x09)
        #expect(machine.memory.bytes[0x10000..<0x50000] == before[0x10000..<0x50000])
        for function in [0x42, 0x44, 0x48] as [UInt8] {
            let (registers, flags) = machine.call(0x13) {
                $0.ah = function
                $0.dl = 0x80
                $0.ds = 0xffff
                $0.esi = 0xfff8
            }
            #expect(registers.ah == 0x09)
            #expect(flags & BIOSMachine.carry != 0)
        }
    }

    @Test("a packet that is too short for its fields is refused")
    func shortPacket() {
        #expect(lba(size: 15, count: 1, first: 0).registers.ah == 0x01)
    }

    @Test("verifying finds what reading would, and copies nothing")
    func verify() {
        #expect(chs(function: 0x04, count: 37, head: 1, sector: 1).registers.ah == 0)
        #expect(chs(function: 0x04, count: 38, head: 1, sector: 1).registers.ah == 0x04)
        #expect(lba(function: 0x44, count: 100, first: 0).registers.ah == 0)
        #expect(lba(function: 0x44, count: 101, first: 0).registers.ah == 0x04)
        #expect(machine.memory.bytes[0x10000..<0x10200].allSatisfy { $0 == 0 })
    }

    @Test("the disk is write-protected", arguments: [0x03, 0x05, 0x43] as [UInt8])
    func writes(function: UInt8) {
        let (registers, flags) = chs(function: function, count: 1, sector: 1)
        #expect(registers.ah == 0x03)
        #expect(flags & BIOSMachine.carry != 0)
        #expect(machine.bios.bootDisk.sectors(from: 0, count: 100)?.elementsEqual(numberedSectors(100)) == true)
    }

    @Test("there is no other drive", arguments: [0x00, 0x02, 0x08, 0x41, 0x42, 0x48] as [UInt8])
    func otherDrives(function: UInt8) throws {
        for drive in [0x00, 0x01, 0x81, 0xff] as [UInt8] {
            let (registers, flags) = chs(function: function, count: 1, sector: 1, drive: drive)
            #expect(registers.ah == 0x01)
            #expect(flags & BIOSMachine.carry != 0)
        }
        let diskless = try BIOSMachine()
        let (registers, flags) = diskless.call(0x13) {
            $0.ah = function
            $0.dl = 0x80
        }
        #expect(registers.ah == 0x01)
        #expect(flags & BIOSMachine.carry != 0)
    }

    @Test(
        "success clears the carry flag and failure sets it, and the other flags stay",
        arguments: [0x00, 0xff] as [UInt8])
    func flags(flags: UInt8) {
        let success = machine.call(0x13, flags: flags) { $0.dl = 0x80 }
        #expect(success.flags == flags & ~BIOSMachine.carry)
        let failure = machine.call(0x13, flags: flags) { $0.dl = 0x81 }
        #expect(failure.flags == flags | BIOSMachine.carry)
    }

    @Test("function 01h reports the status of the call before it")
    func lastStatus() {
        _ = lba(count: 1, first: 100)
        let failed = chs(function: 0x01, count: 0, sector: 0)
        #expect(failed.registers.ah == 0x04)
        #expect(failed.flags & BIOSMachine.carry != 0)
        _ = chs(function: 0x00, count: 0, sector: 0)
        let reset = chs(function: 0x01, count: 0, sector: 0)
        #expect(reset.registers.ah == 0x00)
        #expect(reset.flags & BIOSMachine.carry == 0)
    }

    @Test("the reported geometry covers the disk and addresses it right")
    func geometry() {
        let (registers, flags) = chs(function: 0x08, count: 0, sector: 0)
        #expect(flags & BIOSMachine.carry == 0)
        #expect(registers.dl == 1)
        let sectorsPerTrack = Int(registers.cl & 0x3f)
        let heads = Int(registers.dh) + 1
        let cylinders = Int(registers.ch) + Int(registers.cl & 0xc0) << 2 + 1
        #expect(cylinders * heads * sectorsPerTrack >= BootDisk.maximumBytes / 512)
        for number in [0, 1, 62, 63, 64, 99] {
            let (cylinder, track) = (number / (heads * sectorsPerTrack), number / sectorsPerTrack)
            _ = chs(
                count: 1, cylinder: cylinder, head: UInt8(track % heads), sector: UInt8(number % sectorsPerTrack + 1))
            #expect(machine.memory.bytes[0x10000] == UInt8(number + 1))
        }
    }

    @Test("drive 80h is a hard disk with its number of sectors")
    func driveType() {
        let (registers, flags) = chs(function: 0x15, count: 0, sector: 0)
        #expect(registers.ah == 3)
        #expect(registers.cx == 0)
        #expect(registers.dx == 100)
        #expect(flags & BIOSMachine.carry == 0)
        #expect(chs(function: 0x15, count: 0, sector: 0, drive: 0).registers.ah == 0)
    }

    @Test("the extensions are announced to those who ask with the signature")
    func extensions() {
        func ask(_ bx: UInt16) -> (registers: BIOSRegisters, flags: UInt8) {
            chs(function: 0x41, count: 0, sector: 0, bx: bx)
        }
        let present = ask(0x55aa)
        #expect(present.registers.bx == 0xaa55)
        #expect(present.registers.cx & 1 == 1)
        #expect(present.flags & BIOSMachine.carry == 0)
        #expect(ask(0x55ab).flags & BIOSMachine.carry != 0)
    }

    @Test("extended parameters fill 26 bytes, and a shorter buffer is refused")
    func extendedParameters() {
        func ask(bufferBytes: UInt64) -> (registers: BIOSRegisters, flags: UInt8) {
            machine.place([(bufferBytes, 2), (UInt64.max, 8), (.max, 8), (.max, 8), (.max, 8)], at: 0x50000)
            return machine.call(0x13) {
                $0.ah = 0x48
                $0.dl = 0x80
                $0.ds = 0x5000
            }
        }
        #expect(ask(bufferBytes: 25).registers.ah == 0x01)
        let (registers, flags) = ask(bufferBytes: 30)
        #expect(registers.ah == 0)
        #expect(flags & BIOSMachine.carry == 0)
        #expect(machine.integer(at: 0x50000, bytes: 2) == 26)
        #expect(machine.integer(at: 0x50010, bytes: 8) == 100)
        #expect(machine.integer(at: 0x50018, bytes: 2) == 512)
        #expect(machine.memory.bytes[0x5001a] == 0xff)
    }
}

@Suite("boot disk")
struct BootDiskTests {
    @Test("an image is padded with zeros to whole sectors", arguments: [(0, 0), (1, 1), (512, 1), (513, 2)])
    func padding(bytes: Int, sectors: Int) throws {
        let disk = try BootDisk(image: [UInt8](repeating: 0xee, count: bytes))
        #expect(disk.sectorCount == sectors)
        let contents = try #require(disk.sectors(from: 0, count: sectors))
        #expect(contents.elementsEqual((0..<sectors * 512).map { $0 < bytes ? 0xee : 0 }))
    }

    @Test("480 KiB fit and one byte more is refused")
    func limit() throws {
        #expect(try BootDisk(image: [UInt8](repeating: 0, count: 491_520)).sectorCount == 960)
        #expect(throws: BootDiskError.tooLarge(bytes: 491_521)) {
            try BootDisk(image: [UInt8](repeating: 0, count: 491_521))
        }
    }

    @Test("a range is there in full or not at all")
    func ranges() throws {
        let disk = try BootDisk(image: numberedSectors(3))
        #expect(disk.sectors(from: 2, count: 1)?.first == 3)
        #expect(disk.sectors(from: 3, count: 0)?.isEmpty == true)
        #expect(disk.sectors(from: 2, count: 2) == nil)
        #expect(disk.sectors(from: 4, count: 0) == nil)
        #expect(disk.sectors(from: .max, count: 1) == nil)
        #expect(disk.sectors(from: 1, count: .max) == nil)
        #expect(disk.sectors(from: 1, count: -1) == nil)
    }

    @Test("the contents and the last status migrate into a drive with another image")
    func roundTrip() throws {
        let source = try BIOSMachine(image: numberedSectors(3))
        _ = source.call(0x13) {
            $0.ah = 0x03; $0.dl = 0x80
        }
        let body = source.bios.bootDisk.saveState()
        #expect(body == [0, 0, 6, 0, 3] + numberedSectors(3))
        let destination = try BIOSMachine(image: [1])
        try destination.bios.bootDisk.loadState(body, version: 1)
        #expect(destination.bios.bootDisk.sectors(from: 2, count: 1)?.first == 3)
        #expect(destination.call(0x13) { $0.ah = 0x01 }.registers.ah == 0x03)
        destination.bios.bootDisk.reset()
        #expect(destination.call(0x13) { $0.ah = 0x01 }.registers.ah == 0x00)
        #expect(destination.bios.bootDisk.sectorCount == 3)
    }

    @Test(
        "a section whose length is wrong, too large or no multiple of a sector is refused",
        arguments: [
            [0, 0, 2, 0, 0], [0, 0, 0, 1, 0, 7], [0, 7, 0x82, 0, 0], [0xff, 0xff, 0xfe, 0, 0], [0, 0, 0, 0, 0, 0], [],
        ] as [[UInt8]])
    func refusal(body: [UInt8]) throws {
        let disk = try BootDisk(image: numberedSectors(1))
        let before = disk.saveState()
        #expect(throws: DeviceStateError.self) { try disk.loadState(body, version: 1) }
        #expect(throws: DeviceStateError.self) { try disk.loadState(before, version: 2) }
        #expect(disk.saveState() == before)
    }

    @Test("the largest disk migrates")
    func largest() throws {
        let body = try BootDisk(image: [UInt8](repeating: 0x5a, count: 491_520)).saveState()
        let destination = try BootDisk()
        try destination.loadState(body, version: 1)
        #expect(destination.sectorCount == 960)
        #expect(destination.sectors(from: 959, count: 1)?.last == 0x5a)
    }
}
