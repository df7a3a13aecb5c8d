import Host
import Synchronization

/// Keeps senders at a rate: says how long to wait before the next bytes. Several threads may share one; the rate may change at any time.
///
/// Two clocks. The *schedule* says when the next bytes are due: it may lag behind by a few hundredths of a second, so that what a late
/// scheduler missed is made up for and the average holds. The *brake* keeps the making up from becoming a burst: it runs a quarter
/// faster than the rate, and lags behind by a few milliseconds at most.
final class Pacer: Sendable {
    private struct State {
        /// 0: no limit.
        var bytesPerSecond: UInt64
        var scheduleNanoseconds: UInt64 = 0
        var brakeNanoseconds: UInt64 = 0
        /// How often the rate was changed.
        var changes: UInt64 = 0
    }

    private let state: Mutex<State>

    /// What may be made up for. Any second holds at most this much more than the rate: 4 %.
    static let scheduleSlackNanoseconds: UInt64 = 40_000_000
    /// The largest burst.
    static let burstNanoseconds: UInt64 = 2_000_000
    /// How much faster than the rate is made up.
    private static let catchUp = 1.25
    /// A good write is that long at the rate.
    private static let writeNanoseconds: UInt64 = 1_000_000
    /// A sender that waits looks that often whether the rate was changed or its round must end.
    private static let lookNanoseconds: UInt64 = 10_000_000

    init(bytesPerSecond: UInt64) { state = Mutex(State(bytesPerSecond: bytesPerSecond)) }

    /// For a final round: the guest stands still, and only the transport sets the pace, as in QEMU.
    static let unlimited = Pacer(bytesPerSecond: 0)

    var bytesPerSecond: UInt64 {
        get { state.withLock { $0.bytesPerSecond } }
        set {
            state.withLock { state in
                guard state.bytesPerSecond != newValue else { return }
                // What was sent at the old rate is not paid for at the new one.
                state = State(bytesPerSecond: newValue, changes: state.changes + 1)
            }
        }
    }

    /// A good size for one write: a millisecond's worth, between one page and `most`.
    /// - Parameter target: less than a millisecond's, if not 0.
    func batchBytes(most: Int, withinMicroseconds target: UInt64 = 0) -> Int {
        let rate = bytesPerSecond
        guard rate > 0 else { return most }
        let time = target == 0 ? Self.writeNanoseconds : min(Self.writeNanoseconds, target * 1000)
        return max(4096, Int(min(UInt64(most), rate / (1_000_000_000 / time))))
    }

    /// Accounts for bytes sent now. - Returns: how long to wait before the next, in nanoseconds.
    func sent(_ bytes: UInt64, at now: UInt64) -> UInt64 {
        state.withLock { state in
            guard state.bytesPerSecond > 0 else { return 0 }
            let cost = Double(bytes) * 1e9 / Double(state.bytesPerSecond)
            func advance(_ clock: inout UInt64, by cost: Double, slack: UInt64) {
                clock = max(clock, now > slack ? now - slack : 0) &+ UInt64(min(cost, 1e18))
            }
            advance(&state.scheduleNanoseconds, by: cost, slack: Self.scheduleSlackNanoseconds)
            advance(&state.brakeNanoseconds, by: cost / Self.catchUp, slack: Self.burstNanoseconds)
            let next = max(state.scheduleNanoseconds, state.brakeNanoseconds)
            return next > now ? next - now : 0
        }
    }

    /// Waits that long, or until the rate is changed or `mustEnd` holds.
    func wait(_ nanoseconds: UInt64, unless mustEnd: () -> Bool = { false }) {
        guard nanoseconds > 0 else { return }
        let end = Deadline.after(nanoseconds: nanoseconds)
        let changes = state.withLock { $0.changes }
        while let left = end.remainingNanoseconds, left > 0 {
            Clock.sleep(nanoseconds: min(left, Self.lookNanoseconds))
            if left <= Self.lookNanoseconds || mustEnd() || state.withLock({ $0.changes }) != changes { return }
        }
    }
}
