//! The Accelerator room: what KVM (and later the soft interpreter) are to the rest of the house.
//!
//! An accelerator makes virtual CPUs, shows them guest memory, delivers interrupt lines, tracks written pages, and saves and loads
//! its own part of the machine's state. The board (Machine) answers port and memory accesses through `Bus`.

public import GuestMemory

/// What the board answers when a virtual CPU leaves guest memory. Called on vCPU threads, several at once.
public protocol Bus: AnyObject, Sendable {
    /// `size` is 1, 2 or 4 bytes.
    func portRead(_ port: UInt16, size: Int, from cpu: any VirtualCPU) -> UInt32
    func portWrite(_ port: UInt16, size: Int, value: UInt32, from cpu: any VirtualCPU)
    /// `size` is 1 to 8 bytes.
    func memoryRead(_ address: GuestPhysicalAddress, size: Int) -> UInt64
    func memoryWrite(_ address: GuestPhysicalAddress, size: Int, value: UInt64)
}

/// Why a virtual CPU came back from the guest, once its accesses have been answered.
public enum ExitReason: Sendable, Equatable {
    /// An access was answered; run on.
    case handled
    /// Somebody called `kick`.
    case interrupted
    /// The guest halted where no interrupt controller of the accelerator could wake it.
    case halted
    /// A triple fault, or a shutdown the accelerator reports: a PC resets.
    case reset
    /// The accelerator cannot run the guest on; the sentence says why.
    case failed(String)
}

/// One virtual CPU. `run`, `save` and `load` are called by the one thread that runs it; `kick` by any thread.
public protocol VirtualCPU: AnyObject, Sendable {
    var index: Int { get }
    /// Enters the guest until something happens. A pending `kick` returns at once.
    func run(_ bus: any Bus) -> ExitReason
    /// Finishes an access whose answer the guest has not taken yet, so that the state is whole; `bus` answers what is left of it.
    func completePendingAccess(_ bus: any Bus)
    /// Makes `run` return `.interrupted`: now, or at once when it is entered next.
    func kick()
    /// Forgets kicks that have been served. Call before looking for requests.
    func clearKick()
    func registers() throws(AcceleratorError) -> CPURegisters
    /// The guest-physical address behind a virtual one; `nil` where nothing is mapped.
    func translate(_ address: UInt64) throws(AcceleratorError) -> GuestPhysicalAddress?
    func setRegisters(_ registers: CPURegisters) throws(AcceleratorError)
    /// Puts the processor into a start state.
    func reset(to start: StartState) throws(AcceleratorError)
    /// The whole architectural state as the body of a migration section.
    func save() throws(AcceleratorError) -> [UInt8]
    /// Loads what `save` of the same version returned. - Throws: naming the part that does not fit.
    func load(_ state: [UInt8], clock: ClockAdvance) throws(AcceleratorError)
}

/// The general registers a monitor or a BIOS service needs, and the segments of real mode.
public struct CPURegisters: Sendable, Equatable {
    public var rax: UInt64 = 0, rbx: UInt64 = 0, rcx: UInt64 = 0, rdx: UInt64 = 0
    public var rsi: UInt64 = 0, rdi: UInt64 = 0, rsp: UInt64 = 0, rbp: UInt64 = 0
    public var r8: UInt64 = 0, r9: UInt64 = 0, r10: UInt64 = 0, r11: UInt64 = 0
    public var r12: UInt64 = 0, r13: UInt64 = 0, r14: UInt64 = 0, r15: UInt64 = 0
    public var rip: UInt64 = 0, rflags: UInt64 = 2
    /// Segment selectors. Read only: `setRegisters` does not change them.
    public var ds: UInt16 = 0, es: UInt16 = 0, ss: UInt16 = 0
    public init() {}
}

/// How a virtual CPU starts.
public enum StartState: Sendable, Equatable {
    /// An application processor: waits for INIT and SIPI.
    case waitForSIPI
    /// 16-bit real mode at `cs:ip`, other segments 0, the stack below `sp`, the boot drive in DL.
    case real(cs: UInt16, ip: UInt16, sp: UInt16, dl: UInt8)
    /// 32-bit protected mode, flat segments, paging and interrupts off (the PVH start state).
    case protected32(entry: UInt32, ebx: UInt32)
}

/// How far clocks go on over a migration: what passed on the wall between save and load.
public struct ClockAdvance: Sendable, Equatable {
    public let nanoseconds: UInt64
    public static let none = ClockAdvance(nanoseconds: 0)
    public init(nanoseconds: UInt64) { self.nanoseconds = nanoseconds }
}

/// A failure of the accelerator, as one sentence.
public struct AcceleratorError: Error, Sendable, Equatable, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}

/// The machine behind the virtual CPUs.
public protocol Accelerator: AnyObject, Sendable {
    /// `kvm`, as `--accel` and `query-kvm` name it.
    var name: String { get }
    var cpus: [any VirtualCPU] { get }
    /// Raises or lowers an interrupt line of the board (ISA numbers).
    func setInterruptLine(_ line: UInt32, level: Bool)
    /// A new tracker of the guest's writes for one client, such as one migration. A later tracker of the same client ends the earlier.
    func dirtyTracker(for client: DirtyClient) -> any DirtyTracker
    /// How written pages are found.
    var dirtyTracking: DirtyTrackingFacts { get }
    /// Dirty rates and limits by vCPU; `nil` where tracking cannot tell vCPUs apart (without a dirty ring).
    var dirtyRateControl: (any DirtyRateControl)? { get }
    /// Has each vCPU stand still for so many percent of the time, in turns of some milliseconds; 0 ends that. The guest is never kept from
    /// being stopped. - Throws: `AcceleratorError` for more than 99 %.
    func throttle(to percentage: Int) throws(AcceleratorError)
    /// Tells a watch where this shows guest memory to its CPUs besides the blocks' own mappings, and of every change there, until another
    /// is set. - Throws: `AcceleratorError` with what the watch said.
    func watchWindows(_ watch: (any WindowWatch)?) throws(AcceleratorError)
    /// State that belongs to no single CPU: interrupt controllers, timer, clock.
    func saveSystem() throws(AcceleratorError) -> [SystemState]
    /// Loads one section of `saveSystem`. - Throws: naming the section that does not fit.
    func loadSystem(_ state: SystemState, clock: ClockAdvance) throws(AcceleratorError)
    /// The sections `saveSystem` makes: (name, version).
    var systemSections: [(name: String, version: UInt32)] { get }
    /// Puts the system's state to what it is after power-on.
    func resetSystem() throws(AcceleratorError)
}

/// One section of accelerator state.
public struct SystemState: Sendable, Equatable {
    public let name: String
    public let version: UInt32
    public let body: [UInt8]
    public init(name: String, version: UInt32, body: [UInt8]) {
        self.name = name
        self.version = version
        self.body = body
    }
}
