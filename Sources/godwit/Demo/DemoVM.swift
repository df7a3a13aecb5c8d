import CommandLineKit
import Glibc
import Host
import QMP

/// One of the demonstration's two VMs: a child process of this same program, with its socket and log in a private folder.
final class DemoVM {
    let role: String
    let process: ChildProcess
    private let socketPath: String
    private let logPath: String
    private var connection: QMPClient?

    /// Starts the process. - Parameter options: of `godwit run`, beyond those every VM of the demonstration gets.
    init(_ role: String, in folder: String, options: [String]) throws {
        self.role = role
        socketPath = "\(folder)/\(role).qmp"
        logPath = "\(folder)/\(role).log"
        let standard = ["--name", role, "--serial", "file:\(folder)/\(role).serial", "--qmp", "unix:\(socketPath)"]
        process = try ChildProcess(
            [ThisProgram.path(), "run", "--die-with-parent"] + standard + options,
            input: try Descriptor.open("/dev/null", O_RDONLY), error: try Descriptor.create(logPath))
    }

    /// The client of the VM; the first call waits until it listens.
    /// - Throws: what the process said if it ended instead.
    func client() throws -> QMPClient {
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

    func execute(_ command: String, _ arguments: JSON = [:]) throws -> JSON {
        do {
            return try client().execute(command, arguments, deadline: .after(seconds: 60))
        } catch let error as QMPClientError {
            throw CommandFailure("\(role) VM: \(error)")
        }
    }

    /// Ends the process: by command, else by signal.
    func end() {
        if let connection {
            _ = try? connection.execute("quit", deadline: .after(seconds: 2))
            if process.wait(deadline: .after(seconds: 2)) != nil { return }
        }
        process.end()
    }

    /// The last lines of the log.
    func logTail(lines: Int = 12) -> [Substring] {
        guard let bytes = try? Descriptor.contents(of: logPath, limit: 1 << 20) else { return [] }
        return String(decoding: bytes, as: UTF8.self).split(separator: "\n").suffix(lines)
    }

    private func lastWords(_ ending: ChildProcess.ExitStatus) -> String {
        guard let line = logTail(lines: 1).first else { return "it ended at once (\(ending))" }
        return String(line.hasPrefix("godwit: ") ? line.dropFirst(8) : line)
    }
}
