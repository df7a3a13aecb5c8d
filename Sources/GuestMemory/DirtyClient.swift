/// Who asks which pages were written. Each has records of its own; what one collects stays reported to the others.
public enum DirtyClient: Int, Sendable, CaseIterable {
    /// The screen: which lines to draw again.
    case display
    /// The interpreter: which decoded blocks are stale.
    case code
    case migration
    /// Dirty rate.
    case measurement
    /// A guest whose memory is still to come, and which is given back to its source epoch by epoch. Pages that are placed count for
    /// nothing, those that the guest or the monitor writes do.
    case safetyNet
}
