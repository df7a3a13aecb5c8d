public import Accelerator
public import GuestMemory

/// What a virtual machine is made of.
public struct MachineConfiguration: Sendable {
    public enum Kind: String, Sendable, CaseIterable {
        /// A small PC: interrupt controllers, timer, UART, reset ports.
        case pc
        /// RAM alone: no vCPU, no device (QEMU's `-M none`), to exchange memory with QEMU.
        case none
    }

    /// `pc` by default.
    public var kind: Kind
    /// RAM in bytes.
    public var memoryByteCount: UInt64
    /// 1 to 64 for a PC, 0 for `none`.
    public var cpuCount: Int
    /// What runs after power-on; `nil`: nothing can be started, the guest arrives by migration.
    public var boot: BootSource?
    /// What stands behind RAM.
    public var backing: RAMBacking
    /// RAM is taken from the host when the machine is made, and not at its first touch.
    public var isPreallocated: Bool
    /// How written pages are found.
    public var dirtyTracking: DirtyTrackingChoice
    /// The machine waits for a migration instead of booting.
    public var isIncoming: Bool
    /// What tells this machine from all others, if somebody gave it one.
    public var uuid: MachineUUID?

    public static let maximumCPUs = 64

    public init(
        kind: Kind = .pc, memoryByteCount: UInt64, cpuCount: Int = 1, boot: BootSource? = nil,
        backing: RAMBacking = .anonymous, isPreallocated: Bool = false,
        dirtyTracking: DirtyTrackingChoice = .automatic,
        isIncoming: Bool = false
    ) {
        self.kind = kind
        self.memoryByteCount = memoryByteCount
        self.cpuCount = kind == .none ? 0 : cpuCount
        self.boot = boot
        self.backing = backing
        self.isPreallocated = isPreallocated
        self.dirtyTracking = dirtyTracking
        self.isIncoming = isIncoming
    }

    /// The machine name both sides of a migration compare. QEMU's `none` is called the same.
    public var streamName: String { kind == .none ? "none" : "godwit-pc-1" }

    func validate() throws(MachineError) {
        guard kind == .none || (1...Self.maximumCPUs).contains(cpuCount) else {
            throw MachineError("\(cpuCount) vCPUs: a machine has 1 to \(Self.maximumCPUs)")
        }
        guard memoryByteCount > 0, memoryByteCount % RAMLayout.pageBytes == 0 else {
            throw MachineError(RAMLayoutError.unaligned(bytes: memoryByteCount).description)
        }
    }
}
