/// What a migration may do, by QEMU's names (`migrate-set-capabilities`). Only what this Godwit has is listed.
public enum MigrationCapability: String, Sendable, CaseIterable {
    /// Emit `MIGRATION` and `MIGRATION_PASS` events. On from the start, unlike in QEMU.
    case events
    /// Let the destination answer on the same connection. On from the start, unlike in QEMU. Without it a socket is one-way, and a
    /// migration is over when its reader has closed.
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

    /// Tell the destination the machine's UUID, which has to be its own.
    case validateUUID = "validate-uuid"
    /// Give guest memory back to the host once the guest runs elsewhere.
    case releaseRAM = "release-ram"

    /// Send a digest with every page, and compare the records of both sides before the switch. Only to a Godwit.
    case verify = "x-verify"
    /// A connection lost before the handover pauses the migration (`x-paused`); `migrate` with `resume` goes on. To a Godwit only; on
    /// the source.
    case resumable = "x-resumable"

    /// The guest may move before its memory. A destination needs it set before it listens, for whatever source.
    case postcopyRAM = "postcopy-ram"
    /// In postcopy, pages that the guest waits for come over a channel of their own; to be set on both sides.
    case postcopyPreempt = "postcopy-preempt"
    /// Measure how long each vCPU waits for pages (at the destination).
    case postcopyBlocktime = "postcopy-blocktime"

    /// Until all memory has followed its guest the source can take it back (`x-postcopy-take-back`); to be set on both sides, of which each is
    /// a Godwit.
    case postcopySafetyNet = "x-postcopy-safety-net"

    var isOnByDefault: Bool { [.events, .returnPath].contains(self) }

    /// Capabilities of QEMU which this Godwit knows by name and cannot do yet: they can be set to false.
    public static let unsupported = [
        "rdma-pin-all", "x-colo", "dirty-bitmaps", "late-block-activate", "x-ignore-shared", "background-snapshot",
        "zero-copy-send",
    ]
}

extension Set<MigrationCapability> {
    /// Why these do not go together, or not on a machine that can limit vCPUs or not; `nil`: they do.
    func contradiction(limitsDirtyRate: Bool) -> String? {
        if contains(.autoConverge), contains(.dirtyLimit) {
            return "auto-converge and dirty-limit both slow the guest down; turn one of them off first"
        }
        if contains(.dirtyLimit), !limitsDirtyRate {
            return "dirty-limit: this machine has no dirty ring, by which vCPUs could be limited; "
                + "start it with --accel kvm,dirty-ring-size=65536, or use auto-converge"
        }
        if contains(.postcopyPreempt), !contains(.postcopyRAM) {
            return "Postcopy preempt requires postcopy-ram"
        }
        if contains(.postcopySafetyNet), !contains(.postcopyRAM) {
            return "x-postcopy-safety-net requires postcopy-ram"
        }
        for other in [MigrationCapability.mappedRAM, .verify] where contains(.postcopyRAM) && contains(other) {
            return "postcopy-ram and \(other.rawValue) do not go together; turn one of them off first"
        }
        let needsAnswers: [MigrationCapability] = [.switchoverAck, .resumable, .verify, .postcopyRAM]
        if !contains(.returnPath), let one = needsAnswers.first(where: contains) {
            return "Capability '\(one.rawValue)' requires capability 'return-path'"
        }
        return nil
    }
}
