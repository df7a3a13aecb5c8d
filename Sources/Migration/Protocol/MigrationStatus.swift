/// The states of a migration, by QEMU's names, and one of our own.
public enum MigrationStatus: String, CaseIterable, Sendable {
    case none
    case setup
    case cancelling
    case cancelled
    case active
    case postcopyDevice = "postcopy-device"
    case postcopyActive = "postcopy-active"
    case postcopyPaused = "postcopy-paused"
    case postcopyRecoverSetup = "postcopy-recover-setup"
    case postcopyRecover = "postcopy-recover"
    case completed
    case failed
    case colo
    case preSwitchover = "pre-switchover"
    case device
    case waitUnplug = "wait-unplug"
    /// The connection was lost before the handover: the guest runs here, the destination keeps what it received, and `migrate` with
    /// `resume` goes on (capability `x-resumable`; QEMU knows such a state for postcopy only).
    case paused = "x-paused"
    /// The destination was told to start the guest, and whether it did is not known: the guest is stopped here until
    /// that is settled.
    case unsettled = "x-unsettled"
}
