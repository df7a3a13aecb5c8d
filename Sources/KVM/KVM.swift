//! The KVM room: /dev/kvm, the virtual machine, its CPUs, its memory slots and its dirty log.
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
    let machine: Descriptor
    let slots: KVMSlots
    private let makeTracker: @Sendable (DirtyClient) -> KVMDirtyLog
    /// The system's state after creation, to which a reset returns.
    let powerOn: [SystemState]

    /// Makes the machine: in-kernel interrupt controllers and timer, memory slots, virtual CPUs that have not run.
    ///
    /// - Throws: `AcceleratorError`: no device, no permission, a capability missing, memory or CPUs refused.
    public init(
        memory: GuestMemory, cpuCount: Int, slotStrategy: SlotStrategy = .atomic
    ) throws(AcceleratorError) {
        let system = try KVMSystem()
        machine = try system.makeMachine()
        let slots = try KVMSlots(
            machine: machine, memory: memory, limit: system.slotLimit(machine), strategy: slotStrategy,
            shadowPaging: system.shadowPaging)
        self.slots = slots
        try Self.addInterruptControllers(to: machine)
        let cpuid = try system.supportedCPUID()
        var msrs = try system.msrIndices()
        var made: [KVMVirtualCPU] = []
        for index in 0..<cpuCount {
            let cpu = try KVMVirtualCPU(
                index: index, machine: machine, slots: slots, runByteCount: system.runByteCount,
                cpuid: cpuid.forCPU(index, of: cpuCount), msrs: msrs)
            slots.hold.add(cpu)
            made.append(cpu)
            msrs = made[0].msrIndices
        }
        cpus = made
        tscKilohertz = try made[0].tscKilohertz()
        powerOn = try Self.systemState(of: machine)
        let (machine, mode, owner) = (machine, system.dirtyLogMode(machine), KVMDirtyLog.Owner())
        makeTracker = {
            KVMDirtyLog(machine: machine, slots: slots, memory: memory, mode, owner: owner, client: $0)
        }
    }

    public func dirtyTracker(for client: DirtyClient) -> any DirtyTracker { makeTracker(client) }

    public var dirtyRateControl: (any DirtyRateControl)? { nil }

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
