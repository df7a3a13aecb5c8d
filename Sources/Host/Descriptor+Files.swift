import CLinux
import Glibc

extension Descriptor {
    /// Creates or empties a file for writing; mode 0600.
    public static func create(_ path: String) throws(SystemError) -> Descriptor {
        try open(path, O_WRONLY | O_CREAT | O_TRUNC)
    }

    /// Removes a file or socket; that it is gone already is no error.
    public static func remove(_ path: String) { unsafe unlink(path) }

    /// A descriptor of our own for standard input (0), output (1) or error (2), which stay open.
    public static func standard(_ number: CInt, name: String) throws(SystemError) -> Descriptor {
        Descriptor(owning: try checked(gw_fcntl_int(number, F_DUPFD_CLOEXEC, 3), "duplicate", name), name: name)
    }

    /// Writes what fits now. - Returns: the bytes taken, 0 when the descriptor would block.
    public func writeWithoutBlocking(_ bytes: ArraySlice<UInt8>) throws(SystemError) -> Int {
        let ready = try poll([(self, .writable)], deadline: Deadline(at: 0))
        guard ready[0].contains(.writable) else {
            if ready[0].isEmpty { return 0 }
            throw SystemError("write", name, code: EPIPE)
        }
        return try write(bytes) ?? 0
    }

    public func writeWithoutBlocking(_ bytes: [UInt8]) throws(SystemError) -> Int {
        try writeWithoutBlocking(bytes[...])
    }
}

extension Descriptor {
    /// O_DIRECT of x86-64 (asm-generic/fcntl.h), which glibc's headers show to GNU programs alone.
    private static let direct: CInt = 0o40000

    /// Opens an existing file for I/O past the page cache: offsets, sizes and memory must be aligned to the file system's blocks, for
    /// which pages will do. - Throws: `SystemError`, with a remedy where the file system cannot.
    public static func openDirect(_ path: String, writing: Bool) throws(SystemError) -> Descriptor {
        do throws(SystemError) { return try open(path, (writing ? O_WRONLY : O_RDONLY) | direct) } catch {
            guard error.code == EINVAL else { throw error }
            throw SystemError(
                "open", path, code: EINVAL,
                remedy: "its file system has no direct I/O; turn direct-io off, or choose a file elsewhere")
        }
    }
}
