import Glibc
public import Host
public import QMP

/// A VM in a child process: a `godwit run` of this same program, or another program that speaks QMP on a unix socket.
///
/// Its socket and log lie in a folder of the caller's. Make it on the main thread: the process dies with the thread that made it.
public final class ChildVM {
    /// What it is called in errors: `source`.
    public let role: String
    public let process: ChildProcess
    private let socketPath: String
    private let logPath: String
    private var connection: QMPClient?

    /// Starts `godwit run`. - Parameter options: beyond name, sockets and log.
    public convenience init(_ role: String, in folder: String, options: [String]) throws {
        let monitor = "unix:\(Self.socketPath(of: role, in: folder))"
        let standard = ["--name", role, "--die-with-parent", "--qmp", monitor]
        try self.init(role, in: folder, command: [ThisProgram.path(), "run"] + standard + options)
    }

    /// Starts any program that listens on `socketPath(of: role, in: folder)`.
    public init(_ role: String, in folder: String, command: [String]) throws {
        self.role = role
        socketPath = Self.socketPath(of: role, in: folder)
        logPath = "\(folder)/\(role).log"
        let log = try Descriptor.create(logPath)
        process = try ChildProcess(
            command, input: try Descriptor.open("/dev/null", O_RDONLY), output: log, error: log)
    }

    public static func socketPath(of role: String, in folder: String) -> String { "\(folder)/\(role).qmp" }

    /// The client of the VM; the first call waits until it listens.
    /// - Throws: what the process said if it ended instead.
    public func client() throws -> QMPClient {
        if let connection { return connection }
        let deadline = Deadline.after(seconds: 20)
        while true {
            // It listens before its machine stands, so a connection may still break.
            if let client = try? QMPClient(path: socketPath) {
                connection = client
                return client
            }
            if let ending = process.poll() { throw CommandFailure("\(role) VM: \(lastWords(ending))") }
            guard !deadline.hasPassed else { throw CommandFailure("\(role) VM: it did not start within 20 s") }
            Clock.sleep(nanoseconds: 2_000_000)
        }
    }

    /// - Throws: `CommandFailure` that names the VM.
    @discardableResult
    public func execute(
        _ command: String, _ arguments: JSON = [:], deadline: Deadline = .after(seconds: 60)
    ) throws -> JSON {
        do {
            return try client().execute(command, arguments, deadline: deadline)
        } catch let error as QMPClientError {
            throw CommandFailure("\(role) VM: \(error)")
        }
    }

    /// The address on which a destination waits for its migration. - Throws: `CommandFailure` if it does not tell within 10 s.
    public func listeningAddress() throws -> String {
        let deadline = Deadline.after(seconds: 10)
        while true {
            // It answers on its socket before it listens for a migration.
            if let port = try execute("query-migrate")["socket-address"]?[0]?["port"]?.stringValue {
                return "tcp:127.0.0.1:\(port)"
            }
            guard !deadline.hasPassed else { throw CommandFailure("\(role) VM: it does not tell where it waits") }
            Clock.sleep(nanoseconds: 2_000_000)
        }
    }

    /// Ends the process: by command, else by signal.
    public func end() {
        if let connection {
            _ = try? connection.execute("quit", deadline: .after(seconds: 2))
            if process.wait(deadline: .after(seconds: 2)) != nil { return }
        }
        process.end()
    }

    /// The last lines of the log.
    public func logTail(lines: Int = 12) -> [Substring] {
        guard let bytes = try? Descriptor.contents(of: logPath, limit: 1 << 20) else { return [] }
        return String(decoding: bytes, as: UTF8.self).split(separator: "\n").suffix(lines)
    }

    private func lastWords(_ ending: ChildProcess.ExitStatus) -> String {
        // What the program calls its error, else its last line.
        let lines = logTail()
        guard let line = lines.last(where: { $0.hasPrefix("godwit: ") }) ?? lines.last else {
            return "it ended at once (\(ending))"
        }
        return String(line.hasPrefix("godwit: ") ? line.dropFirst(8) : line)
    }
}
