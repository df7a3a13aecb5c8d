import Glibc
import GuestMemory
import GuestPrograms
import Host
import Machine
import Migration
import Testing
import Transport

/// Whether virtual machines can run here; tests that need them say so where they cannot.
let hasKVM = unsafe access("/dev/kvm", R_OK | W_OK) == 0
let needsKVM: Comment = "this machine has no /dev/kvm which this user may open"

/// What a test does in a process of its own, because a virtual machine lasts as long as its process.
enum Child {
    /// Runs `body` and ends the process: with success if it comes back, else with a sentence.
    static func run(seconds: UInt64, _ body: () throws -> Void) {
        _ = try? HostThread(name: "alarm") {
            Clock.sleep(nanoseconds: seconds * 1_000_000_000)
            fail("the test was not done after \(seconds) seconds")
        }
        do { try body() } catch { fail("\(error)") }
        _exit(0)
    }

    static func fail(_ sentence: String) -> Never {
        Issue.record("\(sentence)")
        _ = try? Descriptor.standard(2, name: "standard error").writeAll(Array((sentence + "\n").utf8))
        _exit(1)
    }
}

/// Ends a child process with `sentence` unless `holds`.
func claim(_ holds: Bool, _ sentence: @autoclosure () -> String) {
    if !holds { Child.fail(sentence()) }
}

/// Waits until `condition` holds.
func waitFor(_ what: @autoclosure () -> String, seconds: UInt64 = 20, _ condition: () throws -> Bool) throws {
    let deadline = Deadline.after(seconds: seconds)
    while try !condition() {
        if deadline.hasPassed { Child.fail("waited \(seconds) seconds for \(what())") }
        Clock.sleep(nanoseconds: 1_000_000)
    }
}

/// A path nobody else uses.
func temporaryPath(_ name: String) -> String { "/tmp/godwit-test-\(getpid())-\(name)" }

extension Migrator {
    /// A machine with a built-in guest that is ready.
    static func source(_ program: String, mebibytes: UInt64 = 64, cpus: Int = 1) throws -> Migrator {
        let machine = try VirtualMachine(
            MachineConfiguration(
                memoryByteCount: mebibytes << 20, cpuCount: cpus, boot: .guest(try GuestProgram(parsing: program))),
            serial: SerialPort(.none))
        try machine.resume()
        try waitFor("the guest to be ready") { try machine.guestStatus().isReady }
        return Migrator(machine)
    }

    /// A machine like this one, or with what is named instead, that waits for a migration.
    func destination(
        kind: MachineConfiguration.Kind = .pc, mebibytes: UInt64? = nil, cpus: Int? = nil
    ) throws -> Migrator {
        Migrator(
            try VirtualMachine(
                MachineConfiguration(
                    kind: kind, memoryByteCount: mebibytes.map { $0 << 20 } ?? machine.configuration.memoryByteCount,
                    cpuCount: cpus ?? machine.configuration.cpuCount, isIncoming: true), serial: SerialPort(.none)))
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
        try waitFor("the migration's end, it is \(self.info().status) \(when)") { isOver }
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

/// A seeded generator, so that a failure can be replayed.
struct SplitMix64: RandomNumberGenerator {
    var state: UInt64
    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var mixed = state
        mixed = (mixed ^ (mixed >> 30)) &* 0xbf58_476d_1ce4_e5b9
        mixed = (mixed ^ (mixed >> 27)) &* 0x94d0_49bb_1331_11eb
        return mixed ^ (mixed >> 31)
    }
}
