import CommandLineKit
import Glibc

/// How numbers become places on an axis, and which of them are written beside it.
struct AxisScale: Sendable {
    var lower: Double
    var upper: Double
    var isLogarithmic: Bool
    /// The numbers that are written, ascending.
    var ticks: [Double]

    /// A scale from 0 (or the smallest) to at least the largest value, with round numbers at its ends.
    init(covering values: [Double], startsAtZero: Bool = true) {
        let finite = values.filter(\.isFinite)
        let largest = finite.max() ?? 1
        let smallest = startsAtZero ? min(0, finite.min() ?? 0) : finite.min() ?? 0
        let span = largest > smallest ? largest - smallest : max(1, abs(largest))
        let step = Self.roundStep(span / 5)
        isLogarithmic = false
        lower = (smallest / step).rounded(.down) * step
        upper = ((smallest + span) / step).rounded(.up) * step
        let count = Int(((upper - lower) / step).rounded())
        ticks = (0...max(1, min(count, 20))).map { [lower] in lower + Double($0) * step }
    }

    /// A scale whose equal distances are equal factors. Values that are not positive stand at its lower end.
    init(logarithmicCovering values: [Double]) {
        let positive = values.filter { $0.isFinite && $0 > 0 }
        let low = log10(positive.min() ?? 1).rounded(.down)
        let high = max(low + 1, log10(positive.max() ?? 10).rounded(.up))
        isLogarithmic = true
        lower = pow(10, low)
        upper = pow(10, high)
        ticks = stride(from: low, through: high, by: max(1, ((high - low) / 8).rounded(.up))).map { pow(10, $0) }
    }

    /// 1, 2 or 5 times a power of ten, at least the number given.
    static func roundStep(_ least: Double) -> Double {
        let power = pow(10, log10(least).rounded(.down))
        let factor = least / power
        return power * (factor <= 1.0001 ? 1 : factor <= 2.0001 ? 2 : factor <= 5.0001 ? 5 : 10)
    }

    /// Where a value lies: 0 at the lower end, 1 at the upper.
    func fraction(of value: Double) -> Double {
        guard value.isFinite else { return 0 }
        let place =
            isLogarithmic
            ? log10(max(value, lower) / lower) / log10(upper / lower) : (value - lower) / (upper - lower)
        return min(1, max(0, place))
    }

    /// A tick's text: as many digits as tell it from its neighbours.
    func text(of tick: Double) -> String {
        let gap = isLogarithmic ? tick : ticks.count > 1 ? ticks[1] - ticks[0] : 1
        let digits = gap >= 1 || gap <= 0 ? 0 : min(6, Int((-log10(gap)).rounded(.up)))
        guard abs(tick) >= 10_000 else { return Amount.decimal(tick, digits: digits) }
        let units = [(1e9, " G"), (1e6, " M"), (1e3, " k")]
        let (divisor, unit) = units.first { abs(tick) >= $0.0 } ?? (1, "")
        let scaled = tick / divisor
        return Amount.decimal(scaled, digits: scaled == scaled.rounded() ? 0 : 1) + unit
    }
}
