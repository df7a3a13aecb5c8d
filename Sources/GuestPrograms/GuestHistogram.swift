/// How long the accesses of a `probe` guest took: all vCPUs together.
public struct GuestHistogram: Equatable, Sendable {
    /// Eight buckets for each power of two.
    public static let bucketCount = 512

    /// Accesses by bucket; see ``lowerBoundTicks(bucket:)``.
    public let counts: [UInt64]
    /// TSC ticks of a millisecond.
    public let tscKilohertz: UInt64

    public init(counts: [UInt64], tscKilohertz: UInt64) {
        precondition(counts.count == Self.bucketCount, "a histogram has \(Self.bucketCount) buckets")
        self.counts = counts
        self.tscKilohertz = tscKilohertz
    }

    /// Read the histogram from guest memory.
    ///
    /// - Throws: ``GuestProgramError/notAGuest(reason:)`` if the memory is not that of a `probe`, and what `read` throws.
    public init(read: @escaping GuestMemoryReader) throws(GuestProgramError) {
        let memory = unsafe GuestMemoryView(read: read)
        let parameters = try memory.parameters()
        guard parameters.kind == GuestProgram.Kind.probe.rawValue else {
            throw .notAGuest(reason: "only the guest 'probe' keeps a histogram")
        }
        var sums = [UInt64](repeating: 0, count: Self.bucketCount)
        for index in 0..<parameters.cpus {
            let address = GuestLayout.histograms + index * GuestLayout.pageBytes
            for (bucket, count) in try memory.words(at: address, count: Self.bucketCount).enumerated() {
                sums[bucket] &+= count
            }
        }
        self.init(counts: sums, tscKilohertz: parameters.millisecond)
    }

    /// All accesses counted.
    public var total: UInt64 { counts.reduce(0, &+) }

    /// The shortest time that falls into a bucket: bucket 8e + m starts at (1 + m/8) * 2^e ticks.
    public static func lowerBoundTicks(bucket: Int) -> Double {
        Double(UInt64(1) << UInt64(bucket / 8)) * (1 + Double(bucket % 8) / 8)
    }

    /// The time in nanoseconds which the given share (0 to 1) of the accesses does not exceed, to the precision of a bucket; nil
    /// without accesses.
    public func nanoseconds(quantile: Double) -> Double? {
        let total = total
        guard total > 0 else { return nil }
        var left = quantile * Double(total)
        for (bucket, count) in counts.enumerated() where count > 0 {
            left -= Double(count)
            guard left <= 0 else { continue }
            let upper = bucket + 1 < Self.bucketCount ? Self.lowerBoundTicks(bucket: bucket + 1) : 0x1p64
            return upper * 1e6 / Double(tscKilohertz)
        }
        return counts.lastIndex { $0 > 0 }.map { Self.lowerBoundTicks(bucket: $0 + 1) * 1e6 / Double(tscKilohertz) }
    }
}
