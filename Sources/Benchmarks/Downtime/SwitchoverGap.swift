import CommandLineKit
import QMP

/// How long a guest stood still in the switchover that was committed, by its own clock.
///
/// The guest keeps its last gaps of a millisecond or more, with both ends. The one that spans the change of host began with its last look
/// at the clock at the source, whose memory still holds that look.
struct SwitchoverGap: Equatable {
    /// Where it is not certain: the most it can have been.
    let milliseconds: Double
    /// Whether the guest's record tells which gap it was.
    let isCertain: Bool
    /// From the last look at the source to the first at the destination, on the guest's clock; `nil` where that is not kept.
    let span: ClosedRange<Double>?
    /// The longest gap behind it, at the destination: the host's doing.
    let laterMilliseconds: Double

    private struct Gap {
        let ticks: UInt64
        let end: UInt64
        var start: UInt64 { end &- ticks }
    }

    /// - Parameters:
    ///   - here: what `x-query-guest` answers at the source, for good.
    ///   - there: the same at the destination, once the guest has looked at its clock there twice: a gap is kept
    ///     just behind the look that ends it.
    /// - Throws: `CommandFailure` for a guest that does not tell.
    init(from here: JSON, to there: JSON) throws(CommandFailure) {
        guard let kilohertz = there["tsc-kilohertz"]?.integerValue(as: UInt64.self), kilohertz > 0,
            let last = Self.lastLook(here), let before = Self.count("long-gaps", here),
            let after = Self.count("long-gaps", there), after >= before,
            let longest = Self.count("longest-gap-ticks", there),
            let kept = Self.cpu(there)?["latest-long-gaps"]?.arrayValue
        else { throw CommandFailure("the guest does not tell its gaps") }
        let gaps = kept.compactMap { gap -> Gap? in
            guard let ticks = gap["ticks"]?.integerValue(as: UInt64.self),
                let end = gap["end"]?.integerValue(as: UInt64.self)
            else { return nil }
            return Gap(ticks: ticks, end: end)
        }
        let fresh = gaps.suffix(Int(min(after - before, UInt64(gaps.count))))
        // It may have been stopped between a look and the note of it.
        let own = fresh.filter { $0.start >= last && $0.start - last < kilohertz }.max { $0.ticks < $1.ticks }
        let later = fresh.filter { $0.start >= last && $0.start - last >= kilohertz }.map(\.ticks).max()
        func time(_ ticks: UInt64) -> Double { Double(ticks) / Double(kilohertz) }
        laterMilliseconds = later.map(time) ?? 0
        span = own.map { time($0.start)...time($0.end) }
        if let own {
            (milliseconds, isCertain) = (time(own.ticks), true)
        } else if after - before <= UInt64(gaps.count) {
            // No gap worth keeping began there.
            (milliseconds, isCertain) = (1, true)
        } else {
            // So many came behind it that it is not kept any more.
            (milliseconds, isCertain) = (max(1, time(longest)), false)
        }
    }

    /// The time stamp counter at the guest's last look at it.
    static func lastLook(_ guest: JSON) -> UInt64? { count("last-tsc", guest) }

    private static func cpu(_ guest: JSON) -> JSON? { guest["cpus"]?.arrayValue?.first }

    private static func count(_ name: String, _ guest: JSON) -> UInt64? {
        cpu(guest)?[name]?.integerValue(as: UInt64.self)
    }
}
