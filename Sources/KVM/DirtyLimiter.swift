import Accelerator
import Host
import Synchronization

/// Limits to how fast vCPUs make pages dirty, by what stands in their rings.
///
/// Each limited vCPU has a budget of pages that grows with time. The reaper looks at it often: a vCPU that is ahead of its budget is made
/// to leave the guest and sleeps, in its own thread, until it is even. A ring that runs full is far too coarse for that: 65,536
/// pages are five seconds at 50 MB/s.
final class DirtyLimiter: DirtyRateControl, @unchecked Sendable {
    private struct Budget {
        let limitBytesPerSecond: UInt64
        /// Pages that may be made dirty now; less than none for a vCPU that is ahead.
        var pages = 0.0
        /// When and at which count of its ring the budget was last reckoned.
        var reckonedAt: UInt64
        var reckonedCount: UInt64
        var pausedUntil: UInt64 = 0
        /// For the present rate: where the last second began, and what came out of the one before.
        var secondBegan: UInt64
        var secondCount: UInt64
        var pagesPerSecond = 0.0
        /// How long it was paused within the second, and what part of the one before that was.
        var pausedNanoseconds: UInt64 = 0
        var pausedShare = 0.0

        var pagesPerNanosecond: Double { Double(limitBytesPerSecond) / 4096 / 1e9 }
    }

    private let rings: DirtyRings
    private let tracking: DirtyTracking
    private let cpus: [KVMVirtualCPU]
    private let budgets: Mutex<[Budget?]>
    /// One change of limits at a time; taken before the locks of tracking.
    private let changing = Mutex(())

    /// A vCPU that could not run may catch up this much.
    private static let savedNanoseconds = 50_000_000.0
    /// What a vCPU that runs freely should be ahead at most when it is looked at.
    private static let aheadNanoseconds = 10_000_000.0
    private static let shortestLook: UInt64 = 300_000
    private static let longestLook: UInt64 = 4_000_000
    private static let rateWindow: UInt64 = 500_000_000

    init(_ rings: DirtyRings, tracking: DirtyTracking, cpus: [KVMVirtualCPU]) {
        self.rings = rings
        self.tracking = tracking
        self.cpus = cpus
        budgets = Mutex(cpus.map { _ in nil })
    }

    var dirtiedPages: [UInt64] { rings.rings.map { $0.taken.load(ordering: .relaxed) } }

    func harvest() throws(AcceleratorError) {
        for ring in rings.rings { ring.harvest() }
    }

    func setLimit(_ bytesPerSecond: UInt64?, of cpu: Int?) throws(AcceleratorError) {
        if let cpu, !cpus.indices.contains(cpu) {
            throw AcceleratorError("vCPU \(cpu): this machine has vCPUs 0 to \(cpus.count - 1)")
        }
        if bytesPerSecond == 0 {
            throw AcceleratorError("a dirty limit of 0 would stop the vCPU for good; use 'stop' to stop the guest")
        }
        try changing.withLock { (_) throws(AcceleratorError) in
            if bytesPerSecond != nil { try tracking.hold(true) }
            let now = Clock.monotonicNanoseconds
            let isUsed = budgets.withLock { budgets in
                for index in budgets.indices where cpu == nil || cpu == index {
                    let count = rings.rings[index].count
                    budgets[index] = bytesPerSecond.map {
                        Budget(
                            limitBytesPerSecond: $0, reckonedAt: now, reckonedCount: count, secondBegan: now,
                            secondCount: count)
                    }
                    if bytesPerSecond == nil { cpus[index].pause(until: 0) }
                }
                return budgets.contains { $0 != nil }
            }
            if isUsed { rings.lookNow() } else { try tracking.hold(false) }
        }
    }

    var limits: [DirtyLimit] {
        budgets.withLock { budgets in
            budgets.indices.compactMap { index in
                budgets[index].map {
                    DirtyLimit(
                        cpu: index, limitBytesPerSecond: $0.limitBytesPerSecond,
                        currentBytesPerSecond: UInt64(max(0, $0.pagesPerSecond) * 4096), pausedShare: $0.pausedShare)
                }
            }
        }
    }

    /// Reckons the budget of each limited vCPU, or of one, and pauses those that are ahead.
    /// - Returns: when to look again, in nanoseconds from now; `nil` without limits.
    func look(at only: Int? = nil) -> UInt64? {
        budgets.withLock { budgets in
            let now = Clock.monotonicNanoseconds
            var soonest: UInt64?
            var isAnybodyAhead = false
            for index in budgets.indices where only == nil || only == index {
                guard var budget = budgets[index] else { continue }
                let ran = reckon(&budget, rings.rings[index].count, now)
                if budget.pages < 0 {
                    isAnybodyAhead = true
                    // A limit of a few bytes per second would have it sleep for years.
                    budget.pausedUntil = now + UInt64(min(-budget.pages / budget.pagesPerNanosecond, 60e9))
                    cpus[index].pause(until: budget.pausedUntil)
                }
                budgets[index] = budget
                // From when it runs again: as long as it takes to get ahead by what is allowed, at the speed it had.
                let pace = max(ran, budget.pagesPerNanosecond)
                let look = UInt64(Self.aheadNanoseconds * budget.pagesPerNanosecond / pace)
                let next = max(budget.pausedUntil, now) - now + min(max(look, Self.shortestLook), Self.longestLook)
                soonest = min(soonest ?? next, next)
            }
            // A page that stays writable is not counted again: what was made dirty is watched afresh while its vCPU sleeps.
            if isAnybodyAhead { rings.rearm() }
            return soonest
        }
    }

    /// - Returns: how many pages per nanosecond the vCPU made dirty while it was not paused.
    private func reckon(_ budget: inout Budget, _ count: UInt64, _ now: UInt64) -> Double {
        let dirtied = Double(count - budget.reckonedCount)
        let ranSince = max(budget.reckonedAt, min(budget.pausedUntil, now))
        budget.pages += Double(now - budget.reckonedAt) * budget.pagesPerNanosecond - dirtied
        budget.pages = min(budget.pages, Self.savedNanoseconds * budget.pagesPerNanosecond)
        budget.pausedNanoseconds += ranSince - budget.reckonedAt
        (budget.reckonedAt, budget.reckonedCount) = (now, count)
        let window = now - budget.secondBegan
        if window >= Self.rateWindow {
            budget.pagesPerSecond = Double(count - budget.secondCount) / Double(window) * 1e9
            budget.pausedShare = min(1, Double(budget.pausedNanoseconds) / Double(window))
            (budget.secondBegan, budget.secondCount, budget.pausedNanoseconds) = (now, count, 0)
        }
        return dirtied / Double(max(now - ranSince, 1))
    }
}
