/// Which means of dirty tracking a machine is made with: it has one for life.
public enum DirtyTrackingChoice: Sendable, Equatable {
    /// What is faster: the log. A ring was never faster by more than the noise, and cost up to a tenth more time at high rates.
    case automatic
    case log
    /// A ring of so many entries for each vCPU; `nil` for as many as the kernel allows.
    case ring(entryCount: Int?)

    /// The smallest ring: a page of entries.
    public static let fewestRingEntries = 256

    /// - Parameter limit: the most entries the kernel allows, 0 if it has no rings.
    /// - Returns: the entries of each ring; `nil` for the log.
    /// - Throws: naming what the kernel lacks, or the sizes it allows.
    public func ringEntries(limit: Int) throws(AcceleratorError) -> Int? {
        switch self {
        case .log, .automatic: return nil
        case .ring(let wanted):
            guard limit > 0 else {
                throw AcceleratorError(
                    "this kernel's KVM has no dirty ring (KVM_CAP_DIRTY_LOG_RING_ACQ_REL); use dirty-tracking=log, "
                        + "or Linux 6.0 or newer on x86")
            }
            guard let wanted else { return limit }
            guard wanted.nonzeroBitCount == 1, (Self.fewestRingEntries...limit).contains(wanted) else {
                throw AcceleratorError(
                    "dirty-ring-size=\(wanted): a dirty ring has a power of two of entries, \(Self.fewestRingEntries) to "
                        + "\(limit) with this kernel")
            }
            return wanted
        }
    }
}

/// Which means of dirty tracking a machine has.
public struct DirtyTrackingFacts: Sendable, Equatable, CustomStringConvertible {
    /// `log` or `ring`.
    public let method: String
    /// Entries of each vCPU's ring; `nil` with the log.
    public let ringEntries: Int?
    /// Pages are write-protected chunk by chunk, as they are sent, instead of all at once (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
    public let protectsManually: Bool

    public init(method: String, ringEntries: Int?, protectsManually: Bool) {
        self.method = method
        self.ringEntries = ringEntries
        self.protectsManually = protectsManually
    }

    /// `ring of 65536 entries, manual protect off`
    public var description: String {
        let means = ringEntries.map { "ring of \($0) entries" } ?? method
        return "\(means), manual protect \(protectsManually ? "on" : "off")"
    }
}
