import GuestMemory
import GuestPrograms
import Host
import KVM

/// One machine, one strategy: the firmware's sequence again and again while the vCPUs spin, and what came of it.
struct MemslotsRun {
    let strategy: SlotStrategy
    let cpuCount: Int
    /// No vCPU goes where the layout changes.
    let areAllOutside: Bool
    /// Passes of the sequence that are timed, without dirty tracking.
    let timedRuns: Int
    /// Passes with dirty tracking, behind them.
    let trackedRuns: Int
    /// No pass is begun later than this.
    let timeLimitSeconds: UInt64

    struct Outcome {
        /// The thread that commits runs before vCPUs that want its processor.
        var isFirst = false
        /// By pass: the commits' time together.
        var sequenceMilliseconds: [Double] = []
        /// By pass: the median and the longest of its commits.
        var commitMilliseconds: [Double] = []
        var longestCommitMilliseconds: [Double] = []
        /// The same of passes with dirty tracking.
        var trackedCommitMilliseconds: [Double] = []
        /// The longest time a vCPU outside did not run; `nil` if there is none outside.
        var gapMilliseconds: Double?
        var failures: UInt64 = 0
        var firstFailure: String?
        /// Times all vCPUs were held, while timed and while tracked.
        var pauses: UInt64 = 0
        var commits: UInt64 = 0
        /// Pages of which dirty tracking did not tell the last contents.
        var lostPages: UInt64 = 0
        var firstLostPage: String?
        /// What vCPUs counted and no page holds.
        var lostWrites: UInt64 = 0
        var writes: UInt64 = 0
        /// Rounds of the vCPUs that spin inside.
        var rounds: UInt64 = 0
    }

    func carryOut() throws -> Outcome {
        let scene = try FirmwareScene()
        let outside = Set((0..<cpuCount).filter { areAllOutside || $0 % 2 == 1 })
        let guest = try scene.makeGuest(cpuCount: cpuCount, outside: outside)
        let machine = try SpinMachine(memory: scene.memory, guest: guest, strategy: strategy)
        try machine.start()
        var outcome = Outcome()
        outcome.isFirst = HostThread.runBeforeOthers()
        let deadline = Deadline.after(seconds: timeLimitSeconds)
        for run in 0..<timedRuns where run == 0 || !deadline.hasPassed {
            let times = try pass(scene, machine)
            outcome.sequenceMilliseconds.append(times.reduce(0, +))
            outcome.commitMilliseconds.append(times.median ?? .nan)
            outcome.longestCommitMilliseconds.append(times.max() ?? .nan)
        }
        outcome.gapMilliseconds = machine.longestGapMilliseconds
        let shadow = try trackedRuns > 0 ? ShadowBlocks(of: machine) : nil
        for run in 0..<trackedRuns where run == 0 || !deadline.hasPassed {
            outcome.trackedCommitMilliseconds.append(try pass(scene, machine).median ?? .nan)
            try shadow?.round()
        }
        try outcome.account(for: machine, shadow) { scene.counted(by: $0, in: guest) }
        return outcome
    }

    /// One pass of the sequence. - Returns: how long each commit took, in milliseconds.
    private func pass(_ scene: FirmwareScene, _ machine: SpinMachine) throws -> [Double] {
        try scene.steps.map { step in
            // The vCPUs get a chance to see what the last one made.
            Clock.sleep(nanoseconds: 300_000)
            let start = Clock.monotonicNanoseconds
            try scene.memory.commit(step)
            return Double(Clock.monotonicNanoseconds - start) / 1e6
        }
    }
}

extension MemslotsRun.Outcome {
    /// Stops the vCPUs and compares what they say with what memory holds.
    mutating func account(
        for machine: SpinMachine, _ shadow: ShadowBlocks?, counted: (_ cpu: Int) -> UInt64
    ) throws {
        try machine.park()
        machine.end()
        if let shadow {
            try shadow.round()
            let lost = try shadow.differences()
            lostPages = UInt64(lost.count)
            firstLostPage = lost.first
            shadow.stop()
        }
        (failures, firstFailure) = machine.failures
        let statistics = machine.accelerator.memorySlotStatistics
        (pauses, commits) = (statistics.pauses, statistics.commits)
        for (cpu, status) in machine.status.enumerated() {
            writes += status.writes
            if !machine.guest.outside.contains(cpu) { rounds += status.rounds }
            let counted = counted(cpu)
            lostWrites += max(status.writes, counted) - min(status.writes, counted)
        }
    }
}
