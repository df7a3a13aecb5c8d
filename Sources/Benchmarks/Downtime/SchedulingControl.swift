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

    /// What an outer host has taken of this one's processors so far, where this is a virtual machine and is told: in hundredths of a second
    /// only (proc(5), `steal`).
    static var stolenMilliseconds: Double? {
        let bytes = (try? Descriptor.contents(of: "/proc/stat", limit: 1 << 20)) ?? []
        let line = String(decoding: bytes.prefix { $0 != 0x0A }, as: UTF8.self)
        let fields = line.split(separator: " ")
        guard fields.first == "cpu", fields.count > 8 else { return nil }
        return Double(fields[8]).map { $0 * 10 }
    }

    func end() { state.withLock { $0.isOver = true } }
}
