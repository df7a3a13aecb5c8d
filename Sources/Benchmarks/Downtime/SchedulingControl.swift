import Host
import Synchronization

/// A thread beside the measured VMs that only sleeps and wakes: how much too late it wakes is the host's doing, not the migration's.
final class SchedulingControl: Sendable {
    private struct State {
        var longestNanoseconds: UInt64 = 0
        var isOver = false
    }

    private let state = Mutex(State())
    /// Each sleep.
    private static let napNanoseconds: UInt64 = 200_000

    init() throws {
        try HostThread.detached(name: "control") { [self] in run() }
    }

    private func run() {
        HostThread.sleepExactly()
        var last = Clock.monotonicNanoseconds
        while true {
            Clock.sleep(nanoseconds: Self.napNanoseconds)
            let now = Clock.monotonicNanoseconds
            let late = now - last - min(now - last, Self.napNanoseconds)
            last = now
            let isOver = state.withLock { state in
                state.longestNanoseconds = max(state.longestNanoseconds, late)
                return state.isOver
            }
            if isOver { return }
        }
    }

    /// The longest delay since the last time it was asked.
    func takeLongestNanoseconds() -> UInt64 {
        state.withLock { state in
            defer { state.longestNanoseconds = 0 }
            return state.longestNanoseconds
        }
    }

    func end() { state.withLock { $0.isOver = true } }
}
