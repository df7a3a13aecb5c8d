/// When to stop the guest: a value that is told each round and asked after each collect.
///
/// It never stops the guest while what remains does not fit the downtime limit. When it fits, it goes on as long as each
/// round still shrinks what remains, because another round costs a running guest nothing and a stopped one time; it ends
/// when a round no longer helps or what remains is trivial.
public struct SwitchoverPolicy: Hashable, Sendable {
    public enum Decision: Hashable, Sendable {
        case iterate
        case switchOver
    }

    /// How long the guest may stand still.
    public var downtimeLimitNanoseconds: UInt64
    /// The part of the downtime that does not depend on the pages left: stop, state, load, start.
    public var overheadNanoseconds: UInt64
    /// The bandwidth to count on for the final round (QEMU's `avail-switchover-bandwidth`); nil: what was measured.
    public var availableBytesPerSecond: UInt64?
    /// So few pages are sent at once, without another round.
    public var trivialPages: UInt64 = 64
    /// The same in time.
    public var trivialNanoseconds: UInt64 = 1_000_000
    /// Bytes per page with its record's head.
    private static let bytesPerPage = 4096.0 + 8
    /// A round with fewer bytes says nothing about bandwidth: it is all latency.
    private static let measurableBytes: UInt64 = 256 << 10
    /// Each round must leave at most that part of what the one before left.
    private static let shrinkingFactor = 0.9

    /// Measured in the last round that moved enough data; before that a careful guess, 1 Gbit/s.
    public private(set) var bandwidthBytesPerSecond: UInt64 = 125_000_000
    private var previousRemaining: UInt64?
    private var lastRoundWasWhole = true

    /// QEMU's default limit is 300 ms.
    public init(
        downtimeLimitNanoseconds: UInt64 = 300_000_000, overheadNanoseconds: UInt64 = 0,
        availableBytesPerSecond: UInt64? = nil
    ) {
        self.downtimeLimitNanoseconds = downtimeLimitNanoseconds
        self.overheadNanoseconds = overheadNanoseconds
        self.availableBytesPerSecond = availableBytesPerSecond
    }

    /// Learns from a round. Rounds of mostly zero pages move too few bytes to measure with.
    public mutating func sent(_ round: RoundReport) {
        lastRoundWasWhole = !round.interrupted
        guard round.nanoseconds > 0, round.bytes >= Self.measurableBytes, round.bytes / 2048 >= round.pages else {
            return
        }
        let rate = Double(round.bytes) * 1e9 / Double(round.nanoseconds)
        bandwidthBytesPerSecond = UInt64(min(max(rate, 1), 1e15))
    }

    /// Whether to go on, with that many pages known to be dirty. To be asked once after each collect.
    public mutating func decide(remainingPages: UInt64) -> Decision {
        let previous = previousRemaining
        // An interrupted round left pages behind that say nothing about the guest.
        previousRemaining = lastRoundWasWhole ? remainingPages : nil
        if remainingPages == 0 { return .switchOver }
        guard expectedDowntimeNanoseconds(remainingPages: remainingPages) <= downtimeLimitNanoseconds else {
            return .iterate
        }
        if remainingPages <= trivialPages || sendingNanoseconds(remainingPages) <= trivialNanoseconds {
            return .switchOver
        }
        // Nothing was sent yet, or the last round proves nothing: another one may well help.
        guard let previous, lastRoundWasWhole else { return .iterate }
        return Double(remainingPages) <= Double(previous) * Self.shrinkingFactor ? .iterate : .switchOver
    }

    /// What `info migrate` shows as the expected downtime.
    public func expectedDowntimeNanoseconds(remainingPages: UInt64) -> UInt64 {
        let (sum, overflow) = sendingNanoseconds(remainingPages).addingReportingOverflow(overheadNanoseconds)
        return overflow ? .max : sum
    }

    private func sendingNanoseconds(_ pages: UInt64) -> UInt64 {
        let rate = Double(max(availableBytesPerSecond ?? bandwidthBytesPerSecond, 1))
        return UInt64(min(Double(pages) * Self.bytesPerPage * 1e9 / rate, 1e18))
    }
}
