import Host
import Synchronization

/// How much of what nobody asked for may stand in front of a page that somebody waits for: what the link carries in the time that
/// `x-page-latency-target` names.
///
/// Little of it is in one write, little waits in the sender's socket, and little in the receiver's: a page that was asked for just after it
/// was sent with the rest is behind all of that.
final class BackgroundPace: Sendable {
    private struct State {
        /// Since when, and how much.
        var began: UInt64?
        var bytes: UInt64 = 0
        var bytesPerSecond = BackgroundPace.assumedBytesPerSecond
    }

    private let target: Atomic<UInt64>
    private let state = Mutex(State())

    /// Of a link that was not measured yet: 10 Gb/s.
    static let assumedBytesPerSecond: UInt64 = 1_250_000_000
    private static let windowNanoseconds: UInt64 = 100_000_000
    /// Less in one write costs more than it gains, and more is not faster.
    private static let writeBytes: ClosedRange<UInt64> = 64 << 10...256 << 10
    /// Nor is less in a socket of use; from this on it is the kernel's affair.
    private static let socketBytes: ClosedRange<UInt64> = 128 << 10...4 << 20

    /// - Parameter targetMicroseconds: 0: nothing is bounded.
    init(targetMicroseconds: UInt64) { target = Atomic(targetMicroseconds) }

    /// Any thread may change it.
    var targetMicroseconds: UInt64 {
        get { target.load(ordering: .relaxed) }
        set { target.store(newValue, ordering: .relaxed) }
    }

    /// For one write, where no limit of bandwidth says less.
    var batchBytes: Int {
        let target = targetMicroseconds
        guard target > 0 else { return Int(Self.writeBytes.lowerBound) }
        return Int(Self.clamp(Self.worth(bytesPerSecond, nanoseconds: Double(target) * 1000), Self.writeBytes))
    }

    /// What may wait in a socket; `nil`: as much as the kernel likes.
    /// - Parameter roundTrip: nanoseconds; less than the link carries meanwhile would be a brake.
    static func socketBytes(targetMicroseconds: UInt64, roundTrip: UInt64, bytesPerSecond: UInt64) -> Int? {
        guard targetMicroseconds > 0 else { return nil }
        let bytes = worth(bytesPerSecond, nanoseconds: Double(targetMicroseconds) * 1000 + 2 * Double(roundTrip))
        return bytes > socketBytes.upperBound ? nil : Int(max(bytes, socketBytes.lowerBound))
    }

    func socketBytes(roundTrip: UInt64) -> Int? {
        Self.socketBytes(targetMicroseconds: targetMicroseconds, roundTrip: roundTrip, bytesPerSecond: bytesPerSecond)
    }

    /// Bytes of what nobody asked for went out.
    func sent(_ bytes: UInt64, at now: UInt64) {
        state.withLock { state in
            guard let began = state.began else {
                (state.began, state.bytes) = (now, 0)
                return
            }
            state.bytes += bytes
            guard now - min(began, now) >= Self.windowNanoseconds else { return }
            state.bytesPerSecond = UInt64(Double(state.bytes) * 1e9 / Double(now - began))
            (state.began, state.bytes) = (now, 0)
        }
    }

    private var bytesPerSecond: UInt64 { state.withLock { $0.bytesPerSecond } }

    private static func worth(_ bytesPerSecond: UInt64, nanoseconds: Double) -> UInt64 {
        UInt64(min(Double(bytesPerSecond) * nanoseconds / 1e9, 1e15))
    }

    private static func clamp(_ value: UInt64, _ range: ClosedRange<UInt64>) -> UInt64 {
        min(max(value, range.lowerBound), range.upperBound)
    }
}
