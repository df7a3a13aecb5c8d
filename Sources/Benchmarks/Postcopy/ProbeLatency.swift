import CommandLineKit
import GuestPrograms
import QMP

/// What a guest felt of its missing pages: of the accesses that it timed itself at its destination, the slowest, as many as pages were
/// fetched because somebody waited.
///
/// Nothing marks an access that met a missing page. The others take a thousandth of that; one of them that the host or a timer held up may
/// still be among the slowest, and then counts, for the guest waited.
struct ProbeLatency: Equatable, Sendable {
    /// By bucket of `GuestHistogram`.
    private let counts: [UInt64]
    private let tscKilohertz: UInt64
    let count: UInt64

    /// - Parameters:
    ///   - here: what `x-guest-histogram` answers at the source, where the guest stands for good.
    ///   - there: the same at the destination.
    ///   - fetched: how many pages somebody waited for.
    /// - Throws: `CommandFailure` for a guest that does not tell, or that did nothing there.
    init(from here: JSON, to there: JSON, fetched: UInt64) throws(CommandFailure) {
        let before = try Self.histogram(here)
        let after = try Self.histogram(there)
        var left = fetched
        var counts = [UInt64](repeating: 0, count: GuestHistogram.bucketCount)
        for bucket in counts.indices.reversed() where left > 0 && after.counts[bucket] > before.counts[bucket] {
            counts[bucket] = min(left, after.counts[bucket] - before.counts[bucket])
            left -= counts[bucket]
        }
        self.counts = counts
        count = fetched - left
        tscKilohertz = after.tscKilohertz
        guard count > 0 else { throw CommandFailure("the guest waited for no page at its destination") }
    }

    private static func histogram(_ json: JSON) throws(CommandFailure) -> GuestHistogram {
        let counts = (json["counts"]?.arrayValue ?? []).compactMap { $0.integerValue(as: UInt64.self) }
        guard let kilohertz = json["tsc-kilohertz"]?.integerValue(as: UInt64.self), kilohertz > 0,
            counts.count == GuestHistogram.bucketCount
        else { throw CommandFailure("x-guest-histogram does not tell counts and the rate of the clock") }
        return GuestHistogram(counts: counts, tscKilohertz: kilohertz)
    }

    /// So many of a thousand took at most this long, to the precision of a bucket (an eighth), whose middle is told.
    func microseconds(atMille share: UInt64) -> Double {
        var left = max(1, (count * share + 999) / 1000)
        for (bucket, count) in counts.enumerated() where count > 0 {
            if count >= left { return Self.ticks(bucket) * 1e3 / Double(tscKilohertz) }
            left -= count
        }
        return .nan
    }

    private static func ticks(_ bucket: Int) -> Double {
        let start = GuestHistogram.lowerBoundTicks(bucket: bucket)
        return (start + GuestHistogram.lowerBoundTicks(bucket: bucket + 1)) / 2
    }
}
