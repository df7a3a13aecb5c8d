// INT 15h: how much memory there is, and the A20 gate, which is always open.
extension BIOSServices {
    private static let mebibyte: UInt64 = 1 << 20
    /// `SMAP`, the signature of E820h calls.
    private static let mapSignature: UInt32 = 0x534d_4150

    func system(_ registers: inout BIOSRegisters, _ memory: some BIOSMemory) -> Flags {
        switch registers.ax {
        case 0x2401: registers.ah = 0
        case 0x2402:  // the gate is open
            registers.ax = 1
            registers.cx = 0
        case 0x2403:  // keyboard controller and port 92h both drive the gate
            registers.ah = 0
            registers.bx = 3
        case 0xe801: extendedMemory(&registers)
        case 0xe820: return memoryMapEntry(&registers, memory)
        case _ where registers.ah == 0x86: registers.ah = 0  // wait: no time passes in the BIOS
        case _ where registers.ah == 0x88:
            // Callers expect at most 63 MiB here.
            registers.ax = UInt16(min(ramAboveFirstMebibyte, 63 * Self.mebibyte) >> 10)
        default:  // 2400h too: the gate cannot be closed
            registers.ah = Self.unsupportedFunction
            return .failure
        }
        return .success
    }

    /// The length of the RAM that begins at 1 MiB, up to the first hole.
    private var ramAboveFirstMebibyte: UInt64 {
        memoryMap.first { $0.base == Self.mebibyte && $0.kind == .ram }?.length ?? 0
    }

    /// AX=E801h: KiB from 1 MiB to 16 MiB, and blocks of 64 KiB from there to the first hole, each in two registers.
    private func extendedMemory(_ registers: inout BIOSRegisters) {
        let ram = ramAboveFirstMebibyte
        let below = min(ram, 15 * Self.mebibyte)
        registers.ax = UInt16(below >> 10)
        registers.bx = UInt16(clamping: (ram - below) >> 16)
        registers.cx = registers.ax
        registers.dx = registers.bx
    }

    /// AX=E820h: entry number EBX goes to ES:DI, 20 bytes; EBX becomes the number of the next one, 0 after the last.
    private func memoryMapEntry(_ registers: inout BIOSRegisters, _ memory: some BIOSMemory) -> Flags {
        let entryBytes: UInt32 = 20
        let index = Int(registers.ebx)
        guard registers.edx == Self.mapSignature, registers.ecx >= entryBytes, index < memoryMap.count else {
            registers.ah = Self.unsupportedFunction
            return .failure
        }
        let entry = memoryMap[index]
        var bytes: [UInt8] = []
        for (value, count) in [(entry.base, 8), (entry.length, 8), (UInt64(entry.kind.rawValue), 4)] {
            for byte in 0..<count { bytes.append(UInt8(truncatingIfNeeded: value >> UInt64(8 * byte))) }
        }
        guard memory.write(bytes[...], at: BIOSRegisters.address(registers.es, registers.edi)) else {
            registers.ah = Self.unsupportedFunction
            return .failure
        }
        registers.eax = Self.mapSignature
        registers.ebx = index + 1 < memoryMap.count ? UInt32(index + 1) : 0
        registers.ecx = entryBytes
        return .success
    }
}
