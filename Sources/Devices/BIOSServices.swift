/// Serves the BIOS calls of real-mode guests: enough for a boot sector to load itself and to find its memory.
///
/// When a vCPU writes to one of `BIOSImage`'s hypercall ports, the machine reads its registers, calls
/// `handle(interrupt:registers:memory:)`, and writes the registers back. Carry and zero flags are returned in the
/// FLAGS image that the `int` instruction pushed. A guest can write to the ports in any mode: it gets what its
/// registers say, within its own memory. Safe to call from several threads.
///
/// What the calls mean is common knowledge of PC programming, collected in Ralf Brown's interrupt list.
public final class BIOSServices: Sendable {
    /// The disk behind INT 13h; it migrates as a section of its own, and nothing else here has state.
    public let bootDisk: BootDisk
    let memoryMap: [E820Entry]
    let console: ByteSink

    /// - Parameters:
    ///   - bootDisk: the drive 80h, empty for none.
    ///   - memoryMap: what INT 15h reports.
    ///   - console: takes what INT 10h prints and INT 14h sends.
    public init(bootDisk: BootDisk, memoryMap: [E820Entry], console: @escaping ByteSink) {
        self.bootDisk = bootDisk
        self.memoryMap = memoryMap
        self.console = console
    }

    /// The flags a service returns; nil leaves the caller's.
    struct Flags: Equatable {
        var carry: Bool?
        var zero: Bool?

        static let unchanged = Flags()
        static let success = Flags(carry: false)
        static let failure = Flags(carry: true)
    }

    /// The status in AH for a function that the BIOS does not have.
    static let unsupportedFunction: UInt8 = 0x86

    /// Serves one call: changes `registers` to what the service returns, and the FLAGS image at SS:SP+4.
    ///
    /// Interrupts that are not served return with nothing changed.
    public func handle(interrupt: UInt8, registers: inout BIOSRegisters, memory: some BIOSMemory) {
        var flags = Flags.unchanged
        switch interrupt {
        case 0x10: video(&registers)
        case 0x11: registers.ax = BIOSImage.equipment
        case 0x12: registers.ax = BIOSImage.conventionalKiB
        case 0x13: flags = disk(&registers, memory)
        case 0x14: serial(&registers)
        case 0x15: flags = system(&registers, memory)
        case 0x16: flags = keyboard(&registers)
        case 0x1a: flags = clock(&registers)
        default: return
        }
        returnFlags(flags, registers, memory)
    }

    /// INT 10h: teletype output goes to the console; the rest pretends a text screen of 80 columns, cursor at 0,0.
    private func video(_ registers: inout BIOSRegisters) {
        switch registers.ah {
        case 0x03:
            registers.cx = 0x0607
            registers.dx = 0
        case 0x0e: console(registers.al)
        case 0x0f:
            registers.ax = 80 << 8 | 0x03
            registers.bh = 0
        default: break
        }
    }

    /// INT 14h: sends through the console; nothing is ever received.
    private func serial(_ registers: inout BIOSRegisters) {
        let transmitterEmpty: UInt8 = 0x60
        let timeout: UInt8 = 0x80
        switch registers.ah {
        case 0x01:
            console(registers.al)
            registers.ah = transmitterEmpty
        case 0x02: registers.ah = timeout
        case 0x00, 0x03: registers.ax = UInt16(transmitterEmpty) << 8 | UInt16(UARTRegisters.ModemStatus.connected)
        default: break
        }
    }

    /// INT 16h: there are no keys. A guest that waits for one gets the null key at once, and the VMM never hangs.
    private func keyboard(_ registers: inout BIOSRegisters) -> Flags {
        switch registers.ah {
        case 0x00, 0x10:
            registers.ax = 0
            return .unchanged
        case 0x01, 0x11: return Flags(zero: true)
        case 0x02, 0x12:
            registers.al = 0
            return .unchanged
        default: return .unchanged
        }
    }

    /// INT 1Ah: a tick count of zero that never passed midnight; there is no real-time clock.
    private func clock(_ registers: inout BIOSRegisters) -> Flags {
        guard registers.ah == 0x00 else { return .failure }
        registers.al = 0
        registers.cx = 0
        registers.dx = 0
        return .success
    }

    private func returnFlags(_ flags: Flags, _ registers: BIOSRegisters, _ memory: some BIOSMemory) {
        guard flags != .unchanged else { return }
        // The `int` pushed FLAGS, CS and IP; the stack pointer wraps within its segment.
        let address = BIOSRegisters.address(registers.ss, registers.esp &+ 4)
        guard var image = memory.read(at: address, count: 1), image.count == 1 else { return }
        func edit(_ bit: UInt8, _ value: Bool?) {
            guard let value else { return }
            image[0] = value ? image[0] | bit : image[0] & ~bit
        }
        edit(0x01, flags.carry)
        edit(0x40, flags.zero)
        // A stack outside RAM gets no flags; the guest's `iret` will fail by itself.
        _ = memory.write(image[...], at: address)
    }
}
