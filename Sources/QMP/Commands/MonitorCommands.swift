public import Machine
public import Migration
import Synchronization

/// The commands and events of one virtual machine: what connects QMP to the VM.
///
///     let commands = MonitorCommands(machine: vm, migrator: migrator, name: "vm1") { ended.raise() }
///     let server = try QMPServer(sockets: sockets, table: commands.table)
///     commands.sendEvents { server.post($0, data: $1) }
///
/// The commands lie beside this file by subject; each is a few lines around one call of `VirtualMachine` or `Migrator`,
/// which decide and word the refusals. Names, fields and units are those of QEMU 7.2; what begins with `x-` is ours.
public final class MonitorCommands: Sendable {
    public typealias EventSink = @Sendable (_ name: String, _ data: JSON) -> Void

    public let table: CommandTable
    private let events: Events

    /// - Parameters:
    ///   - name: what `query-name` tells.
    ///   - quit: called after `quit` was answered, on a client's thread: it asks the main thread to end the process
    ///     and does not wait (`QMPServer.stop` waits for the client).
    public init(machine: VirtualMachine, migrator: Migrator, name: String, quit: @escaping @Sendable () -> Void) {
        let events = Events()
        self.events = events
        let commands =
            MigrationCommands(migrator).all
            + MigrationSettings(migrator).all
            + ObjectCommands(migrator.security).all
            + MachineCommands(machine, name: name).all
            + MemoryCommands(machine).all
            + GuestCommands(machine).all
            + DirtyRateCommands(DirtyRateMeter(machine)).all
            + [
                Command(
                    "quit",
                    afterReply: {
                        events.send("SHUTDOWN", ["guest": false, "reason": "host-qmp-quit"])
                        quit()
                    }, handler: { _ in [:] })
            ]
        let human = HumanMonitor(machine: machine, migrator: migrator, name: name, commands: commands)
        table = CommandTable(commands: commands + [human.command]) { machine.runState.rawValue }
        machine.observe { events.send($0) }
        // The process itself and its log hear of everything.
        migrator.observe { [weak migrator] event in
            if migrator?.isOn(.events) == true { events.send(event) }
        }
    }

    /// Makes an object from QEMU's text form, as `object-add` does. - Throws: `QMPError`.
    public func addObject(_ options: String) throws(QMPError) {
        try run("object-add", ObjectOptions(parsing: options).arguments)
    }

    /// Sets migration parameters, as `migrate-set-parameters` does. - Throws: `QMPError`.
    public func setParameters(_ parameters: [String: JSON]) throws(QMPError) {
        try run("migrate-set-parameters", parameters)
    }

    private func run(_ command: String, _ arguments: [String: JSON]) throws(QMPError) {
        var request = try QMPRequest(["execute": .string(command)], outOfBandEnabled: false)
        request.arguments = arguments
        _ = try table.run(request).get()
    }

    /// Tells every event from now on to `sink`, which must not block.
    public func sendEvents(to sink: @escaping EventSink) { events.connect(sink) }

    private final class Events: Sendable {
        private let sink = Mutex<EventSink?>(nil)

        func connect(_ sink: @escaping EventSink) { self.sink.withLock { $0 = sink } }

        func send(_ name: String, _ data: JSON = [:]) { sink.withLock { $0 }?(name, data) }

        func send(_ event: MachineEvent) {
            switch event {
            case .stopped: send("STOP")
            case .resumed: send("RESUME")
            case .reset(let byGuest):
                send(
                    "RESET",
                    ["guest": .bool(byGuest), "reason": .string(byGuest ? "guest-reset" : "host-qmp-system-reset")])
            case .shutdown: send("SHUTDOWN", ["guest": true, "reason": "guest-shutdown"])
            // `STOP` follows; the sentence is for the log.
            case .internalError: break
            }
        }

        func send(_ event: MigrationEvent) {
            switch event {
            case .status(let status): send("MIGRATION", ["status": .string(status.rawValue)])
            case .pass(let number): send("MIGRATION_PASS", ["pass": JSON(number)])
            // For the log: QMP has no event for it.
            case .notice: break
            }
        }
    }
}
