/// How a dirty rate is measured, by QEMU's names (`DirtyRateMeasureMode`).
public enum DirtyRateMode: String, Sendable, CaseIterable {
    /// Some pages are looked at twice; the guest notices nothing.
    case pageSampling = "page-sampling"
    /// Written pages are tracked and counted.
    case dirtyBitmap = "dirty-bitmap"
    /// Each vCPU's written pages are counted in its dirty ring.
    case dirtyRing = "dirty-ring"
}

/// What to measure (`calc-dirty-rate`).
public struct DirtyRateRequest: Sendable, Equatable {
    public enum Unit: String, Sendable, CaseIterable {
        case second, millisecond

        /// The measuring times allowed, in this unit.
        public var range: ClosedRange<Int64> { self == .second ? 1...60 : 100...60_000 }
        public var symbol: String { self == .second ? "s" : "ms" }
        public var nanoseconds: UInt64 { self == .second ? 1_000_000_000 : 1_000_000 }
    }

    public static let samplePagesRange: ClosedRange<Int64> = 128...16_384
    public static let defaultSamplePages: Int64 = 512

    public let mode: DirtyRateMode
    public let nanoseconds: UInt64
    /// Per GiB, and at least so many per RAM block; 0 in modes that sample none.
    public let samplePages: UInt64

    /// - Parameter samplePages: `nil` for the default.
    /// - Throws: `MigrationError` naming the value out of range.
    public init(
        mode: DirtyRateMode = .pageSampling, calcTime: Int64, unit: Unit = .second, samplePages: Int64? = nil
    ) throws(MigrationError) {
        guard unit.range.contains(calcTime) else {
            throw MigrationError(
                "calc-dirty-rate: calc-time \(calcTime) \(unit.symbol) is out of range: "
                    + "\(unit.range.lowerBound) to \(unit.range.upperBound) \(unit.symbol) can be measured")
        }
        if let samplePages {
            guard mode == .pageSampling else {
                throw MigrationError(
                    "calc-dirty-rate: sample-pages is used in page-sampling mode only, not in \(mode.rawValue)")
            }
            let range = Self.samplePagesRange
            guard range.contains(samplePages) else {
                throw MigrationError(
                    "calc-dirty-rate: sample-pages \(samplePages) is out of range: "
                        + "\(range.lowerBound) to \(range.upperBound) pages of each GiB can be looked at")
            }
        }
        self.mode = mode
        nanoseconds = UInt64(calcTime) * unit.nanoseconds
        self.samplePages = mode == .pageSampling ? UInt64(samplePages ?? Self.defaultSamplePages) : 0
    }
}

/// What is known about the dirty rate (`query-dirty-rate`).
public struct DirtyRateInfo: Sendable, Equatable {
    public enum Status: String, Sendable { case unstarted, measuring, measured }

    public var status = Status.unstarted
    public var request: DirtyRateRequest?
    /// When measuring began, in seconds since 1970.
    public var startSeconds: UInt64 = 0
    /// Memory written; `nil` until it was measured.
    public var bytesPerSecond: Double?
    /// The same by vCPU, in dirty-ring mode.
    public var bytesPerSecondByCPU: [Double]?
    /// Why the last measurement came to nothing, as a sentence.
    public var failure: String?

    public init() {}
}
