/// Whether it is worth trying to compress the next packet: contents that did not shrink are seldom followed by such that do.
///
/// Only where a packet may go plain, which QEMU's wire does not allow in a compressed migration. After a failure 1, 2, 4, ... packets go
/// without a try, at most 16: what shrinks again is noticed within 8 MiB.
public struct ShrinkWatch: Sendable {
    private var pause = 0
    private var skipped = 0

    private static let longestPause = 16

    public init() {}

    /// - Returns: false if the packet should go plain without a try.
    public mutating func shouldTry() -> Bool {
        guard skipped < pause else {
            skipped = 0
            return true
        }
        skipped += 1
        return false
    }

    /// - Returns: whether `packed` bytes are few enough to be sent instead of `plain` ones: unpacking costs time, too, so a 32nd must be
    ///   gained.
    public mutating func isWorth(packed: Int, plain: Int) -> Bool {
        guard packed <= plain - plain / 32 else {
            pause = min(max(1, pause * 2), Self.longestPause)
            return false
        }
        pause = 0
        return true
    }
}
