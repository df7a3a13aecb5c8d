import Glibc
public import Host

/// The name of a VM: 1 to 63 letters, digits, `-`, `_` and `.`, not beginning with `.` or `-`.
public struct VMName: Hashable, Sendable, CustomStringConvertible {
    public let text: String
    public var description: String { text }

    public static let longest = 63

    /// - Throws: `QMPError` with the rule in one sentence.
    public init(_ text: String) throws(QMPError) {
        let isPlain = text.utf8.allSatisfy { byte in
            switch byte {
            case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"),
                UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "-"), UInt8(ascii: "_"), UInt8(ascii: "."):
                true
            default: false
            }
        }
        guard isPlain, (1...Self.longest).contains(text.utf8.count), text.first != ".", text.first != "-" else {
            throw QMPError(
                "VM name '\(text.prefix(80))' will not do: use 1 to \(Self.longest) letters, digits, '-', '_' and '.', "
                    + "beginning with a letter, digit or '_'")
        }
        self.text = text
    }
}

/// The folder of one user's VM sockets: mode 0700, `NAME.qmp` for each VM.
public struct RuntimeFolder: Sendable, Equatable {
    public let path: String

    public init(path: String) { self.path = path }

    /// `$XDG_RUNTIME_DIR/godwit`, else `/run/user/UID/godwit`, else `/tmp/godwit-UID`: the first whose parent is a folder.
    public static var current: RuntimeFolder {
        // SAFETY: the string is copied before anything could change the environment.
        let variable = unsafe getenv("XDG_RUNTIME_DIR").map { unsafe String(cString: $0) }
        return choose(userRuntimeDirectory: variable, userID: Account.effectiveUserID) { path in
            (try? FileSystem.status(of: path + "/."))?.kind == .folder
        }
    }

    static func choose(
        userRuntimeDirectory: String?, userID: UInt32, isFolder: (String) -> Bool
    ) -> RuntimeFolder {
        for parent in [userRuntimeDirectory, "/run/user/\(userID)"] {
            if let parent, parent.hasPrefix("/"), isFolder(parent) { return RuntimeFolder(path: parent + "/godwit") }
        }
        return RuntimeFolder(path: "/tmp/godwit-\(userID)")
    }

    public func socketPath(of name: VMName) -> String { "\(path)/\(name.text)\(Self.suffix)" }

    private static let suffix = ".qmp"

    /// Makes the folder if it is not there, and makes sure that nobody else can reach into it.
    /// - Throws: `SystemError` if it is not a folder, belongs to another user or is open to others.
    public func prepare() throws(SystemError) {
        try FileSystem.makeFolder(path)
        try check()
    }

    private func check() throws(SystemError) {
        guard let status = try FileSystem.status(of: path) else {
            throw SystemError("use folder", path, code: ENOENT)
        }
        guard status.kind == .folder else {
            throw SystemError("use folder", path, code: ENOTDIR, remedy: "remove what is there")
        }
        guard status.ownerUserID == Account.effectiveUserID else {
            throw SystemError(
                "use folder", path, code: EPERM,
                remedy: "it belongs to user \(status.ownerUserID); set XDG_RUNTIME_DIR to a folder of yours")
        }
        guard status.mode & 0o077 == 0 else {
            throw SystemError("use folder", path, code: EPERM, remedy: "others can reach into it; chmod 700 it")
        }
    }

    /// A VM that answers at its socket.
    public struct RunningVM: Sendable, Equatable {
        public let name: VMName
        public let socketPath: String
    }

    /// The VMs whose sockets take connections, by name. Sockets nobody listens on are removed.
    public func runningVMs() throws(SystemError) -> [RunningVM] {
        guard try FileSystem.status(of: path) != nil else { return [] }
        try check()
        var running: [RunningVM] = []
        for file in try FileSystem.names(inFolder: path) where file.hasSuffix(Self.suffix) {
            guard let name = try? VMName(String(file.dropLast(Self.suffix.count))) else { continue }
            if try isListening(socketPath(of: name)) {
                running.append(RunningVM(name: name, socketPath: socketPath(of: name)))
            }
        }
        return running
    }

    private func isListening(_ socketPath: String) throws(SystemError) -> Bool {
        guard try FileSystem.status(of: socketPath)?.kind == .socket else { return false }
        if try ControlSocket.isListening(socketPath) { return true }
        // Between its bind and its listen a socket refuses too: a VM that starts holds the lock over both.
        let lock = try FileSystem.lockFolder(path, deadline: .after(seconds: 5))
        defer { withExtendedLifetime(lock) {} }
        return try !ControlSocket.removeIfStale(socketPath)
    }
}
