/// How long something took, many times: exact enough for percentiles (each bucket is a sixteenth of a power of two), small and of fixed
/// size.
public struct LatencyHistogram: Sendable, Equatable {
    private static let finest = 4
    private static let perOctave: UInt64 = 1 << UInt64(finest)
    private var counts = [UInt64](repeating: 0, count: (64 - finest + 1) << finest)
    public private(set) var count: UInt64 = 0
    public private(set) var longestNanoseconds: UInt64 = 0
    private var sum: UInt64 = 0

    public init() {}

    public mutating func record(_ nanoseconds: UInt64) {
        counts[Self.bucket(of: nanoseconds)] += 1
        count += 1
        sum &+= nanoseconds
        longestNanoseconds = max(longestNanoseconds, nanoseconds)
    }

    public var meanNanoseconds: UInt64 { count == 0 ? 0 : sum / count }

    /// So many of a thousand took at most this long. 0 where nothing was recorded.
    public func nanoseconds(atMille share: UInt64) -> UInt64 {
        guard count > 0 else { return 0 }
        var left = max(1, (count * share + 999) / 1000)
        for (index, count) in counts.enumerated() where count > 0 {
            if count >= left { return min(Self.end(of: index), longestNanoseconds) }
            left -= count
        }
        return longestNanoseconds
    }

    /// Counts by powers of two: element n is for 2^n up to 2^(n+1) microseconds; what took less than one is in the first.
    public func octaves(_ length: Int) -> [UInt64] {
        var octaves = [UInt64](repeating: 0, count: length)
        for (index, count) in counts.enumerated() where count > 0 {
            let microseconds = Self.start(of: index) / 1000
            let octave = microseconds == 0 ? 0 : 63 - microseconds.leadingZeroBitCount
            octaves[min(octave, length - 1)] += count
        }
        return octaves
    }

    // MARK: Buckets

    private static func bucket(of value: UInt64) -> Int {
        guard value >= perOctave else { return Int(value) }
        let exponent = 63 - value.leadingZeroBitCount
        return (exponent - finest + 1) << finest | Int(value >> UInt64(exponent - finest) & (perOctave - 1))
    }

    private static func start(of bucket: Int) -> UInt64 {
        guard bucket >= Int(perOctave) else { return UInt64(bucket) }
        let exponent = UInt64(bucket >> finest) - 1
        return (perOctave | UInt64(bucket) & (perOctave - 1)) << exponent
    }

    private static func end(of bucket: Int) -> UInt64 {
        guard bucket + 1 < (64 - finest + 1) << finest else { return .max }
        return start(of: bucket + 1) - 1
    }
}
