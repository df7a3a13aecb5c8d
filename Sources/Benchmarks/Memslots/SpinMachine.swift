import Accelerator
import GuestMemory
import GuestPrograms
import Host
import KVM
import Synchronization

/// vCPUs that run `SpinGuest` over guest memory whose layout changes; no devices, and nobody who gives up when a vCPU fails.
final class SpinMachine: Sendable {
    let memory: GuestMemory
    let accelerator: KVMAccelerator
    let guest: SpinGuest
    private let bus: MemoryBus
    private let threads = Mutex<[HostThread]>([])
    private let isEnding = Atomic<Bool>(false)
    /// What vCPUs could not go on with: a failed entry, or a triple fault.
    private let breakdowns = Mutex<[String]>([])

    /// - Precondition: the first block holds the guest's own memory, from address 0 on, whatever else changes.
    init(memory: GuestMemory, guest: SpinGuest, strategy: SlotStrategy) throws {
        self.memory = memory
        self.guest = guest
        let view = memory.view
        accelerator = try KVMAccelerator(memory: memory, cpuCount: guest.cpuCount, slotStrategy: strategy)
        try memory.addListener(accelerator.memoryListener, showing: view)
        bus = MemoryBus(memory: memory)
        for segment in guest.segments { try memory.write(segment.bytes, at: GuestPhysicalAddress(segment.address)) }
    }

    /// Lets all vCPUs run; returns when each has come to its loop.
    func start() throws {
        try HostThread.installInterruptSignal()
        for cpu in accelerator.cpus {
            try cpu.reset(to: .protected32(entry: SpinGuest.entryAddress, ebx: UInt32(cpu.index)))
        }
        for cpu in accelerator.cpus {
            let thread = try HostThread(name: "vcpu\(cpu.index)") { [self] in run(cpu) }
            threads.withLock { $0.append(thread) }
        }
        try wait("to start") { $0.isRunning && $0.rounds > 0 }
    }

    /// Has all vCPUs wait at the start of a round, so that what they count adds up.
    func park() throws {
        memory.guestWrite(GuestPhysicalAddress(SpinGuest.stopAddress), byteCount: 8, value: 1)
        try wait("to park") { $0.isParked }
    }

    func unpark() throws {
        memory.guestWrite(GuestPhysicalAddress(SpinGuest.stopAddress), byteCount: 8, value: 0)
        try wait("to go on") { $0.isRunning }
    }

    /// Ends the threads: nothing changes memory any more.
    func end() {
        isEnding.store(true, ordering: .sequentiallyConsistent)
        let threads = threads.withLock { $0 }
        for cpu in accelerator.cpus { cpu.kick() }
        threads.forEach { $0.join() }
    }

    /// By vCPU.
    var status: [SpinStatus] {
        (0..<guest.cpuCount).map { cpu in
            SpinStatus(
                memory.blocks[0].mapping.read(
                    at: Int(SpinGuest.statusAddress(cpu: cpu)), count: SpinGuest.statusByteCount))
        }
    }

    /// What guests and vCPUs complain of: how often, and the first in words.
    var failures: (count: UInt64, first: String?) {
        let status = status
        let broken = breakdowns.withLock { $0 }
        let count = status.reduce(UInt64(broken.count)) { $0 + $1.failures }
        return (count, status.compactMap(\.firstFailure).first ?? broken.first)
    }

    /// The longest time for which a vCPU outside did not run, in milliseconds; `nil` if none is outside.
    var longestGapMilliseconds: Double? {
        guest.outside.map { status[$0].longestGapTicks }.max().map { Double($0) / Double(accelerator.tscKilohertz) }
    }

    private func wait(_ what: String, until holds: (SpinStatus) -> Bool) throws {
        let deadline = Deadline.after(seconds: 60)
        while let late = status.firstIndex(where: { !holds($0) }) {
            guard !deadline.hasPassed else {
                let reason = failures.first.map { "; the first failure: \($0)" } ?? ""
                throw MemoryError("the spinning guest: vCPU \(late) took more than 60 seconds \(what)\(reason)")
            }
            Clock.sleep(nanoseconds: 500_000)
        }
    }

    private func run(_ cpu: any VirtualCPU) {
        while true {
            cpu.clearKick()
            if isEnding.load(ordering: .sequentiallyConsistent) { return cpu.completePendingAccess(bus) }
            switch cpu.run(bus) {
            case .handled, .interrupted: continue
            case .halted: breakDown("vcpu\(cpu.index) halted")
            case .failed(let sentence): breakDown(sentence)
            case .reset:
                breakDown("vcpu\(cpu.index): triple fault")
                do throws(AcceleratorError) {
                    try cpu.reset(to: .protected32(entry: SpinGuest.entryAddress, ebx: UInt32(cpu.index)))
                } catch { breakDown("vcpu\(cpu.index) after that: \(error)") }
            }
        }
    }

    private func breakDown(_ sentence: String) {
        breakdowns.withLock { $0.append(sentence) }
        // It will often be the same again until the memory is back.
        Clock.sleep(nanoseconds: 200_000)
    }
}

/// Answers what leaves guest memory as a machine's board does.
private final class MemoryBus: Bus {
    private let memory: GuestMemory

    init(memory: GuestMemory) { self.memory = memory }

    func portRead(_ port: UInt16, size: Int, from cpu: any VirtualCPU) -> UInt32 { .max }
    func portWrite(_ port: UInt16, size: Int, value: UInt32, from cpu: any VirtualCPU) {}
    func memoryRead(_ address: GuestPhysicalAddress, size: Int) -> UInt64 { memory.guestRead(address, byteCount: size) }
    func memoryWrite(_ address: GuestPhysicalAddress, size: Int, value: UInt64) {
        memory.guestWrite(address, byteCount: size, value: value)
    }
}
