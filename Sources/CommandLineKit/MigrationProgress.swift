/// What readings taken one after the other say together: rates, how far it is, how long it takes.
public struct MigrationProgress: Sendable {
    /// The figures of the live line.
    public struct Figures: Equatable, Sendable {
        public var status: String
        public var round: UInt64
        /// 0 to 100, of the most that ever was to be sent.
        public var percent: Double
        public var bytesPerSecond: Double
        public var dirtyBytesPerSecond: Double
        /// `nil` while it is not known.
        public var expectedDowntimeNanoseconds: UInt64?
        /// `nil` while the guest dirties memory faster than it is sent.
        public var nanosecondsLeft: UInt64?
        /// The VM's own verdict; where it has none, the line goes by the figures above.
        public var verdict: VerdictReading?
        public var throttlePercentage: UInt64?
        /// How often a guest that moved asked for pages, what that took, and how many pages it does not have.
        public var requests: UInt64
        public var latency: LatencyReading?
        public var pagesLeft: UInt64

        public init(
            status: String, round: UInt64, percent: Double, bytesPerSecond: Double, dirtyBytesPerSecond: Double,
            expectedDowntimeNanoseconds: UInt64? = nil, nanosecondsLeft: UInt64? = nil, verdict: VerdictReading? = nil,
            throttlePercentage: UInt64? = nil, requests: UInt64 = 0, latency: LatencyReading? = nil,
            pagesLeft: UInt64 = 0
        ) {
            self.status = status
            self.round = round
            self.percent = percent
            self.bytesPerSecond = bytesPerSecond
            self.dirtyBytesPerSecond = dirtyBytesPerSecond
            self.expectedDowntimeNanoseconds = expectedDowntimeNanoseconds
            self.nanosecondsLeft = nanosecondsLeft
            self.verdict = verdict
            self.throttlePercentage = throttlePercentage
            self.requests = requests
            self.latency = latency
            self.pagesLeft = pagesLeft
        }
    }

    private struct Sample {
        let nanoseconds: UInt64
        let transferredBytes: UInt64
    }

    /// Rates are means over this long.
    static let windowNanoseconds: UInt64 = 500_000_000

    private var samples: [Sample] = []
    private var mostRemainingBytes: UInt64 = 0

    public init() {}

    /// Takes the next reading. - Parameter nanoseconds: when it was taken, on a clock that does not go backwards.
    public mutating func take(_ reading: MigrationReading, at nanoseconds: UInt64) -> Figures {
        samples.append(Sample(nanoseconds: nanoseconds, transferredBytes: reading.transferredBytes))
        // One sample older than the window stays: the rate spans all of it.
        while samples.count > 2, samples[1].nanoseconds + Self.windowNanoseconds <= nanoseconds {
            samples.removeFirst()
        }
        mostRemainingBytes = max(mostRemainingBytes, reading.remainingBytes)
        let rate = bytesPerSecond(fallback: reading.megabitsPerSecond * 125_000)
        let dirtyRate = Double(reading.dirtyPagesPerSecond) * Double(reading.pageBytes)
        let isDone = reading.status == "completed"
        let sent = mostRemainingBytes == 0 ? 0 : 1 - Double(reading.remainingBytes) / Double(mostRemainingBytes)
        return Figures(
            status: reading.status, round: reading.round, percent: isDone ? 100 : 100 * sent, bytesPerSecond: rate,
            dirtyBytesPerSecond: dirtyRate,
            expectedDowntimeNanoseconds: reading.expectedDowntimeMilliseconds.map { $0 &* 1_000_000 },
            nanosecondsLeft: Self.timeLeft(remaining: reading.remainingBytes, at: rate - dirtyRate),
            verdict: reading.verdict, throttlePercentage: reading.throttlePercentage,
            requests: reading.postcopyRequests,
            latency: reading.pageLatency, pagesLeft: reading.remainingBytes / max(1, reading.pageBytes))
    }

    private func bytesPerSecond(fallback: Double) -> Double {
        guard let first = samples.first, let last = samples.last, last.nanoseconds > first.nanoseconds else {
            return fallback
        }
        let sent = last.transferredBytes > first.transferredBytes ? last.transferredBytes - first.transferredBytes : 0
        return Double(sent) * 1e9 / Double(last.nanoseconds - first.nanoseconds)
    }

    private static func timeLeft(remaining: UInt64, at rate: Double) -> UInt64? {
        if remaining == 0 { return 0 }
        guard rate > 0 else { return nil }
        return UInt64(exactly: (Double(remaining) / rate * 1e9).rounded())
    }
}
