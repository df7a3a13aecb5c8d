/// The bytes of our minimal BIOS: what a boot sector finds in low memory and in the ROM at 0xf0000.
///
/// The ROM holds stubs of a few bytes and no logic. The stub of interrupt 1xh is `out 0xex, al; iret`: the VMM sees
/// the access to the hypercall port with the caller's registers untouched, serves the call (`BIOSServices`) and lets
/// the guest go on with `iret`. Hypercall ports are 8-bit ones, and the port names the interrupt, because every
/// register belongs to the caller.
///
/// All of it is ordinary RAM of the guest: it is written at boot and migrates with the rest of memory.
public enum BIOSImage {
    /// Where the ROM lies.
    public static let romAddress: UInt64 = 0xf0000
    /// Where the interrupt vector table lies.
    public static let vectorTableAddress: UInt64 = 0
    /// Where the BIOS data area lies.
    public static let dataAreaAddress: UInt64 = 0x400
    /// Conventional memory in KiB: 640 less the last KiB, which belongs to the BIOS.
    public static let conventionalKiB: UInt16 = 639
    /// INT 11h: one serial port, 80-column colour display, mathematics coprocessor.
    public static let equipment: UInt16 = 0x0222

    /// The interrupts that lead to `BIOSServices`.
    public static let servedInterrupts: [UInt8] = [0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x1a]

    /// The hypercall port of a served interrupt: 0xe0 to 0xe6, and 0xea.
    public static func hypercallPort(interrupt: UInt8) -> UInt16 { 0xe0 | UInt16(interrupt & 0x0f) }

    /// The interrupt that a write to `port` stands for, or nil when it is no hypercall port.
    public static func interrupt(hypercallPort port: UInt16) -> UInt8? {
        guard port & 0xfff0 == 0xe0 else { return nil }
        let interrupt = 0x10 | UInt8(port & 0x0f)
        return servedInterrupts.contains(interrupt) ? interrupt : nil
    }

    private static let romSegment: UInt16 = 0xf000

    /// Offsets in the ROM.
    private enum Stub {
        static let services: UInt16 = 0xe000
        static let interruptReturn: UInt16 = 0xe100
        static let endOfInterruptMaster: UInt16 = 0xe110
        static let endOfInterruptSlave: UInt16 = 0xe120
        static let haltLoop: UInt16 = 0xe130
        static let resetVector: UInt16 = 0xfff0
        static let modelByte: UInt16 = 0xfffe

        static func service(_ interrupt: UInt8) -> UInt16 { services + 4 * UInt16(interrupt & 0x0f) }
    }

    /// The 64 KiB ROM.
    public static let rom: [UInt8] = {
        var rom = [UInt8](repeating: 0, count: 0x10000)
        func place(_ code: [UInt8], at offset: UInt16) {
            rom.replaceSubrange(Int(offset)..<Int(offset) + code.count, with: code)
        }
        for interrupt in servedInterrupts {
            // out port, al; iret
            place([0xe6, UInt8(hypercallPort(interrupt: interrupt)), 0xcf], at: Stub.service(interrupt))
        }
        // iret
        place([0xcf], at: Stub.interruptReturn)
        // push ax; mov al, 0x20; out 0x20, al; pop ax; iret
        place([0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58, 0xcf], at: Stub.endOfInterruptMaster)
        // push ax; mov al, 0x20; out 0xa0, al; out 0x20, al; pop ax; iret
        place([0x50, 0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, 0x58, 0xcf], at: Stub.endOfInterruptSlave)
        // cli; 1: hlt; jmp 1b
        place([0xfa, 0xf4, 0xeb, 0xfd], at: Stub.haltLoop)
        // jmp 0xf000:haltLoop
        place([0xea] + littleEndian(Stub.haltLoop) + littleEndian(romSegment), at: Stub.resetVector)
        // The model byte of a PC/AT.
        place([0xfc], at: Stub.modelByte)
        return rom
    }()

    /// The 256 real-mode interrupt vectors, 1 KiB.
    ///
    /// Interrupt requests in their BIOS places (08h to 0Fh, 70h to 77h) are acknowledged and otherwise ignored; all
    /// that is not served returns at once.
    public static let vectorTable: [UInt8] = (UInt8.min...UInt8.max).flatMap { vector -> [UInt8] in
        let offset =
            switch vector {
            case _ where servedInterrupts.contains(vector): Stub.service(vector)
            case 0x08...0x0f: Stub.endOfInterruptMaster
            case 0x70...0x77: Stub.endOfInterruptSlave
            default: Stub.interruptReturn
            }
        return littleEndian(offset) + littleEndian(romSegment)
    }

    /// The BIOS data area, 256 bytes: the fields that guests read without asking the BIOS.
    public static func dataArea(hardDisks: UInt8) -> [UInt8] {
        var area = [UInt8](repeating: 0, count: 0x100)
        func place(_ bytes: [UInt8], at offset: Int) {
            area.replaceSubrange(offset..<offset + bytes.count, with: bytes)
        }
        place(littleEndian(UART16550.com1Base), at: 0x00)
        place(littleEndian(conventionalKiB * 64), at: 0x0e)  // segment of the extended BIOS data area
        place(littleEndian(equipment), at: 0x10)
        place(littleEndian(conventionalKiB), at: 0x13)
        place([0x03], at: 0x49)  // video mode
        place(littleEndian(80), at: 0x4a)  // columns
        place([hardDisks], at: 0x75)
        return area
    }

    private static func littleEndian(_ value: UInt16) -> [UInt8] {
        [UInt8(truncatingIfNeeded: value), UInt8(value >> 8)]
    }
}
