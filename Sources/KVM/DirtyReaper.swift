import Host
import Synchronization

/// The thread `reaper`, there while tracking is on: it looks how full the rings run, and empties them before a vCPU must stop for it.
///
/// There is no fixed period: from how fast rings filled since the last look follows when the fullest will be half full.
final class DirtyReaper: Sendable {
    private struct Turn {
        /// Counts starts and stops: a thread of an earlier start ends when it sees a later number.
        var number: UInt64 = 0
        var isAwaited = false
    }
    private let turn = Monitor(Turn())

    private struct Pace {
        var fills: [Int] = []
        var lookedAt: UInt64 = 0
    }
    private let pace = Mutex(Pace())

    private static let shortestNanoseconds: UInt64 = 500_000
    private static let longestNanoseconds: UInt64 = 100_000_000

    /// - Parameter look: returns how long to sleep, in nanoseconds; `nil` ends the thread.
    func start(_ look: @escaping @Sendable () -> UInt64?) throws(SystemError) {
        let mine = turn.withLock { turn in
            turn.number += 1
            return turn.number
        }
        pace.withLock { $0 = Pace() }
        let turn = turn
        _ = try HostThread.detached(name: "reaper") {
            while let nanoseconds = look() {
                let isOver = turn.wait(deadline: .after(nanoseconds: nanoseconds)) { turn -> Bool? in
                    if turn.number != mine { return true }
                    guard turn.isAwaited else { return nil }
                    turn.isAwaited = false
                    return false
                }
                if isOver == true { return }
            }
        }
    }

    func stop() { turn.withLock { $0.number += 1 } }

    /// Has the thread look at once.
    func wake() { turn.withLock { $0.isAwaited = true } }

    /// Calls `empty` when a ring is half full. - Returns: when to look again, in nanoseconds from now.
    func plan(_ fills: [Int], of entryCount: Int, empty: () -> Void) -> UInt64 {
        let half = entryCount / 2
        let now = Clock.monotonicNanoseconds
        let isHalfFull = fills.contains { $0 >= half }
        if isHalfFull { empty() }
        return pace.withLock { pace in
            defer { pace = Pace(fills: isHalfFull ? fills.map { _ in 0 } : fills, lookedAt: now) }
            guard pace.fills.count == fills.count, now > pace.lookedAt else { return Self.shortestNanoseconds * 4 }
            var soonest = Self.longestNanoseconds
            for (fill, before) in zip(fills, pace.fills) where fill > before {
                let perEntry = Double(now - pace.lookedAt) / Double(fill - before)
                let left = isHalfFull ? half : half - fill
                soonest = min(soonest, UInt64(Double(max(left, 0)) * perEntry))
            }
            return max(soonest, Self.shortestNanoseconds)
        }
    }
}
