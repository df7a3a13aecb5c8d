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
    /// Throttle the guest's vCPUs, more and more, as long as it writes too much (`AutoConverge`).
    case autoConverge = "auto-converge"
    /// Limit what each vCPU dirties once it is too much: `vcpu-dirty-limit`. Needs a dirty ring.
    case dirtyLimit = "dirty-limit"

    /// Send pages over several channels; a destination needs it for a source that is no Godwit.
    case multifd
    /// Pages have places of their own in the file that a migration goes to; reading, the file says it itself.
    case mappedRAM = "mapped-ram"
    /// Stop the guest only when the destination said that it may be; to be set on both sides.
    case switchoverAck = "switchover-ack"

    /// Send a digest with every page, and compare the records of both sides before the switch. Only to a Godwit.
    case verify = "x-verify"
    /// A connection lost before the handover pauses the migration (`x-paused`); `migrate` with `resume` goes on. To a Godwit only; on
    /// the source.
    case resumable = "x-resumable"

    var isOnByDefault: Bool { [.events, .returnPath].contains(self) }

    /// Capabilities of QEMU which this Godwit knows by name and cannot do yet: they can be set to false.
    public static let unsupported = [
        "rdma-pin-all", "postcopy-ram", "x-colo", "release-ram", "dirty-bitmaps", "postcopy-blocktime",
        "late-block-activate", "x-ignore-shared", "validate-uuid", "background-snapshot", "zero-copy-send",
        "postcopy-preempt",
    ]
}
