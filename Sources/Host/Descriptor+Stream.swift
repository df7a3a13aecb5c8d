import CLinux
import Glibc

extension Descriptor {
    /// Takes over a descriptor this process was started with. It is not inherited by our children.
    /// - Throws: `SystemError` if the number is not an open descriptor.
    public static func adopt(_ number: CInt, name: String) throws(SystemError) -> Descriptor {
        guard number >= 0 else { throw SystemError("use", name, code: EBADF) }
        try checked(gw_fcntl_int(number, F_SETFD, FD_CLOEXEC), "use", name, remedy: "it is not open in this process")
        return Descriptor(owning: number, name: name)
    }

    /// Whether it was opened for reading, and for writing.
    public func access() throws(SystemError) -> (reads: Bool, writes: Bool) {
        let mode = try checked(gw_fcntl_int(number, F_GETFL, 0), "fcntl", name) & O_ACCMODE
        return (mode != O_WRONLY, mode != O_RDONLY)
    }

    /// Lets file systems which write at close (NFS) write now, without waiting for the disk.
    /// - Throws: `SystemError` with what the writing met.
    public func flushAsAtClose() throws(SystemError) {
        let second = try checked(gw_fcntl_int(number, F_DUPFD_CLOEXEC, 0), "duplicate", name)
        guard Glibc.close(second) == 0 || errno == EINTR else { throw .last("close", name) }
    }

    /// Asks for a larger buffer of a pipe; it stays as it is where the kernel refuses.
    public func setPipeCapacity(_ byteCount: CInt) {
        let setPipeSize: CInt = 1031  // F_SETPIPE_SZ of fcntl(2), hidden from Swift
        _ = gw_fcntl_int(number, setPipeSize, byteCount)
    }

    /// Makes writing to a closed pipe or socket an error value in this process instead of its end (SIGPIPE).
    public static func ignoreBrokenPipes() { _ = signal(SIGPIPE, SIG_IGN) }
}

/// Which file a path leads to, to know later whether it still is the same.
public struct FileIdentity: Sendable, Equatable {
    public let device: UInt64
    public let inode: UInt64
    public let isSocket: Bool

    /// `nil` if there is no such file. A symbolic link is itself.
    public init?(path: String) {
        var status = stat()
        guard unsafe lstat(path, &status) == 0 else { return nil }
        device = UInt64(status.st_dev)
        inode = UInt64(status.st_ino)
        isSocket = status.st_mode & S_IFMT == S_IFSOCK
    }

    /// Removes the file at `path` if it is still this one.
    public func remove(_ path: String) {
        if FileIdentity(path: path) == self { _ = unsafe unlink(path) }
    }
}

extension HostThread {
    /// Starts a thread nobody waits for: what it needs is released at its end.
    public static func detached(name: String, _ body: @escaping @Sendable () -> Void) throws(SystemError) {
        _ = try HostThread(name: name, stackBytes: 1 << 18) {
            _ = pthread_detach(pthread_self())
            body()
        }
    }
}

extension ChildProcess {
    /// The signal that asks a process to end (SIGTERM).
    public static let terminationSignal = SIGTERM
}
