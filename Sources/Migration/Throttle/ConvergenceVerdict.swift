/// Whether a migration gets to its end by itself, as values and as a sentence (`x-verdict`).
public struct ConvergenceVerdict: Sendable, Equatable {
    public enum State: String, Sendable { case observing, converging, notConverging = "not-converging" }

    public var state: State
    /// Until the guest runs at the destination, from when the verdict was asked for.
    public var remainingNanoseconds: UInt64?
    /// The whole migration.
    public var totalNanoseconds: UInt64?
    public var downtimeNanoseconds: UInt64?
    /// Distinct pages that the guest dirties in a round, in bytes per second.
    public var uniqueBytesPerSecond: UInt64?
    public var linkBytesPerSecond: UInt64?
    /// What would help, the cheapest first.
    public var remedies: [ConvergenceRemedy] = []
    /// To what the guest is or will be throttled, in percent.
    public var throttlePercentage: UInt64 = 0
    public var downtimeLimitNanoseconds: UInt64 = 0
    /// Whether `max-bandwidth` is what limits the link.
    public var isCapped = false

    public init(_ state: State) { self.state = state }

    /// What a forecast says.
    /// - Parameter worst: by which remedies are found; `nil`: the same.
    public init(
        _ forecast: ConvergenceForecast, worst: ConvergenceForecast? = nil, elapsedSeconds: Double, isCapped: Bool
    ) {
        let outcome = forecast.outcome()
        self.init(outcome.converges ? .converging : .notConverging)
        linkBytesPerSecond = Self.whole(forecast.link.bytesPerSecond)
        uniqueBytesPerSecond = Self.whole(outcome.uniqueBytesPerSecond)
        downtimeLimitNanoseconds = forecast.policy.downtimeLimitNanoseconds
        throttlePercentage = outcome.throttlePercentage
        self.isCapped = isCapped
        downtimeNanoseconds = Self.whole(outcome.downtimeSeconds * 1e9)
        if outcome.converges {
            remainingNanoseconds = Self.whole(outcome.seconds * 1e9)
            totalNanoseconds = Self.whole((outcome.seconds + elapsedSeconds) * 1e9)
        } else {
            remedies = (worst ?? forecast).remedies(isCapped: isCapped)
        }
    }

    private static func whole(_ value: Double) -> UInt64 { UInt64(min(max(value, 0), 1e18)) }

    /// One sentence without its full stop.
    public var sentence: String {
        switch state {
        case .observing: return "observing how the guest writes"
        case .converging:
            let throttled = throttlePercentage > 0 ? ", the guest throttled to \(throttlePercentage) %" : ""
            return "converging: about \(Self.time(remainingNanoseconds ?? 0)) to go, downtime about "
                + "\(Self.time(downtimeNanoseconds ?? 0))\(throttled)"
        case .notConverging: return "not converging: \(cause)\(advice)"
        }
    }

    private var cause: String {
        let (unique, link) = (uniqueBytesPerSecond ?? 0, linkBytesPerSecond ?? 0)
        if Double(unique) >= Double(link) * 0.95 {
            return "the guest dirties \(Self.rate(unique)) of distinct pages, the link carries \(Self.rate(link))"
        }
        return "what a round leaves would stop the guest for \(Self.time(downtimeNanoseconds ?? 0)), the limit is "
            + "\(Self.time(downtimeLimitNanoseconds))"
    }

    private var advice: String {
        switch remedies.first {
        case nil: "; neither a longer downtime, nor more bandwidth, nor auto-converge would help within reason"
        case .downtimeLimit(let milliseconds):
            "; a downtime-limit of \(milliseconds) ms would do"
        case .bandwidth(let rate):
            isCapped ? "; a max-bandwidth of \(Self.rate(rate)) would do" : "; a link of \(Self.rate(rate)) would do"
        case .autoConverge(let percentage): "; auto-converge would do, throttling it to about \(percentage) %"
        }
    }

    /// `612 MB/s`.
    static func rate(_ bytesPerSecond: UInt64) -> String {
        bytesPerSecond < 9_950_000
            ? "\(tenths(Double(bytesPerSecond) / 1e6)) MB/s" : "\((bytesPerSecond + 500_000) / 1_000_000) MB/s"
    }

    /// `45 ms`, `3.2 s`.
    static func time(_ nanoseconds: UInt64) -> String {
        switch nanoseconds {
        case ..<999_500_000: "\((nanoseconds + 500_000) / 1_000_000) ms"
        case ..<99_500_000_000: "\(tenths(Double(nanoseconds) / 1e9)) s"
        default: "\((nanoseconds + 500_000_000) / 1_000_000_000) s"
        }
    }

    private static func tenths(_ value: Double) -> String {
        let tenths = UInt64((value * 10).rounded())
        return "\(tenths / 10).\(tenths % 10)"
    }
}
