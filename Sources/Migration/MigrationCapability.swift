/// What a migration may do, by QEMU's names (`migrate-set-capabilities`). Only what this Godwit has is listed.
public enum MigrationCapability: String, Sendable, CaseIterable {
    /// Emit `MIGRATION` and `MIGRATION_PASS` events. On from the start, unlike in QEMU.
    case events
    /// Let the destination answer on the same connection. Always on where the transport can: kept for scripts that set it.
    case returnPath = "return-path"
    /// Stop in `pre-switchover` and wait for `migrate-continue`.
    case pauseBeforeSwitchover = "pause-before-switchover"
    /// Send pages that come again as their difference to what was sent before.
    case xbzrle

    /// Send pages over several channels; a destination needs it for a source that is no Godwit.
    case multifd

    var isOnByDefault: Bool { self == .events || self == .returnPath }

    /// Capabilities of QEMU which this Godwit knows by name and cannot do yet: they can be set to false.
    public static let unsupported = [
        "rdma-pin-all", "auto-converge", "postcopy-ram", "x-colo", "release-ram", "dirty-bitmaps",
        "postcopy-blocktime", "late-block-activate", "x-ignore-shared", "validate-uuid", "background-snapshot",
        "zero-copy-send", "postcopy-preempt", "switchover-ack", "dirty-limit", "mapped-ram",
    ]
}
