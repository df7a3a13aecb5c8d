import Accelerator
import CLinux
import Glibc
import Host
import Synchronization

/// One virtual CPU of KVM: its descriptor and the area it shares with the kernel (`struct kvm_run`).
final class KVMVirtualCPU: VirtualCPU, @unchecked Sendable {
    let index: Int
    let descriptor: Descriptor
    let shared: Mapping
    /// What the guest's CPUID instruction reports. Replaced by the source's on an incoming migration, before the first run.
    var cpuid: CPUID
    /// The model-specific registers this kernel can both read and write.
    let msrIndices: [UInt32]
    let xsaveByteCount: Int
    let slots: KVMSlots
    /// Inside KVM_RUN, or about to be.
    let isInside = Atomic<Bool>(false)
    /// What this vCPU makes dirty; `nil` where the machine has no rings.
    let ring: DirtyRing?
    /// Empties the ring when it is full. Set before the first run.
    var whenRingIsFull: (@Sendable () throws(SystemError) -> Void)?
    /// Gives entries back to the kernel that somebody left to this vCPU. Set before the first run.
    var whenResetIsDue: (@Sendable () throws(SystemError) -> Void)?
    /// Until when, on the monotonic clock, it sleeps instead of running the guest; 0 for not at all.
    private let pausedUntil = Atomic<UInt64>(0)
    /// Where it sleeps.
    private let pausing = Monitor(())
    /// Sleeps because it is throttled; a kick must be told.
    private let isResting = Atomic<Bool>(false)
    /// In percent of its time; 0: it is not.
    private let throttlePercentage = Atomic<Int>(0)
    /// When it will have run for long enough, on the monotonic clock; `UInt64.max` for never.
    private let runsUntil = Atomic<UInt64>(.max)
    /// Its own thread's.
    private var duty = DutyCycle(percentage: 0)
    /// So long at once, in nanoseconds: whoever has it come out is not kept waiting by a kick that came too early.
    private static let longestNap: UInt64 = 20_000_000
    /// The thread inside `run`, for `kick`.
    let runner = Mutex<pthread_t?>(nil)
    /// The state after creation, to which a reset returns.
    private(set) var powerOn: [UInt8] = []
    /// The parts of `powerOn`, until something is loaded, which happens before it runs.
    var untouched: [UInt16: [UInt8]] = [:]
    /// The last exit was an access whose answer the kernel takes on the next entry.
    var hasPendingAccess = false
    /// Inside `completePendingAccess`: what it has answered does not complete anything in its turn.
    var isCompleting = false

    init(
        index: Int, machine: Descriptor, slots: KVMSlots, runByteCount: Int, cpuid: CPUID, msrs candidates: [UInt32],
        rings: (entryCount: Int, sum: DirtyRingSum)? = nil
    )
        throws(AcceleratorError)
    {
        self.index = index
        self.cpuid = cpuid
        self.slots = slots
        let number = try kvm(gw_kvm_create_vcpu(machine.number, UInt(index)), "KVM_CREATE_VCPU \(index)")
        descriptor = Descriptor(owning: number, name: "vcpu\(index)")
        do throws(SystemError) {
            shared = try Mapping(descriptor, byteCount: runByteCount)
        } catch { throw AcceleratorError(error.description) }
        ring = try Self.ring(of: descriptor, rings)
        let size = gw_kvm_check_extension(machine.number, UInt(KVM_CAP_XSAVE2))
        guard size >= 4096 else { throw AcceleratorError("/dev/kvm lacks KVM_GET_XSAVE2; use Linux 5.17 or newer") }
        xsaveByteCount = Int(size)
        try Self.set(cpuid, on: descriptor)
        msrIndices = index == 0 ? Self.usable(candidates, on: descriptor) : candidates
        powerOn = try save()
        untouched = try parts(of: powerOn)
    }

    private static func ring(
        of descriptor: Descriptor, _ rings: (entryCount: Int, sum: DirtyRingSum)?
    ) throws(AcceleratorError) -> DirtyRing? {
        guard let rings else { return nil }
        return try DirtyRing(of: descriptor, entryCount: rings.entryCount, sum: rings.sum)
    }

    static func set(_ cpuid: CPUID, on descriptor: Descriptor) throws(AcceleratorError) {
        var table = cpuid.table
        try kvm(
            unsafe table.withUnsafeMutableBytes { unsafe gw_kvm_set_cpuid2_raw(descriptor.number, $0.baseAddress!) },
            "KVM_SET_CPUID2")
    }

    /// Some kernels list registers which they then refuse: those are left out, on both sides alike.
    private static func usable(_ candidates: [UInt32], on descriptor: Descriptor) -> [UInt32] {
        candidates.filter { index in
            var table = MSRTable([(index, 0)])
            return table.get(descriptor) == 1 && table.set(descriptor) == 1
        }
    }

    func tscKilohertz() throws(AcceleratorError) -> UInt64 {
        UInt64(try kvm(gw_kvm_get_tsc_khz(descriptor.number, 0), "KVM_GET_TSC_KHZ"))
    }

    func kick() {
        setImmediateExit(true)
        runner.withLock { thread in
            if let thread { pthread_kill(thread, HostThread.interruptSignal) }
        }
        if pausedUntil.load(ordering: .sequentiallyConsistent) != 0
            || isResting.load(ordering: .sequentiallyConsistent)
        {
            pausing.withLock { _ in }
        }
    }

    /// Makes the vCPU leave the guest and sleep until this moment of the monotonic clock, in its own thread; 0 ends that.
    func pause(until moment: UInt64) {
        pausedUntil.store(moment, ordering: .sequentiallyConsistent)
        if moment == 0 { pausing.withLock { _ in } } else { kick() }
    }

    /// Sleeps while it is to; a kick ends that. - Returns: whether it slept, and must look for requests before it runs.
    func sleepWhilePaused() -> Bool {
        let moment = pausedUntil.load(ordering: .sequentiallyConsistent)
        guard moment != 0 else { return false }
        let nap = Deadline(at: min(moment, Clock.monotonicNanoseconds + Self.longestNap))
        pausing.wait(deadline: nap) { _ in
            isKicked || pausedUntil.load(ordering: .sequentiallyConsistent) != moment ? () : nil
        }
        if Deadline(at: moment).hasPassed {
            _ = pausedUntil.compareExchange(expected: moment, desired: 0, ordering: .sequentiallyConsistent)
        }
        return true
    }

    // MARK: Throttling

    /// Has it run for `100 - percentage` percent of the time from now on.
    func throttle(to percentage: Int) {
        throttlePercentage.store(percentage, ordering: .sequentiallyConsistent)
        // One inside the guest for long would not notice before its next exit.
        kick()
    }

    /// Makes it come out of the guest if its time is up. - Returns: when to look again, at the latest.
    func kickIfDue(_ now: UInt64) -> UInt64 {
        let moment = runsUntil.load(ordering: .acquiring)
        guard moment <= now else { return moment }
        if runsUntil.compareExchange(expected: moment, desired: .max, ordering: .sequentiallyConsistent).exchanged {
            kick()
        }
        return .max
    }

    /// Sleeps if it has run for long enough; a kick ends that. - Returns: whether it slept, and must look for requests before it runs.
    func sleepWhileThrottled() -> Bool {
        let percentage = throttlePercentage.load(ordering: .relaxed)
        if duty.percentage != percentage {
            duty = DutyCycle(percentage: percentage)
            runsUntil.store(.max, ordering: .releasing)
        }
        guard percentage > 0 else { return false }
        let nap = duty.nap
        guard nap > 0 else {
            duty.isResting = false
            return false
        }
        duty.isResting = true
        let began = Clock.monotonicNanoseconds
        // Whoever kicks is told when it will have to be looked at, as it cannot be told when it wakes up.
        runsUntil.store(began + nap + UInt64(duty.runNanoseconds), ordering: .releasing)
        isResting.store(true, ordering: .sequentiallyConsistent)
        pausing.wait(deadline: Deadline(at: began + min(nap, Self.longestNap))) { _ in
            isKicked || throttlePercentage.load(ordering: .sequentiallyConsistent) != percentage ? () : nil
        }
        isResting.store(false, ordering: .sequentiallyConsistent)
        duty.slept(Clock.monotonicNanoseconds - began)
        return true
    }

    /// Call around KVM_RUN. - Returns: when it went in; 0 where nobody wants to know.
    func beginRun() -> UInt64 {
        guard duty.percentage > 0 else { return 0 }
        let now = Clock.monotonicNanoseconds
        runsUntil.store(now + duty.leftToRun, ordering: .releasing)
        return now
    }

    func endRun(_ began: UInt64) {
        if began != 0 { duty.ran(Clock.monotonicNanoseconds - began) }
    }

    private var isKicked: Bool {
        shared.load(at: MemoryLayout<kvm_run>.offset(of: \.immediate_exit)!, as: UInt8.self) != 0
    }

    func clearKick() {
        setImmediateExit(false)
        // The store must be seen before the caller's look for requests: a kick in between must not be wiped out.
        atomicMemoryFence(ordering: .sequentiallyConsistent)
    }

    /// `kvm_run.immediate_exit`: KVM_RUN returns EINTR at once. Any thread may write it: it is one byte.
    func setImmediateExit(_ on: Bool) {
        shared.store(UInt8(on ? 1 : 0), at: MemoryLayout<kvm_run>.offset(of: \.immediate_exit)!)
    }
}

/// The area KVM_GET_MSRS and KVM_SET_MSRS take: a header, then (index, reserved, value) for each register.
struct MSRTable {
    private var words: [UInt32]

    init(_ entries: [(index: UInt32, value: UInt64)]) {
        words = [UInt32(entries.count), 0]
        for entry in entries {
            words += [
                entry.index, 0, UInt32(truncatingIfNeeded: entry.value), UInt32(truncatingIfNeeded: entry.value >> 32),
            ]
        }
    }

    var entries: [(index: UInt32, value: UInt64)] {
        (0..<Int(words[0])).map { number in
            let at = 2 + number * 4
            let value = UInt64(words[at + 3]) << 32 | UInt64(words[at + 2])
            return (index: words[at], value: value)
        }
    }

    /// - Returns: how many registers were read, or -errno.
    mutating func get(_ descriptor: Descriptor) -> CInt {
        unsafe words.withUnsafeMutableBytes { unsafe gw_kvm_get_msrs_raw(descriptor.number, $0.baseAddress!) }
    }

    /// - Returns: how many registers were written, or -errno.
    mutating func set(_ descriptor: Descriptor) -> CInt {
        unsafe words.withUnsafeMutableBytes { unsafe gw_kvm_set_msrs_raw(descriptor.number, $0.baseAddress!) }
    }
}
