import Accelerator
import CommandLineKit
import Glibc
import Host
import Logging
import Machine
import Migration
import QMP
import Transport

/// The process that is one VM: machine, migrator and monitor put together, and the wait for the end.
///
/// From `init` to the end of `run`: sockets, machine, monitor, guest; then in reverse. Nothing listens before the machine
/// stands, and nothing of it is left in the file system afterwards.
final class VMProcess: Sendable {
    /// Where a migration is waited for at the start.
    enum Incoming: Sendable {
        /// `migrate-incoming` will tell.
        case deferred
        case address(MigrationAddress)
    }

    struct Plan: Sendable {
        var name: VMName
        /// Paths of QMP sockets; the one that goes by the name is `isNamed`.
        var socketPaths: [String] = []
        var isNamed = true
        var serial = SerialPort.Target.standard
        var incoming: Incoming?
        /// Memory that stands in a file is read when the guest touches it.
        var restoresLazily = false
        var startsPaused = false
        /// Objects in QEMU's text form, and the migration parameters that name them.
        var objects: [String] = []
        var parameters: [String: JSON] = [:]
        /// Whether a migration may be waited for in plaintext where others reach it.
        var allowsPlaintext = false
    }

    /// Why the process ends.
    enum Ending: Sendable {
        case quit
        case signal(CInt)
        case guestShutdown(status: Int32)
        case failed(String)
    }

    private let plan: Plan
    private let log: Logger
    private let machine: VirtualMachine
    private let migrator: Migrator
    private let commands: MonitorCommands
    private let server: QMPServer
    private let ending = Monitor<Ending?>(nil)

    init(_ plan: Plan, machine configuration: MachineConfiguration, log: Logger) throws {
        self.plan = plan
        self.log = log
        // The name first: a second VM of this name is refused before it takes memory.
        var sockets: [ControlSocket] = []
        var serial: SerialPort?
        do {
            if plan.isNamed { sockets.append(try ControlSocket(name: plan.name)) }
            for path in plan.socketPaths { sockets.append(try ControlSocket(path: path)) }
            let port = try SerialPort(plan.serial)
            serial = port
            machine = try VirtualMachine(configuration, serial: port)
            migrator = Migrator(machine, allowsPlaintext: plan.allowsPlaintext)
            let ending = ending
            let commands = MonitorCommands(machine: machine, migrator: migrator, name: plan.name.text) {
                ending.withLock { $0 = $0 ?? .quit }
            }
            // Before anybody can ask for them.
            for object in plan.objects { try commands.addObject(object) }
            if !plan.parameters.isEmpty { try commands.setParameters(plan.parameters) }
            self.commands = commands
            server = try QMPServer(sockets: sockets, table: commands.table)
        } catch {
            sockets.forEach { $0.remove() }
            serial?.close()
            throw error
        }
    }

    /// Runs the VM to its end. - Returns: the status for the process to exit with.
    /// - Throws: an error whose description is the one sentence, when the VM could not do what it was started for.
    func run() throws -> Int32 {
        defer { tearDown() }
        commands.sendEvents { [server] in server.post($0, data: $1) }
        observe()
        if case .address(let address) = plan.incoming {
            try migrator.acceptMigration(on: address, startsGuest: !plan.startsPaused, isLazy: plan.restoresLazily)
        }
        let memory = Amount.memory(machine.configuration.memoryByteCount)
        let cpus = machine.configuration.cpuCount
        log.info(
            "\(memory), \(cpus) \(cpus == 1 ? "vCPU" : "vCPUs"), accelerator \(machine.accelerator?.name ?? "none")")
        for socket in server.sockets { log.info("QMP at \(socket.path)") }
        switch plan.incoming {
        case .address:
            let listening = migrator.info().listening
            if listening.isEmpty, case .address(let address) = plan.incoming { log.info("restoring from \(address)") }
            for address in listening { log.info("waiting for a migration on \(address.words)") }
        case .deferred: log.info("waiting for migrate-incoming")
        case nil: if !plan.startsPaused { try machine.resume() }
        }
        guard let ending = ending.wait(until: { $0 }) else { return 0 }
        switch ending {
        case .quit: log.info("quit")
        case .signal(let number): log.info("ended by \(SignalWatch.names[number] ?? "signal \(number)")")
        case .guestShutdown(let status):
            log.info("the guest shut down with status \(status)")
            return status
        case .failed(let sentence): throw RunError(sentence)
        }
        return 0
    }

    /// From any thread; the first reason stands.
    func end(_ reason: Ending) {
        ending.withLock { $0 = $0 ?? reason }
    }

    private func tearDown() {
        migrator.shutDown()
        machine.pause()
        server.stop()
        machine.serial.close()
    }

    // MARK: What happens meanwhile

    private func observe() {
        machine.observe { [weak self] event in self?.machineDid(event) }
        migrator.observe { [weak self] event in self?.migrationDid(event) }
    }

    private func machineDid(_ event: MachineEvent) {
        switch event {
        case .stopped: log.debug("stopped")
        case .resumed: log.debug("running")
        case .reset(let byGuest): log.info("reset\(byGuest ? " by the guest" : "")")
        case .shutdown(let status): end(.guestShutdown(status: status))
        case .internalError(let sentence): log.error("the guest cannot run on: \(sentence)")
        }
    }

    private func migrationDid(_ event: MigrationEvent) {
        // What the end of the process does to a migration is no news.
        guard ending.withLock({ $0 == nil }) else { return }
        switch event {
        case .status(let status):
            log.info("migration \(status.rawValue)")
            if status == .failed, case .address = plan.incoming { incomingFailed() }
        case .pass: break
        case .notice(let sentence): log.notice("migration: \(sentence)")
        }
    }

    /// A destination whose only migration failed for good has nothing left to wait for.
    private func incomingFailed() {
        let migrator = migrator
        let ending = ending
        let incoming = plan.incoming
        // The reason follows the status, on this very thread: wait for it on another.
        _ = try? HostThread.detached(name: "migration-end") {
            let deadline = Deadline.after(seconds: 1)
            while migrator.info().errorDescription == nil, !deadline.hasPassed { Clock.sleep(nanoseconds: 1_000_000) }
            let info = migrator.info()
            guard info.direction == .incoming else { return }
            var reason = info.errorDescription ?? "the incoming migration failed"
            // Of a file that is wrong inside the stream knows no name.
            if case .address(.file(let path, _)) = incoming, !reason.contains(path) {
                reason = "restore \(path): \(reason)"
            }
            ending.withLock { $0 = $0 ?? .failed(reason) }
        }
    }
}

/// What keeps `godwit run` from doing what it was asked, as one sentence.
struct RunError: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}

extension ListeningAddress {
    var words: String {
        switch self {
        case .inet(let host, let port): host.contains(":") ? "tcp:[\(host)]:\(port)" : "tcp:\(host):\(port)"
        case .unix(let path): "unix:\(path)"
        }
    }
}
