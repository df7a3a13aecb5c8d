import Glibc

/// What would make a migration converge that does not.
public enum ConvergenceRemedy: Hashable, Sendable {
    /// `downtime-limit`.
    case downtimeLimit(milliseconds: UInt64)
    /// `max-bandwidth`, or a faster link where that is not what limits it.
    case bandwidth(bytesPerSecond: UInt64)
    /// The capability `auto-converge`, which will throttle the guest to about that.
    case autoConverge(percentage: UInt64)
}

extension ConvergenceForecast {
    /// Larger steps are not proposed.
    private static let steps =
        [1.15, 1.3, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    /// A remedy must work, too, where a seventh of what it gives is lost to a link or a host that is slower for a while.
    private static let margin = 0.85
    /// A standstill above this is no remedy.
    private static let longestDowntime: UInt64 = 10_000_000_000

    /// What works by this model, the cheapest first. A migration asks the worst model that its rounds leave room for.
    ///
    /// - Parameter isCapped: whether `max-bandwidth` is what limits the link.
    public func remedies(isCapped: Bool) -> [ConvergenceRemedy] {
        var found: [(remedy: ConvergenceRemedy, cost: Double)] = []
        if let (limit, factor) = shortestDowntime() { found.append((.downtimeLimit(milliseconds: limit), factor)) }
        if let (rate, factor) = leastBandwidth() {
            // More than there is costs more than a number that is changed; and whether a link carries more than it had to is not known.
            found.append((.bandwidth(bytesPerSecond: rate), isCapped ? factor * 1.2 : factor * 4))
        }
        if let percentage = throttle() {
            found.append((.autoConverge(percentage: percentage), 100 / Double(100 - min(percentage, 99))))
        }
        return found.sorted { $0.cost < $1.cost }.map(\.remedy)
    }

    private func shortestDowntime() -> (milliseconds: UInt64, factor: Double)? {
        for step in Self.steps {
            let wanted = Self.round(Double(max(policy.downtimeLimitNanoseconds, 1_000_000)) * step / 1e6)
            guard wanted * 1_000_000 <= Self.longestDowntime else { return nil }
            var other = self
            other.policy.downtimeLimitNanoseconds = counted(wanted * 1_000_000)
            if other.outcome().converges { return (wanted, step) }
        }
        return nil
    }

    private func leastBandwidth() -> (bytesPerSecond: UInt64, factor: Double)? {
        for step in Self.steps {
            var other = self
            let wanted = Self.round(min(link.bytesPerSecond, 1e15) * step / 1e6) * 1_000_000
            other.link.bytesPerSecond = Double(wanted) * Self.margin
            other.policy.downtimeLimitNanoseconds = counted(policy.downtimeLimitNanoseconds)
            other.policy.availableBytesPerSecond = nil
            if other.outcome().converges { return (wanted, step) }
        }
        return nil
    }

    /// Of a downtime limit, what may be counted on for the pages.
    private func counted(_ limit: UInt64) -> UInt64 {
        let fixed = UInt64(min(max(link.overheadSeconds, 0), 1e6) * 1e9)
        let useful = UInt64(Double(limit) * Self.margin)
        return max(useful - min(useful, fixed), limit / 2)
    }

    private func throttle() -> UInt64? {
        guard autoConverge == nil else { return nil }
        var other = self
        other.policy.downtimeLimitNanoseconds = counted(policy.downtimeLimitNanoseconds)
        other.autoConverge = AutoConverge()
        let outcome = other.outcome()
        return outcome.converges ? max(outcome.throttlePercentage, AutoConverge.Settings().initial) : nil
    }

    /// Up, to two digits: what is proposed is an estimate.
    private static func round(_ value: Double) -> UInt64 {
        guard value >= 1 else { return 1 }
        let unit = pow(10, max(0, (log10(value)).rounded(.down) - 1))
        return UInt64((value / unit - 1e-9).rounded(.up) * unit)
    }
}
