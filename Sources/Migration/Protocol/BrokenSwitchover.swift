/// A switchover that was taken back because it would have broken the downtime limit: the guest ran on at the source.
public struct BrokenSwitchover: Hashable, Sendable, CustomStringConvertible {
    /// Counts from 1.
    public var number: UInt64
    /// How long the guest stood still, from the moment it was told to stop to that it was told to run on.
    public var nanoseconds: UInt64
    public var limitNanoseconds: UInt64
    /// The part that took too long, in words.
    public var reason: String

    public init(number: UInt64, nanoseconds: UInt64, limitNanoseconds: UInt64, reason: String) {
        self.number = number
        self.nanoseconds = nanoseconds
        self.limitNanoseconds = limitNanoseconds
        self.reason = reason
    }

    /// One sentence, for the log.
    public var description: String {
        "switchover \(number) was broken off after \(Self.milliseconds(nanoseconds)) ms of \(Self.milliseconds(limitNanoseconds)) ms "
            + "allowed: \(reason); the guest runs on here"
    }

    /// To the microsecond.
    private static func milliseconds(_ nanoseconds: UInt64) -> String {
        let micros = String(nanoseconds / 1000 % 1000)
        return "\(nanoseconds / 1_000_000).\(String(repeating: "0", count: 3 - micros.count))\(micros)"
    }
}
