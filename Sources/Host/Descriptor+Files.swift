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

    /// The same file once more, for I/O past the page cache: offsets, sizes and memory must be aligned to the file system's blocks, for
    /// which pages will do. The path that it was opened by may lead to another file by now.
    /// - Throws: `SystemError`, with a remedy where the file system cannot.
    public func openedDirect(writing: Bool) throws(SystemError) -> Descriptor {
        let flags = (writing ? O_WRONLY : O_RDONLY) | Self.direct | O_CLOEXEC
        // proc(5): that opens what the descriptor shows, whatever it is called.
        let again = unsafe Glibc.open("/proc/self/fd/\(number)", flags)
        guard again >= 0 else {
            let code = errno
            let remedy = "its file system has no direct I/O; turn direct-io off, or choose a file elsewhere"
            throw SystemError("open", name, code: code, remedy: code == EINVAL ? remedy : nil)
        }
        return Descriptor(owning: again, name: name)
    }
}
