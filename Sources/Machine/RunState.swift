/// What a virtual machine is doing, by QEMU's names (`query-status`).
public enum RunState: String, Sendable, CaseIterable {
    /// Waits for a migration to arrive.
    case inMigrate = "inmigrate"
    /// Made, and not started yet (`--paused`).
    case prelaunch
    case running
    /// Stopped by command.
    case paused
    /// Stopped for the last part of an outgoing migration.
    case finishMigrate = "finish-migrate"
    /// Its guest runs elsewhere now, or may: it does not run here again without an operator's word.
    case postMigrate = "postmigrate"
    /// The guest powered the machine off.
    case shutdown
    /// The accelerator cannot run the guest on.
    case internalError = "internal-error"

    public var isRunning: Bool { self == .running }
}

/// What a machine tells those who watch it.
public enum MachineEvent: Sendable, Equatable {
    case stopped
    case resumed
    /// `byGuest`: the guest asked for it, not an operator.
    case reset(byGuest: Bool)
    /// The guest ended the machine, with the status for the process to exit with.
    case shutdown(exitStatus: Int32)
    /// A vCPU cannot go on; the sentence says why.
    case internalError(String)
}

/// A command that does not fit what the machine is doing or has, as one sentence.
public struct MachineError: Error, Sendable, Equatable, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}
