import Host

/// Keeps a sender at a rate: says how long to wait before the next bytes. Works in fractions of a millisecond, without bursts.
struct Pacer: Sendable {
    /// 0: no limit.
    let bytesPerSecond: UInt64
    private var nextNanoseconds: UInt64 = 0
    /// What a late sender may catch up with.
    private static let slackNanoseconds: UInt64 = 20_000_000

    init(bytesPerSecond: UInt64) { self.bytesPerSecond = bytesPerSecond }

    /// A good size for one write: a millisecond's worth, between one page and `most`.
    func batchBytes(most: Int) -> Int {
        guard bytesPerSecond > 0 else { return most }
        return max(4096, Int(min(UInt64(most), bytesPerSecond / 1000)))
    }

    /// Accounts for bytes sent now. - Returns: how long to wait before the next, in nanoseconds.
    mutating func sent(_ bytes: UInt64, at now: UInt64) -> UInt64 {
        guard bytesPerSecond > 0 else { return 0 }
        let earliest = now > Self.slackNanoseconds ? now - Self.slackNanoseconds : 0
        let cost = UInt64(Double(bytes) * 1e9 / Double(bytesPerSecond))
        nextNanoseconds = max(nextNanoseconds, earliest) + cost
        return nextNanoseconds > now ? nextNanoseconds - now : 0
    }
}
