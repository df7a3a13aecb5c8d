import Accelerator
import Devices
import GuestMemory
import Host
import Synchronization

/// What the guest finds outside RAM: the port bus and the BIOS services. Answers vCPU threads, several at once.
final class Board: Bus {
    let ports: PortBus
    let uart: UART16550
    let bios: BIOSServices
    private let memory: GuestMemory
    private let isDeaf = Atomic<Bool>(false)

    /// What devices ask of the machine.
    enum Request: Sendable {
        case reset
        case shutdown(exitStatus: Int32)
    }

    init(
        memory: GuestMemory, layout: RAMLayout, bootDiskImage: [UInt8], serial: SerialPort,
        interrupts: @escaping @Sendable (UInt32, Bool) -> Void, request: @escaping @Sendable (Request) -> Void
    ) throws(MachineError) {
        self.memory = memory
        let console: ByteSink = { serial.transmit($0) }
        let uart = UART16550(
            transmit: console, interrupt: { interrupts(UART16550.com1IRQ, $0) }, receiveRoom: { serial.receiveRoom() })
        self.uart = uart
        serial.connect { uart.receive($0) }
        do {
            let disk = try BootDisk(image: bootDiskImage)
            bios = BIOSServices(bootDisk: disk, memoryMap: layout.e820, console: console)
            ports = try PortBus([
                uart,
                SystemControlPortA { request(.reset) },
                KeyboardController { request(.reset) },
                DebugExit { request(.shutdown(exitStatus: Int32(truncatingIfNeeded: $0))) },
                DebugConsole(sink: console),
            ])
        } catch {
            throw MachineError("\(error)")
        }
    }

    /// Everything whose state travels.
    var devices: [any MigratableDevice] { ports.devices + [bios.bootDisk] }

    func reset() {
        ports.reset()
        bios.bootDisk.reset()
    }

    /// What vCPUs want of it from here on comes to nothing.
    func becomeDeaf() { isDeaf.store(true, ordering: .sequentiallyConsistent) }

    // MARK: Bus

    func portRead(_ port: UInt16, size: Int, from cpu: any VirtualCPU) -> UInt32 {
        guard !isDeaf.load(ordering: .acquiring), let size = PortAccessSize(rawValue: UInt8(size)) else { return .max }
        return ports.read(port: port, size: size)
    }

    func portWrite(_ port: UInt16, size: Int, value: UInt32, from cpu: any VirtualCPU) {
        guard !isDeaf.load(ordering: .acquiring) else { return }
        if let interrupt = BIOSImage.interrupt(hypercallPort: port) {
            serveBIOS(interrupt, cpu)
            return
        }
        guard let size = PortAccessSize(rawValue: UInt8(size)) else { return }
        ports.write(port: port, size: size, value: value)
    }

    /// By the memory tree: a device, memory that was not shown at the moment or not for writing, or nothing, where reads float high.
    func memoryRead(_ address: GuestPhysicalAddress, size: Int) -> UInt64 {
        isDeaf.load(ordering: .acquiring) ? .max : memory.guestRead(address, byteCount: size)
    }

    func memoryWrite(_ address: GuestPhysicalAddress, size: Int, value: UInt64) {
        guard !isDeaf.load(ordering: .acquiring) else { return }
        memory.guestWrite(address, byteCount: size, value: value)
    }

    /// A stub's `out` stands in the middle of an instruction: finish it before the registers are looked at.
    private func serveBIOS(_ interrupt: UInt8, _ cpu: any VirtualCPU) {
        cpu.completePendingAccess(self)
        guard var all = try? cpu.registers() else { return }
        var registers = BIOSRegisters()
        registers.eax = UInt32(truncatingIfNeeded: all.rax)
        registers.ebx = UInt32(truncatingIfNeeded: all.rbx)
        registers.ecx = UInt32(truncatingIfNeeded: all.rcx)
        registers.edx = UInt32(truncatingIfNeeded: all.rdx)
        registers.esi = UInt32(truncatingIfNeeded: all.rsi)
        registers.edi = UInt32(truncatingIfNeeded: all.rdi)
        registers.esp = UInt32(truncatingIfNeeded: all.rsp)
        (registers.ds, registers.es, registers.ss) = (all.ds, all.es, all.ss)
        bios.handle(interrupt: interrupt, registers: &registers, memory: GuestMemoryForBIOS(memory: memory))
        (all.rax, all.rbx) = (UInt64(registers.eax), UInt64(registers.ebx))
        (all.rcx, all.rdx) = (UInt64(registers.ecx), UInt64(registers.edx))
        (all.rsi, all.rdi) = (UInt64(registers.esi), UInt64(registers.edi))
        // Registers that could be read just before can be written: the vCPU is ours, on this thread.
        try? cpu.setRegisters(all)
    }
}

/// Guest memory as BIOS services use it; writes are recorded for a running migration.
private struct GuestMemoryForBIOS: BIOSMemory {
    let memory: GuestMemory

    func read(at address: UInt64, count: Int) -> [UInt8]? {
        try? memory.read(at: GuestPhysicalAddress(address), count: count)
    }

    func write(_ bytes: ArraySlice<UInt8>, at address: UInt64) -> Bool {
        (try? memory.write(Array(bytes), at: GuestPhysicalAddress(address))) != nil
    }
}
