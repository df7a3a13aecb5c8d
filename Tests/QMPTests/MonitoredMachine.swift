import Glibc
import GuestMemory
import Host
import Machine
import Migration
import Synchronization
import Testing

@testable import QMP

/// A machine of RAM alone in this process, with its commands, called without a socket, and the events it told.
final class MonitoredMachine: Sendable {
    let machine: VirtualMachine
    let migrator: Migrator
    let commands: MonitorCommands
    let events = Monitor<[(name: String, data: JSON)]>([])
    let quits = Monitor(0)

    init(megabytes: UInt64 = 16, incoming: Bool = false, name: String = "vm1") throws {
        machine = try VirtualMachine(
            MachineConfiguration(kind: .none, memoryByteCount: megabytes << 20, isIncoming: incoming),
            serial: SerialPort(.none))
        migrator = Migrator(machine)
        let quits = quits
        commands = MonitorCommands(machine: machine, migrator: migrator, name: name) { quits.withLock { $0 += 1 } }
        let events = events
        commands.sendEvents { name, data in events.withLock { $0.append((name, data)) } }
    }

    @discardableResult
    func run(_ command: String, _ arguments: [String: JSON] = [:]) throws -> JSON {
        var request = try QMPRequest(["execute": .string(command)], outOfBandEnabled: false)
        request.arguments = arguments
        return try commands.table.run(request).get()
    }

    /// The sentence of the error; fails if there is none.
    func refusal(_ command: String, _ arguments: [String: JSON] = [:]) throws -> String {
        do {
            let value = try run(command, arguments)
            Issue.record("\(command) was not refused: \(value)")
            return ""
        } catch let error as QMPError {
            #expect(error.errorClass == .generic)
            return error.description
        }
    }

    func human(_ line: String) throws -> String {
        try run("human-monitor-command", ["command-line": .string(line)]).stringValue ?? ""
    }

    func write(_ bytes: [UInt8], at address: UInt64) throws {
        try machine.memory.write(bytes, at: GuestPhysicalAddress(address))
    }

    func status(_ wanted: MigrationStatus, within seconds: UInt64 = 20) throws {
        let deadline = Deadline.after(seconds: seconds)
        while true {
            let info = try run("query-migrate")
            if info["status"]?.stringValue == wanted.rawValue { return }
            try #require(!deadline.hasPassed, "\(wanted) is expected: \(info)")
            Clock.sleep(nanoseconds: 1_000_000)
        }
    }

    /// The names of the events so far, those with a status or a pass as `MIGRATION active`, `MIGRATION_PASS 1`.
    var eventNames: [String] {
        events.withLock { events in
            events.map { event in
                let detail = event.data["status"]?.stringValue ?? event.data["pass"]?.description
                return ([event.name] + [detail].compactMap { $0 }).joined(separator: " ")
            }
        }
    }

    /// Listens on loopback. - Returns: the URI for the source.
    func listen() throws -> String {
        try run("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
        let address = try #require(try run("query-migrate")["socket-address"]?[0])
        return "tcp:127.0.0.1:\(try #require(address["port"]?.stringValue))"
    }
}

/// A folder of its own in /tmp, removed with what is in it.
final class TemporaryFolder: Sendable {
    let path = "/tmp/godwit-qmp-files-\(getpid())-\(UInt32.random(in: 0 ... .max))"

    init() throws { try FileSystem.makeFolder(path) }

    subscript(name: String) -> String { "\(path)/\(name)" }

    deinit {
        for name in (try? FileSystem.names(inFolder: path)) ?? [] { try? FileSystem.remove(self[name]) }
        _ = unsafe rmdir(path)
    }
}
