/// When to stop the guest: a value that is told each round and asked after each collect.
///
/// It stops the guest only if everything the guest will see fits the downtime limit: the fixed parts (``SwitchoverCosts``) and the last
/// pages at the slowest rate of the last rounds. When it fits, it goes on as long as each round still shrinks what remains,
/// because another round costs a running guest nothing and a stopped one time; it ends when a round no longer helps or what remains
/// is trivial. After a switchover that was broken off it counts on less of the limit for a while, and lets some time pass.
public struct SwitchoverPolicy: Hashable, Sendable {
    public enum Decision: Hashable, Sendable {
        case iterate
        case switchOver
        /// Nothing to send is worth it, and stopping the guest now is not: look again after so long.
        case rest(nanoseconds: UInt64)
    }

    /// How long the guest may stand still. 0: no deadline; it is stopped when nothing is left.
    public var downtimeLimitNanoseconds: UInt64
    /// The part of the downtime that does not depend on the pages left, as far as it was measured.
    public var costs: SwitchoverCosts
    /// The bandwidth to count on for the final round (QEMU's `avail-switchover-bandwidth`); nil: what was measured.
    public var availableBytesPerSecond: UInt64?
    /// What all rounds but the last may send (QEMU's `max-bandwidth`); nil: as much as the transport takes.
    private var limitBytesPerSecond: UInt64?
    /// The round under way began under a lower limit.
    private var roundIsMixed = false
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
    /// The lower bound of the rate is the slowest of so many rounds.
    private static let ratesKept = 4
    /// What a broken switchover takes from the share of the limit that is counted on, down to the least; and what a round gives back.
    private static let shareLost = 0.75
    private static let leastShare = 0.3
    private static let shareRegained = 1.1
    /// The pause after the first broken switchover; it doubles with each further one.
    private static let firstRestNanoseconds: UInt64 = 2_000_000
    private static let longestRestNanoseconds: UInt64 = 500_000_000
    private static let longestWaitNanoseconds: UInt64 = 100_000_000

    /// Measured in the last rounds that moved enough data, the newest last.
    private var rates: [UInt64] = []
    /// Before that a careful guess, 1 Gbit/s.
    private static let guessedRate: UInt64 = 125_000_000
    private var fastestRate: UInt64 = 0
    private var previousRemaining: UInt64?
    private var lastRoundWasWhole = true
    /// The part of the limit that may be used up by what is expected.
    private var share = 1.0
    /// Switchovers that were broken off in this migration.
    public private(set) var brokenSwitchovers: UInt64 = 0
    /// Whether what remained at the last decision fits the limit, whatever was decided.
    public private(set) var isFitting = false
    private var mustRest = false
    /// How often there was nothing to do but wait for better conditions.
    private var restsInARow: UInt64 = 0

    /// QEMU's default limit is 300 ms.
    /// - Parameter overheadNanoseconds: a first guess of all parts that do not depend on the pages left.
    public init(
        downtimeLimitNanoseconds: UInt64 = 300_000_000, overheadNanoseconds: UInt64 = 0,
        availableBytesPerSecond: UInt64? = nil
    ) {
        self.downtimeLimitNanoseconds = downtimeLimitNanoseconds
        self.availableBytesPerSecond = availableBytesPerSecond
        costs = SwitchoverCosts(guessNanoseconds: overheadNanoseconds)
    }

    /// The rate to count on: the slowest of the last rounds.
    public var bandwidthBytesPerSecond: UInt64 { rates.min() ?? Self.guessedRate }

    /// Whether the rate is more than a guess.
    public var knowsBandwidth: Bool { availableBytesPerSecond != nil || !rates.isEmpty }

    /// Learns from a round. Rounds of mostly zero pages move too few bytes to measure with.
    public mutating func sent(_ round: RoundReport) {
        lastRoundWasWhole = !round.interrupted
        if !measure(round) { liftSlowestRate() }
        recover()
    }

    /// All rounds but the last are limited from now on. What was measured under a lower limit may be that limit, and not the transport's
    /// rate: it is forgotten, and measured anew before the guest is stopped.
    public mutating func limit(to bytesPerSecond: UInt64?, roundIsUnderWay: Bool = false) {
        let isRaised = limitBytesPerSecond ?? .max < bytesPerSecond ?? .max
        limitBytesPerSecond = bytesPerSecond
        guard isRaised else { return }
        rates = []
        fastestRate = 0
        previousRemaining = nil
        roundIsMixed = roundIsUnderWay
    }

    /// - Returns: whether there was something to measure.
    @discardableResult
    private mutating func measure(_ round: RoundReport) -> Bool {
        defer { roundIsMixed = false }
        guard !roundIsMixed else { return false }
        // Pages that shrink are that much faster: what counts is how long as many as remain will take.
        let bytes = max(round.bytes, round.contentBytes)
        guard round.nanoseconds > 0, bytes >= Self.measurableBytes, bytes / 2048 >= round.pages else { return false }
        let rate = UInt64(min(max(Double(bytes) * 1e9 / Double(round.nanoseconds), 1), 1e15))
        fastestRate = max(fastestRate, rate)
        rates.append(rate)
        if rates.count > Self.ratesKept { rates.removeFirst() }
        return true
    }

    /// Rounds too small to measure with do not leave a stall of long ago the last word.
    private mutating func liftSlowestRate() {
        guard let slowest = rates.indices.min(by: { rates[$0] < rates[$1] }) else { return }
        rates[slowest] = min(fastestRate, rates[slowest] + rates[slowest] / 4 + 1)
    }

    /// A switchover was broken off: what made it slow may go on for a while.
    public mutating func brokeOff() {
        brokenSwitchovers += 1
        share = max(Self.leastShare, share * Self.shareLost)
        mustRest = true
        isFitting = false
        // What the broken attempt left says nothing about the guest.
        previousRemaining = nil
    }

    /// The last pages of a broken switchover, with the stall that broke it.
    mutating func sentBroken(_ round: RoundReport) { measure(round) }

    /// Time or a round has passed: what was bad may be better by now.
    private mutating func recover() {
        share = min(1, share * Self.shareRegained)
        costs.fade()
    }

    /// Whether to go on, with that many pages known to be dirty. To be asked once after each collect.
    public mutating func decide(remainingPages: UInt64) -> Decision {
        let previous = previousRemaining
        // An interrupted round left pages behind that say nothing about the guest.
        previousRemaining = lastRoundWasWhole ? remainingPages : nil
        if mustRest {
            mustRest = false
            let doublings = min(brokenSwitchovers - 1, 16)
            return .rest(nanoseconds: min(Self.firstRestNanoseconds << doublings, Self.longestRestNanoseconds))
        }
        if downtimeLimitNanoseconds == 0 { return remainingPages == 0 ? .switchOver : .iterate }
        isFitting = fits(remainingPages)
        guard isFitting else {
            guard isTrivial(remainingPages) else { return .iterate }
            recover()
            liftSlowestRate()
            restsInARow += 1
            return .rest(
                nanoseconds: min(Self.firstRestNanoseconds << min(restsInARow, 16), Self.longestWaitNanoseconds))
        }
        restsInARow = 0
        if isTrivial(remainingPages) { return .switchOver }
        // Nothing was sent yet, or the last round proves nothing: another one may well help.
        guard let previous, lastRoundWasWhole else { return .iterate }
        return Double(remainingPages) <= Double(previous) * Self.shrinkingFactor ? .iterate : .switchOver
    }

    private func isTrivial(_ pages: UInt64) -> Bool {
        pages <= trivialPages || sendingNanoseconds(pages) <= trivialNanoseconds
    }

    /// A guess may be wrong: it never counts for more than half of the limit, so that a switchover is tried and measured.
    private func fits(_ pages: UInt64) -> Bool {
        let fixed = costs.isGuess ? min(costs.total, downtimeLimitNanoseconds / 2) : costs.total
        return Double(sendingNanoseconds(pages)) + Double(fixed) <= Double(downtimeLimitNanoseconds) * share
    }

    /// What `info migrate` shows as the expected downtime.
    public func expectedDowntimeNanoseconds(remainingPages: UInt64) -> UInt64 {
        let (sum, overflow) = sendingNanoseconds(remainingPages).addingReportingOverflow(costs.total)
        return overflow ? .max : sum
    }

    /// How long the last round will take at the lower bound of the rate.
    func sendingNanoseconds(_ pages: UInt64) -> UInt64 {
        let rate = Double(max(availableBytesPerSecond ?? bandwidthBytesPerSecond, 1))
        return UInt64(min(Double(pages) * Self.bytesPerPage * 1e9 / rate, 1e18))
    }
}

/// What a switchover takes apart from its pages, in nanoseconds, each part as it was measured in this migration.
public struct SwitchoverCosts: Hashable, Sendable {
    public enum Part: Int, CaseIterable, Sendable {
        case stop, collect, state, load, start
    }

    /// Before anything was measured: of all parts.
    public private(set) var guessNanoseconds: UInt64
    private var measured = [UInt64?](repeating: nil, count: Part.allCases.count)
    /// How the guess is divided, in sixteenths: most of it is reading and loading the vCPUs' state.
    private static let guessedShares: [UInt64] = [2, 2, 3, 7, 2]

    init(guessNanoseconds: UInt64) { self.guessNanoseconds = guessNanoseconds }

    /// Whether no switchover was tried yet.
    var isGuess: Bool { measured[Part.load.rawValue] == nil && measured[Part.state.rawValue] == nil }

    /// A slower one counts at once, a faster one by and by.
    public mutating func learn(_ part: Part, _ nanoseconds: UInt64) {
        let old = measured[part.rawValue] ?? 0
        measured[part.rawValue] = max(nanoseconds, old - old / 4)
    }

    /// It was broken off after so long, and may have taken longer.
    mutating func learn(_ part: Part, atLeast nanoseconds: UInt64) {
        measured[part.rawValue] = max(nanoseconds, measured[part.rawValue] ?? 0)
    }

    /// What was slow may have been the host's doing: it counts for less with time, so that a switchover is tried again some day.
    mutating func fade() {
        for index in measured.indices {
            guard let value = measured[index] else { continue }
            measured[index] = value - value / 16
        }
    }

    func nanoseconds(_ part: Part) -> UInt64 {
        measured[part.rawValue] ?? guessNanoseconds / 16 * Self.guessedShares[part.rawValue]
    }

    var total: UInt64 { Part.allCases.reduce(0) { $0 &+ min(nanoseconds($1), 1 << 60) } }

    /// What comes behind the moment at which the destination is told to start: the way there, and the start.
    func commit(roundTrip: UInt64) -> UInt64 { nanoseconds(.start) + roundTrip / 2 }
}
