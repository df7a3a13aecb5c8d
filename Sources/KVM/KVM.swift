//! The KVM room: /dev/kvm, the virtual machine, its CPUs, its memory slots, and who wrote to them.
//!
//! `KVMAccelerator` is the summary: it opens the device, makes the machine and its slots, and implements `Accelerator`. A
//! `KVMVirtualCPU` runs the guest (`+Run`) and carries its state (`+State`). Source for every ioctl: the kernel's
//! Documentation/virt/kvm/api.rst.

public import Accelerator
import CLinux
import Glibc
public import GuestMemory
import Host

/// A virtual machine on /dev/kvm.
public final class KVMAccelerator: Accelerator {
    public let name = "kvm"
    public let cpus: [any VirtualCPU]
    /// The frequency of the guest's time stamp counter, in kHz.
    public let tscKilohertz: UInt64
    public let dirtyRateControl: (any DirtyRateControl)?
    let machine: Descriptor
    let slots: KVMSlots
    private let tracking: DirtyTracking
    private let throttle: VirtualCPUThrottle
    public let dirtyTracking: DirtyTrackingFacts
    /// The system's state after creation, to which a reset returns.
    let powerOn: [SystemState]

    /// Makes the machine: in-kernel interrupt controllers and timer, memory slots, virtual CPUs that have not run.
    ///
    /// - Parameter choice: log or ring; a machine has one of them for life.
    /// - Throws: `AcceleratorError`: no device, no permission, a capability missing, memory or CPUs refused.
    public init(
        memory: GuestMemory, cpuCount: Int, dirtyTracking choice: DirtyTrackingChoice = .automatic,
        slotStrategy: SlotStrategy = .atomic
    ) throws(AcceleratorError) {
        let system = try KVMSystem()
        let machine = try system.makeMachine()
        self.machine = machine
        let ringEntries = try choice.ringEntries(limit: system.ringLimit)
        if let ringEntries { try system.enableRings(machine, entryCount: ringEntries) }
        let slots = try KVMSlots(
            machine: machine, memory: memory, limit: system.slotLimit(machine), strategy: slotStrategy,
            shadowPaging: system.shadowPaging, granule: ringEntries.map { _ in KVMSlots.fineGranule(for: memory) })
        self.slots = slots
        try Self.addInterruptControllers(to: machine)
        let cpuid = try system.supportedCPUID()
        var msrs = try system.msrIndices()
        let sum = DirtyRingSum()
        var made: [KVMVirtualCPU] = []
        for index in 0..<cpuCount {
            let cpu = try KVMVirtualCPU(
                index: index, machine: machine, slots: slots, runByteCount: system.runByteCount,
                cpuid: cpuid.forCPU(index, of: cpuCount), msrs: msrs,
                rings: ringEntries.map { (entryCount: $0, sum: sum) })
            slots.hold.add(cpu)
            made.append(cpu)
            msrs = made[0].msrIndices
        }
        cpus = made
        throttle = VirtualCPUThrottle(made)
        tscKilohertz = try made[0].tscKilohertz()
        powerOn = try Self.systemState(of: machine)
        guard ringEntries != nil else {
            let mode = system.dirtyLogMode(machine)
            let log = DirtyLog(machine: machine, memory: memory, mode)
            dirtyTracking = DirtyTrackingFacts(method: "log", ringEntries: nil, protectsManually: mode == .manual)
            tracking = DirtyTracking(log, slots: slots, memory: memory)
            dirtyRateControl = nil
            return
        }
        dirtyTracking = DirtyTrackingFacts(method: "ring", ringEntries: ringEntries, protectsManually: false)
        let rings = DirtyRings(made.compactMap(\.ring), sum: sum, machine: machine, slots: slots, memory: memory)
        for cpu in made {
            if let ring = cpu.ring {
                cpu.whenResetIsDue = { [weak rings] () throws(SystemError) in try rings?.reset() }
                cpu.whenRingIsFull = { [weak rings, index = cpu.index] () throws(SystemError) in
                    try rings?.isFull(ring, of: index)
                }
            }
        }
        tracking = DirtyTracking(rings, slots: slots, memory: memory)
        let limiter = DirtyLimiter(rings, tracking: tracking, cpus: made)
        rings.limits = { [weak limiter] in limiter?.look(at: $0) }
        dirtyRateControl = limiter
    }

    public func dirtyTracker(for client: DirtyClient) -> any DirtyTracker { KVMDirtyTracker(tracking, for: client) }

    public func throttle(to percentage: Int) throws(AcceleratorError) { try throttle.set(percentage) }

    static func addInterruptControllers(to machine: Descriptor) throws(AcceleratorError) {
        // Three pages below the BIOS at the top of 4 GiB, out of the way of RAM; used on processors that need them.
        try kvm(gw_kvm_set_tss_addr(machine.number, 0xfffb_d000), "KVM_SET_TSS_ADDR")
        var identity: UInt64 = 0xfffb_c000
        try kvm(unsafe gw_kvm_set_identity_map_addr(machine.number, &identity), "KVM_SET_IDENTITY_MAP_ADDR")
        try kvm(gw_kvm_create_irqchip(machine.number, 0), "KVM_CREATE_IRQCHIP")
        var pit = kvm_pit_config()
        pit.flags = UInt32(KVM_PIT_SPEAKER_DUMMY)
        try kvm(unsafe gw_kvm_create_pit2(machine.number, &pit), "KVM_CREATE_PIT2")
    }

    public func setInterruptLine(_ line: UInt32, level: Bool) {
        var request = kvm_irq_level()
        request.irq = line
        request.level = level ? 1 : 0
        // The lines are the board's own and the controller is there: the call has no other way to fail.
        _ = unsafe gw_kvm_irq_line(machine.number, &request)
    }
}

/// The result of an ioctl of CLinux, or an `AcceleratorError` naming it.
@discardableResult
func kvm(_ result: CInt, _ call: String, remedy: String? = nil) throws(AcceleratorError) -> CInt {
    guard result < 0 else { return result }
    throw AcceleratorError(SystemError(call, code: -result, remedy: remedy).description)
}
