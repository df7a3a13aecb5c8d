import Glibc

/// What becomes of a migration: the rounds to come, reckoned from how the guest writes, what the link carries, and the very
/// `SwitchoverPolicy` that will decide.
///
/// A page is found dirty after a round if it was written since it was sent in it, or, where it was not sent, since the collect
/// before. So each class has its part that is in the round and its part that is not, and both go their way.
public struct ConvergenceForecast: Sendable {
    /// What carries the pages.
    public struct Link: Sendable, Equatable {
        public var bytesPerSecond: Double
        /// On the wire, with the record's head.
        public var bytesPerPage = 4096.0 + 8
        /// What a round takes besides sending: collecting, above all.
        public var roundSeconds = 0.0005
        /// From the decision to switch until the guest stands still.
        public var drainSeconds = 0.001
        /// The part of the downtime that is not sending.
        public var overheadSeconds = 0.005

        public init(bytesPerSecond: Double) { self.bytesPerSecond = bytesPerSecond }
    }

    public var model: WriteModel
    public var link: Link
    public var policy: SwitchoverPolicy
    /// How the guest is throttled from here on; `nil`: not at all.
    public var autoConverge: AutoConverge?
    /// Pages to be sent now, by class; `nil`: all, it is the first round.
    public var dirtyPages: [Double]?
    /// Pages of the first round that are zeroes, and cost next to nothing.
    public var zeroPages = 0.0
    /// Parts in which a round has pages watched afresh, each just before it is sent.
    public var chunkCount = 16
    /// The same of what is written later: of the parts that hold such pages; `nil`: all.
    public var writtenChunkCount: Int?
    /// What takes longer does not converge.
    public var horizonSeconds = 600.0

    public init(model: WriteModel, link: Link, policy: SwitchoverPolicy) {
        self.model = model
        self.link = link
        self.policy = policy
    }

    public struct Outcome: Sendable, Equatable {
        public var converges: Bool
        /// Until the guest runs at the destination; of what does not converge: until that was clear.
        public var seconds: Double
        public var downtimeSeconds: Double
        public var rounds: Int
        /// Pages left for the standstill, or at the last collect.
        public var remainingPages: Double
        /// The throttle at the end, in percent.
        public var throttlePercentage: UInt64
        /// Of the last round: distinct bytes dirtied in it per second.
        public var uniqueBytesPerSecond: Double
    }

    /// Moments of the activity's period at which the migration may begin.
    private static let startCount = 7
    private static let mostRounds = 3000

    /// The outcome for most moments at which the migration may begin, times in the middle of them.
    public func outcome() -> Outcome {
        let period = model.activity.period
        guard period > 0 else { return outcome(from: 0) }
        let all = (0..<Self.startCount).map { outcome(from: period * Double($0) / Double(Self.startCount)) }
        let likely = all.filter(\.converges).count * 2 > all.count
        let those = all.filter { $0.converges == likely }.sorted { $0.seconds < $1.seconds }
        var middle = those[those.count / 2]
        middle.downtimeSeconds = those.map(\.downtimeSeconds).sorted()[those.count / 2]
        return middle
    }

    /// The outcome of a migration that begins at a moment of the model's activity.
    func outcome(from moment: Double) -> Outcome {
        var run = Run(self, at: moment)
        while run.rounds < Self.mostRounds, run.clock < horizonSeconds, !run.isHopeless {
            if run.sendRound() { return run.outcome(converges: true) }
        }
        return run.outcome(converges: false)
    }

    /// Where a migration stands.
    private struct Run {
        let forecast: ConvergenceForecast
        let start: Double
        var policy: SwitchoverPolicy
        var throttle: AutoConverge?
        var dirty: [Double]
        var savedBytes: Double
        var clock = 0.0
        var rounds = 0
        var uniqueBytesPerSecond = 0.0
        private var least = Double.infinity
        private var leastAt = 0.0
        private var leastRound = 0

        init(_ forecast: ConvergenceForecast, at moment: Double) {
            self.forecast = forecast
            start = moment
            policy = forecast.policy
            throttle = forecast.autoConverge
            dirty = forecast.dirtyPages ?? forecast.model.classes.map(\.pages)
            savedBytes = forecast.dirtyPages == nil ? forecast.zeroPages * forecast.link.bytesPerPage : 0
            _ = policy.decide(remainingPages: Self.whole(remaining))
        }

        var remaining: Double { dirty.reduce(0, +) }
        private var pace: Double { 1 - Double(throttle?.percentage ?? 0) / 100 }

        private static func whole(_ pages: Double) -> UInt64 { UInt64(min(max(pages, 0), 1e15)) }

        /// - Returns: whether the guest is stopped now.
        mutating func sendRound() -> Bool {
            let link = forecast.link
            let pages = remaining
            let bytes = max(0, pages * link.bytesPerPage - savedBytes)
            savedBytes = 0
            let sending = bytes / max(link.bytesPerSecond, 1)
            let seconds = sending + link.roundSeconds
            let before = dirty
            writePages(seconds: seconds, sent: true)
            rounds += 1
            policy.sent(
                RoundReport(
                    pages: Self.whole(pages), bytes: Self.whole(bytes),
                    nanoseconds: Self.whole(max(sending * 1e9, 1))))
            uniqueBytesPerSecond = remaining * 4096 / seconds
            let old = throttle?.percentage
            let dirtyBytes = Self.whole(remaining * 4096)
            throttle?.collected(
                dirtyBytes: dirtyBytes, sentBytes: Self.whole(bytes),
                nanoseconds: Self.whole(seconds * 1e9))
            if throttle?.percentage != old { (least, leastAt, leastRound) = (.infinity, clock, rounds) }
            note(isProgress: zip(dirty, before).contains { $0 != $1 })
            guard policy.decide(remainingPages: Self.whole(remaining)) == .switchOver else { return false }
            writePages(seconds: link.drainSeconds, sent: false)
            return policy.decide(remainingPages: Self.whole(remaining)) == .switchOver
        }

        /// The guest writes while a round is sent, or while none is.
        private mutating func writePages(seconds: Double, sent: Bool) {
            let activity = forecast.model.activity
            let (from, to) = (start + clock, start + clock + seconds)
            let end = activity.exposure(until: to)
            let whole = (end - activity.exposure(until: from)) * pace
            // Of many chunks the middles of so many are as good.
            let isFirst = rounds == 0 && forecast.dirtyPages == nil
            let chunks = isFirst ? forecast.chunkCount : forecast.writtenChunkCount ?? forecast.chunkCount
            let count = sent ? min(max(chunks, 1), 24) : 0
            let shift = chunks > count ? 0.5 : 0
            let exposures = (0..<count).map { chunk in
                (end - activity.exposure(until: from + seconds * (Double(chunk) + shift) / Double(count))) * pace
            }
            for (index, group) in forecast.model.classes.enumerated() {
                guard group.perSecond > 0 else {
                    if sent { dirty[index] = 0 }
                    continue
                }
                let written = 1 - exp(-group.perSecond * whole)
                var again = dirty[index]
                if sent {
                    let chance = exposures.reduce(0) { $0 + 1 - exp(-group.perSecond * $1) }
                    again *= chance / Double(max(count, 1))
                }
                dirty[index] = again + max(0, group.pages - dirty[index]) * written
            }
            clock += seconds
        }

        private mutating func note(isProgress: Bool) {
            if remaining < least * 0.995 { (least, leastAt, leastRound) = (remaining, clock, rounds) }
            if !isProgress { leastRound = .min / 2 }
        }

        /// Rounds have not become shorter for long, through all that the guest's activity is like.
        var isHopeless: Bool {
            rounds - leastRound > 40 && clock - leastAt > 3 * forecast.model.activity.period
                && (throttle.map { clock - leastAt > 4 || $0.percentage >= $0.settings.maximum } ?? true)
        }

        func outcome(converges: Bool) -> Outcome {
            let link = forecast.link
            let rate = policy.availableBytesPerSecond.map(Double.init) ?? link.bytesPerSecond
            let downtime = remaining * link.bytesPerPage / max(rate, 1) + link.overheadSeconds
            return Outcome(
                converges: converges, seconds: converges ? clock + downtime : clock, downtimeSeconds: downtime,
                rounds: rounds, remainingPages: remaining, throttlePercentage: throttle?.percentage ?? 0,
                uniqueBytesPerSecond: uniqueBytesPerSecond)
        }
    }
}
