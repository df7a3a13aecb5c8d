import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host
import Synchronization

/// The dirty rings of a machine's vCPUs: what they say is taken ring by ring, each under its own lock, while vCPUs run.
///
/// Three kinds of thread harvest: a vCPU its own ring, when it is full; the `reaper` all of them, before they are; and the trackers'
/// calls all of them, to know what was written. What is taken waits in the ring's own records until a tracker's call hands it on.
///
/// A page is watched afresh when its entry is given back (`reset`): that costs the guest a fault at its next write. So entries are given
/// back late: when a ring runs full, and before a client reads pages that were written again.
final class DirtyRings: DirtySource, @unchecked Sendable {
    let method = "ring"
    let rings: [DirtyRing]
    private let machine: Descriptor
    private let memory: GuestMemory
    private let slots: KVMSlots
    /// How many entries had been taken when the last reset began. Held over each reset: two never race.
    private let resets = Mutex<UInt64>(0)
    private let sum: DirtyRingSum
    private let cpuNanoseconds = Atomic<UInt64>(0)
    private let reaper: DirtyReaper
    /// Looks at the limits of vCPUs, or of one, and tells when to look again, in nanoseconds. Set once, before any vCPU runs.
    var limits: (@Sendable (Int?) -> UInt64?)?

    /// Sending a page costs about as much as giving back so many entries, and the guest's faults that come of it.
    private static let entriesPerPage: UInt64 = 4

    init(_ rings: [DirtyRing], sum: DirtyRingSum, machine: Descriptor, slots: KVMSlots, memory: GuestMemory) {
        self.rings = rings
        self.sum = sum
        self.machine = machine
        self.memory = memory
        self.slots = slots
        reaper = DirtyReaper()
    }

    var otherCPUNanoseconds: UInt64 { cpuNanoseconds.load(ordering: .relaxed) }

    /// Entries taken so far, from all rings.
    var mark: UInt64 { sum.taken.load(ordering: .sequentiallyConsistent) }

    func makeRecord(pageCount: UInt64) throws(SystemError) -> any DirtyPages { DirtySet(pageCount: pageCount) }

    func begin() throws(AcceleratorError) {
        do throws(SystemError) {
            for ring in rings {
                var staged: [any DirtyPages] = []
                for block in memory.blocks { staged.append(try makeRecord(pageCount: block.pageCount)) }
                ring.begin(slots.slots, staged: staged)
            }
            try reaper.start { [weak self] in self?.look() }
        } catch { throw AcceleratorError(error.description) }
    }

    /// What still stands in the rings is dropped, and its places stay taken until somebody needs them: to give them back now would
    /// write-protect pages for nothing.
    func end() {
        reaper.stop()
        for ring in rings { ring.begin([], staged: nil) }
    }

    // MARK: For the trackers

    /// Turning logging on has write-protected what was mapped: from here on each first write is an entry.
    func wasTurnedOn(_ slot: Slot, _ report: DirtyReport) throws(AcceleratorError) {
        for ring in rings { ring.change(slot.number, both: slot.pieces, new: slot.pieces) }
        do throws(SystemError) {
            for run in try slot.allocatedRuns(in: slot.allPages, of: memory) { report.set(run, of: slot) }
        } catch { throw AcceleratorError(error.description) }
    }

    func collect(_ slots: [Slot], for client: DirtyClient, _ report: DirtyReport) throws(AcceleratorError) {
        for ring in rings { ring.harvest(report) }
        // Who does not say what it will read has everything watched afresh now.
        if client != .migration { try giveBack(all: mark) }
    }

    /// Entries are handed on before they are given back, and both before the pages are read: a page forgotten here was written before
    /// it is read, and its next write is an entry again.
    func willSend(_ chunk: DirtyChunk, _ slots: [Slot], others: DirtyReport) throws(AcceleratorError) {
        let all = DirtyReport([chunk.pending]).and(others)
        for ring in rings { ring.harvest(all) }
        let again = chunk.pending[chunk.block].words(inCommonWith: chunk.marked, in: chunk.pages)
        let count = again.reduce(0) { $0 + UInt64($1.nonzeroBitCount) }
        // What is not forgotten is sent again in the next round, which costs less than giving back many entries for few pages.
        // In this order: what is taken never falls behind what was given back before, but another thread may give back between the two.
        let given = resets.withLock { $0 }
        guard count > 0, count * Self.entriesPerPage >= mark - given else {
            return try giveBack(all: chunk.mark)
        }
        try giveBack(all: mark)
        chunk.pending[chunk.block].clear(again, from: chunk.pages.lowerBound)
    }

    func willChange(_ old: Slot, to new: Slot?, isOn: Bool, _ report: DirtyReport) throws(AcceleratorError) {
        let both = old.pieces + (new?.cut(to: old.pageCount).pieces ?? [])
        for ring in rings {
            ring.change(old.number, both: both, new: new?.pieces)
            ring.harvest(report)
        }
    }

    /// Only what was written is in a ring.
    func ignoreWhatAppears(in slot: Slot, _ report: DirtyReport) {}

    /// Gives back what had been taken by `mark`, unless somebody has.
    ///
    /// With no vCPU in the guest it is left to the first that enters: at the end of a migration none does.
    private func giveBack(all mark: UInt64) throws(AcceleratorError) {
        guard resets.withLock({ $0 < mark }) else { return }
        sum.isResetDue.store(true, ordering: .sequentiallyConsistent)
        // A vCPU says that it enters, then looks at what is due: one of the two sides sees the other.
        guard rings.contains(where: { $0.isInGuest.load(ordering: .sequentiallyConsistent) }) else { return }
        do throws(SystemError) { try reset() } catch { throw AcceleratorError(error.description) }
    }

    // MARK: Giving back

    /// Gives back every entry taken before the call.
    func reset() throws(SystemError) {
        try resets.withLock { (done) throws(SystemError) in
            // Counted when the kernel can see it: what is in these numbers is given back by the call below.
            let counts = rings.map { $0.taken.load(ordering: .relaxed) }
            let all = mark
            if done < all {
                try Self.reset(machine)
                for (ring, count) in zip(rings, counts) { ring.given.store(count, ordering: .relaxed) }
                done = all
            }
            // Only now: who finds nothing due enters the guest at once.
            sum.isResetDue.store(false, ordering: .sequentiallyConsistent)
        }
    }

    /// A signal would end the call half-way, after entries were taken for given back and before their pages are watched.
    private static func reset(_ machine: Descriptor) throws(SystemError) {
        var all = sigset_t()
        var before = sigset_t()
        unsafe sigfillset(&all)
        unsafe pthread_sigmask(SIG_BLOCK, &all, &before)
        defer { unsafe pthread_sigmask(SIG_SETMASK, &before, nil) }
        while true {
            let result = gw_kvm_reset_dirty_rings(machine.number, 0)
            if result == -EINTR { continue }
            guard result < 0 else { return }
            throw SystemError("KVM_RESET_DIRTY_RINGS", code: -result)
        }
    }

    // MARK: Other threads

    /// A vCPU whose ring is full harvests it, in its own thread.
    func isFull(_ ring: DirtyRing, of index: Int) throws(SystemError) {
        let before = Clock.threadCPUNanoseconds
        defer { cpuNanoseconds.add(Clock.threadCPUNanoseconds - before, ordering: .relaxed) }
        ring.harvest()
        try reset()
        _ = limits?(index)
    }

    /// Watches afresh what stands in the rings, so that it is counted again.
    func rearm() {
        for ring in rings { ring.harvest() }
        try? reset()
    }

    func lookNow() { reaper.wake() }

    /// The reaper's look at the rings. - Returns: how long it may sleep, in nanoseconds.
    private func look() -> UInt64 {
        let before = Clock.threadCPUNanoseconds
        defer { cpuNanoseconds.add(Clock.threadCPUNanoseconds - before, ordering: .relaxed) }
        let next = reaper.plan(rings.map(\.fill), of: rings[0].entryCount) { rearm() }
        return min(next, limits?(nil) ?? next)
    }
}
