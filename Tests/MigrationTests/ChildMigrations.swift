import Glibc
import GuestMemory
import GuestPrograms
import Host
import Machine
import Migration
import TestSupport
import Testing
import Transport

extension Migrator {
    /// A machine with a built-in guest that is ready.
    static func source(
        _ program: String, mebibytes: UInt64 = 64, cpus: Int = 1, backing: RAMBacking = .anonymous
    ) throws -> Migrator {
        let machine = try VirtualMachine(
            MachineConfiguration(
                memoryByteCount: mebibytes << 20, cpuCount: cpus, boot: .guest(try GuestProgram(parsing: program)),
                backing: backing),
            serial: SerialPort(.none))
        try machine.resume()
        try waitFor("the guest to be ready") { try machine.guestStatus().isReady }
        return Migrator(machine)
    }

    /// A machine like this one, or with what is named instead, that waits for a migration.
    func destination(
        kind: MachineConfiguration.Kind = .pc, mebibytes: UInt64? = nil, cpus: Int? = nil,
        backing: RAMBacking = .anonymous
    ) throws -> Migrator {
        Migrator(
            try VirtualMachine(
                MachineConfiguration(
                    kind: kind, memoryByteCount: mebibytes.map { $0 << 20 } ?? machine.configuration.memoryByteCount,
                    cpuCount: cpus ?? machine.configuration.cpuCount, backing: backing, isIncoming: true),
                serial: SerialPort(.none)))
    }

    /// Listens on a port the kernel chooses. - Returns: the address to migrate to.
    func listen() throws -> MigrationAddress {
        try acceptMigration(on: .tcp(host: "127.0.0.1", port: "0"))
        guard case .inet(_, let port)? = info().listening.first else { Child.fail("the destination does not listen") }
        return .tcp(host: "127.0.0.1", port: port)
    }

    var isOver: Bool { [.completed, .failed, .cancelled].contains(info().status) }

    /// Waits for the migration's end, and ends the test unless it is `status`.
    func awaitEnd(_ status: MigrationStatus = .completed, _ when: String = "") throws {
        try waitFor(
            "the migration's end, it is \(self.info().status) \(when): \(self.info().errorDescription ?? "")"
        ) { isOver }
        let info = info()
        claim(info.status == status, "the migration is \(info.status) \(when): \(info.errorDescription ?? "no error")")
    }

    /// The guest is here, is what it should be, and goes on.
    func claimGuestRuns(_ when: String) throws {
        try waitFor("the guest to run \(when)") { machine.runState == .running }
        let check = try machine.checkGuest()
        claim(check.isVerified, "\(when): \(check)")
        let before = check.status
        try waitFor("the guest to go on \(when)") {
            let now = try machine.guestStatus()
            return now.touches > before.touches || now.heartbeats > before.heartbeats
        }
        let later = try machine.checkGuest()
        claim(later.isVerified, "\(when), later: \(later)")
        claim(later.status.tscBackwards == 0, "\(when): the TSC went backwards")
    }

    /// The guest was handed over and is complete at `destination`.
    func claimArrival(at destination: Migrator, _ when: String) throws {
        try awaitEnd(.completed, when)
        claim(machine.runState == .postMigrate, "\(when): the source is \(machine.runState)")
        try destination.claimGuestRuns(when)
        claim(destination.info().status == .completed, "\(when): the destination says \(destination.info().status)")
    }
}
