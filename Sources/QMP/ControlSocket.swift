import Glibc
public import Host

/// A unix socket on which a VM listens for QMP, and the file that stands for it: mode 0600, removed by `remove`.
///
/// A socket that a process left behind without listening is replaced; one that answers is not. Two processes which want
/// the same path take turns through the lock of its folder.
public final class ControlSocket: Sendable {
    public let path: String
    let listener: Descriptor
    private let file: FileSystem.Status?

    /// Listens on any path (`--qmp unix:PATH`).
    /// - Throws: `SystemError` naming the path: in use, too long, not a socket, no such folder.
    public convenience init(path: String) throws(SystemError) {
        // Without the lock where the folder cannot be read, or somebody holds it: then the last of two wins.
        let lock = try? FileSystem.lockFolder(Self.folder(of: path), deadline: .after(seconds: 1))
        defer { withExtendedLifetime(lock) {} }
        try self.init(lockedPath: path, inUse: "another process listens there; choose another path")
    }

    /// Listens at the place of a named VM. - Throws: `SystemError` if a VM of this name runs.
    public convenience init(name: VMName, in folder: RuntimeFolder = .current) throws(SystemError) {
        try folder.prepare()
        let lock = try FileSystem.lockFolder(folder.path, deadline: .after(seconds: 5))
        defer { withExtendedLifetime(lock) {} }
        try self.init(
            lockedPath: folder.socketPath(of: name),
            inUse: "a VM named \(name.text) is running; choose another --name or stop that one")
    }

    private init(lockedPath path: String, inUse remedy: String) throws(SystemError) {
        self.path = path
        do throws(SystemError) {
            listener = try Self.listen(path)
        } catch {
            guard error.code == EADDRINUSE else { throw error }
            guard try Self.removeIfStale(path) else {
                throw SystemError("listen on", "unix:\(path)", code: EADDRINUSE, remedy: remedy)
            }
            listener = try Self.listen(path)
        }
        file = try FileSystem.status(of: path)
    }

    /// Removes the file, if it is still this socket's. Clients which are connected stay so.
    public func remove() {
        guard let file, let now = try? FileSystem.status(of: path), now.isSameFile(as: file) else { return }
        try? FileSystem.remove(path)
    }

    /// Removes a socket nobody listens on; the folder's lock is held. - Returns: whether the path is free now.
    /// - Throws: `SystemError` if something else than a socket is there.
    static func removeIfStale(_ path: String) throws(SystemError) -> Bool {
        guard let status = try FileSystem.status(of: path) else { return true }
        guard status.kind == .socket else {
            throw SystemError(
                "listen on", "unix:\(path)", code: EEXIST,
                remedy: "it is not a socket; remove it or choose another path")
        }
        if try isListening(path) { return false }
        try FileSystem.remove(path)
        return true
    }

    /// Whether a process takes connections at the path. One that is too busy to take them now does, too.
    /// - Throws: `SystemError` if that cannot be told: no permission, say.
    static func isListening(_ path: String) throws(SystemError) -> Bool {
        let address = try SocketAddress.unix(path: path)
        do throws(SystemError) {
            _ = try Socket.connect(
                to: address, name: "unix:\(path)", wake: try EventDescriptor(), deadline: .after(milliseconds: 200))
            return true
        } catch {
            switch error.code {
            case ECONNREFUSED, ENOENT: return false
            case ETIMEDOUT: return true
            default: throw error
            }
        }
    }

    private static func listen(_ path: String) throws(SystemError) -> Descriptor {
        try Socket.listen(on: SocketAddress.unix(path: path), name: "unix:\(path)")
    }

    private static func folder(of path: String) -> String {
        guard let slash = path.lastIndex(of: "/") else { return "." }
        return slash == path.startIndex ? "/" : String(path[..<slash])
    }
}
