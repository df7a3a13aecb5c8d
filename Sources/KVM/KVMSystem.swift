import Accelerator
import CLinux
import Glibc
import Host

/// /dev/kvm: what this host's KVM can do.
struct KVMSystem {
    let device: Descriptor
    /// Size of the area shared with each virtual CPU, in bytes.
    let runByteCount: Int

    init() throws(AcceleratorError) {
        do throws(SystemError) {
            device = try Descriptor.open("/dev/kvm", O_RDWR)
        } catch {
            throw AcceleratorError(Self.explain(error))
        }
        let version = try kvm(gw_kvm_get_api_version(device.number, 0), "KVM_GET_API_VERSION")
        guard version == KVM_API_VERSION else {
            throw AcceleratorError(
                "/dev/kvm speaks version \(version), but \(KVM_API_VERSION) is needed; use another kernel")
        }
        runByteCount = Int(try kvm(gw_kvm_get_vcpu_mmap_size(device.number, 0), "KVM_GET_VCPU_MMAP_SIZE"))
        for (capability, what) in [
            (KVM_CAP_IRQCHIP, "in-kernel interrupt controllers"), (KVM_CAP_USER_MEMORY, "user memory"),
            (KVM_CAP_IMMEDIATE_EXIT, "immediate exit"), (KVM_CAP_PIT2, "an in-kernel timer"),
            (KVM_CAP_XSAVE, "XSAVE state"),
        ] where gw_kvm_check_extension(device.number, UInt(capability)) <= 0 {
            throw AcceleratorError("/dev/kvm lacks \(what) (capability \(capability)); use a newer kernel")
        }
    }

    private static func explain(_ error: SystemError) -> String {
        let remedy: String
        switch error.code {
        case ENOENT, ENODEV, ENXIO:
            remedy =
                "load the kernel module kvm_intel or kvm_amd, or enable virtualisation in the firmware or outer machine"
        case EACCES, EPERM: remedy = "add yourself to the group that owns it (usually kvm), or run as root"
        default: remedy = "see whether the kernel's log says why"
        }
        return SystemError(error.operation, error.object, code: error.code, remedy: remedy).description
    }

    func makeMachine() throws(AcceleratorError) -> Descriptor {
        while true {
            let result = gw_kvm_create_vm(device.number, 0)
            if result == -EINTR { continue }
            return Descriptor(owning: try kvm(result, "KVM_CREATE_VM"), name: "kvm machine")
        }
    }

    /// What KVM makes of guest page tables. Where that is not known, everything.
    var shadowPaging: ShadowPaging {
        for parameter in ["kvm_intel/parameters/ept", "kvm_amd/parameters/npt"] {
            let text = try? Descriptor.contents(of: "/sys/module/\(parameter)")
            if text?.first == UInt8(ascii: "Y") || text?.first == UInt8(ascii: "1") { return .none }
        }
        return unsafe access("/sys/module/kvm_pvm", F_OK) == 0 ? .longMode : .anyMode
    }

    func slotLimit(_ machine: Descriptor) -> Int {
        let limit = gw_kvm_check_extension(machine.number, UInt(KVM_CAP_NR_MEMSLOTS))
        return limit > 0 ? Int(limit) : 32
    }

    /// Turns on manual protection where the kernel has it: written pages are reported until they are cleared range by range.
    func dirtyLogMode(_ machine: Descriptor) -> DirtyLog.Mode {
        let offered = gw_kvm_check_extension(machine.number, UInt(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2))
        let wanted: CInt = 3  // KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
        guard offered & wanted == wanted else { return .automatic }
        var request = kvm_enable_cap()
        request.cap = UInt32(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
        request.args.0 = UInt64(wanted)
        return unsafe gw_kvm_enable_cap(machine.number, &request) == 0 ? .manual : .automatic
    }

    /// The most entries a vCPU's dirty ring can have; 0 where the kernel has none.
    var ringLimit: Int {
        let bytes = gw_kvm_check_extension(device.number, UInt(KVM_CAP_DIRTY_LOG_RING_ACQ_REL))
        return bytes > 0 ? Int(bytes) / MemoryLayout<kvm_dirty_gfn>.stride : 0
    }

    /// Gives each vCPU that is made from now on a dirty ring; the machine has no dirty log then.
    func enableRings(_ machine: Descriptor, entryCount: Int) throws(AcceleratorError) {
        var request = kvm_enable_cap()
        request.cap = UInt32(KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
        request.args.0 = UInt64(entryCount * MemoryLayout<kvm_dirty_gfn>.stride)
        let result = unsafe gw_kvm_enable_cap(machine.number, &request)
        try kvm(
            result, "KVM_ENABLE_CAP dirty ring of \(entryCount) entries",
            remedy: result == -EINVAL ? "the kernel keeps some entries for itself: take a larger dirty-ring-size" : nil)
    }

    func supportedCPUID() throws(AcceleratorError) -> CPUID {
        try unsafe CPUID { table in unsafe gw_kvm_get_supported_cpuid_raw(device.number, table) }
    }

    /// The model-specific registers the kernel wants saved.
    func msrIndices() throws(AcceleratorError) -> [UInt32] {
        var list = [UInt32](repeating: 0, count: 1 + 1024)
        list[0] = 1024
        let status = unsafe list.withUnsafeMutableBytes {
            unsafe gw_kvm_get_msr_index_list_raw(device.number, $0.baseAddress!)
        }
        try kvm(status, "KVM_GET_MSR_INDEX_LIST")
        return Array(list[1..<(1 + Int(list[0]))])
    }
}
