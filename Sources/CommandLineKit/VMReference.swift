import Glibc
public import Host
public import QMP

/// The VM that a command is about, as people write it: its name, or the path of a QMP socket (`unix:PATH`, or a path with `/`).
public enum VMReference: Hashable, Sendable, CustomStringConvertible {
    case name(VMName)
    case socket(path: String)

    /// - Throws: `QMPError` with the rule for names.
    public init(_ text: String) throws(QMPError) {
        if text.hasPrefix("unix:"), text.utf8.count > 5 {
            self = .socket(path: String(text.dropFirst(5)))
        } else if text.contains("/") {
            self = .socket(path: text)
        } else {
            self = .name(try VMName(text))
        }
    }

    public var description: String {
        switch self {
        case .name(let name): name.text
        case .socket(let path): "unix:\(path)"
        }
    }

    public func socketPath(in folder: RuntimeFolder = .current) -> String {
        switch self {
        case .name(let name): folder.socketPath(of: name)
        case .socket(let path): path
        }
    }

    /// Connects to the VM. - Throws: an error that names it.
    public func connect(
        deadline: Deadline = .after(seconds: 10), onEvent: (@Sendable (QMPEvent) -> Void)? = nil
    ) throws -> QMPClient {
        let path = socketPath()
        if case .name(let name) = self, try FileSystem.status(of: path) == nil {
            throw CommandFailure("no VM named \(name) is running; 'godwit ps' lists those that are")
        }
        return try QMPClient(path: path, deadline: deadline, onEvent: onEvent)
    }

    /// The process that listens on the VM's socket; `nil` if that cannot be told.
    public var processIdentifier: Int32? {
        guard let socket = try? Socket.connect(unix: socketPath()) else { return nil }
        // `struct ucred`: pid, uid, gid. On the connecting side they are those of the process that listens.
        var credentials: [UInt32] = [0, 0, 0]
        var byteCount = socklen_t(12)
        // SAFETY: the kernel writes at most `byteCount` bytes, which is what the array holds.
        let status = unsafe getsockopt(socket.number, SOL_SOCKET, SO_PEERCRED, &credentials, &byteCount)
        return status == 0 && credentials[0] > 0 ? Int32(bitPattern: credentials[0]) : nil
    }
}

/// Why a command did not do what it was asked, as one sentence.
public struct CommandFailure: Error, Equatable, Sendable, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}

extension QMPClient {
    /// Waits until the VM has closed the connection: its process is about to end then, and its sockets are removed.
    /// - Returns: false when the deadline passes.
    public func waitForEnd(deadline: Deadline) -> Bool {
        do throws(QMPClientError) {
            // No event has this name, so only the end of the connection or the deadline ends the wait.
            try waitForEvent("", deadline: deadline)
            return true
        } catch {
            if case .timedOut = error { return false }
            return true
        }
    }
}
