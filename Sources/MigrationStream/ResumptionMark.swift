/// The PINGs that a source says between pages with ``FeatureSet/resumption``: the PONG tells that all pages before have been placed.
public struct ResumptionMark: Hashable, Sendable {
    /// Counts from 0, and starts over after 2^24.
    public let number: UInt32

    public init(number: UInt32) { self.number = number & 0xff_ffff }

    /// - Returns: nil when a PONG of that value answers another PING.
    public init?(pong value: UInt32) {
        guard value >> 24 == Self.kind else { return nil }
        self.init(number: value)
    }

    /// What PING and PONG carry.
    public var pingValue: UInt32 { Self.kind << 24 | number }
    public var next: ResumptionMark { ResumptionMark(number: number &+ 1) }

    /// "M".
    private static let kind: UInt32 = 0x4d
}
