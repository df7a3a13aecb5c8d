import CLinux
import Glibc

/// An open file descriptor and the only owner of it: closed once, when the last reference goes.
public final class Descriptor: Sendable {
    public let number: CInt
    /// What it is, for error sentences: a path or an address.
    public let name: String

    /// Takes ownership of `number`.
    public init(owning number: CInt, name: String) {
        precondition(number >= 0, "a descriptor is not negative")
        self.number = number
        self.name = name
    }

    deinit { _ = Glibc.close(number) }

    /// Opens a file. - Throws: `SystemError` naming the path.
    public static func open(
        _ path: String, _ flags: CInt, mode: UInt32 = 0o600, remedy: String? = nil
    )
        throws(SystemError) -> Descriptor
    {
        // The kernel would take what is before the zero byte, which is another file.
        guard !path.utf8.contains(0) else { throw SystemError("open", path, code: EINVAL, remedy: remedy) }
        let number = unsafe Glibc.open(path, flags | O_CLOEXEC, mode)
        guard number >= 0 else { throw .last("open", path, remedy: remedy) }
        return Descriptor(owning: number, name: path)
    }

    /// Both ends of a pipe: (read end, write end).
    public static func pipe() throws(SystemError) -> (read: Descriptor, write: Descriptor) {
        var ends: [CInt] = [-1, -1]
        // SAFETY: pipe2 writes two integers into the array of two.
        let status = unsafe ends.withUnsafeMutableBufferPointer { unsafe gw_pipe2($0.baseAddress!, O_CLOEXEC) }
        try checked(status, "pipe2")
        return (Descriptor(owning: ends[0], name: "pipe"), Descriptor(owning: ends[1], name: "pipe"))
    }

    /// A second descriptor of the same open file.
    public func duplicate() throws(SystemError) -> Descriptor {
        Descriptor(owning: try checked(gw_fcntl_int(number, F_DUPFD_CLOEXEC, 0), "duplicate", name), name: name)
    }

    public func setNonBlocking(_ on: Bool) throws(SystemError) {
        let flags = try checked(gw_fcntl_int(number, F_GETFL, 0), "fcntl", name)
        try checked(gw_fcntl_int(number, F_SETFL, on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK), "fcntl", name)
    }

    /// Whether this is a socket, a pipe or character device, or a regular file.
    public enum Kind: Sendable { case socket, stream, file }

    public var kind: Kind {
        var status = stat()
        guard unsafe fstat(number, &status) == 0 else { return .stream }
        switch status.st_mode & S_IFMT {
        case S_IFSOCK: return .socket
        case S_IFREG: return .file
        default: return .stream
        }
    }

    /// Size of a regular file in bytes.
    public func size() throws(SystemError) -> UInt64 {
        var status = stat()
        guard unsafe fstat(number, &status) == 0 else { throw .last("stat", name) }
        return UInt64(max(0, status.st_size))
    }

    /// Sets the size of a regular file.
    public func truncate(to byteCount: UInt64) throws(SystemError) {
        guard let wanted = Int(exactly: byteCount) else { throw SystemError("ftruncate", name, code: EFBIG) }
        guard ftruncate(number, wanted) == 0 else { throw .last("ftruncate", name) }
    }

    /// Moves the file position. - Returns: the new position from the start.
    @discardableResult
    public func seek(to offset: UInt64) throws(SystemError) -> UInt64 {
        guard let wanted = Int(exactly: offset) else { throw SystemError("lseek", name, code: EOVERFLOW) }
        let position = lseek(number, wanted, SEEK_SET)
        guard position >= 0 else { throw .last("lseek", name) }
        return UInt64(position)
    }
}

// MARK: Reading and writing

extension Descriptor {
    /// Reads what is there, at most the size of `buffer`. - Returns: the bytes read; 0 at the end; `nil` if it would block.
    public func read(into buffer: UnsafeMutableRawBufferPointer) throws(SystemError) -> Int? {
        guard unsafe !buffer.isEmpty else { return 0 }
        while true {
            // SAFETY: the caller's buffer is valid for its own count during this call.
            let count = unsafe Glibc.read(number, buffer.baseAddress!, buffer.count)
            if count >= 0 { return count }
            if errno == EINTR { continue }
            if errno == EAGAIN { return nil }
            throw .last("read", name)
        }
    }

    /// Reads at most `limit` bytes; empty at the end, `nil` if it would block.
    public func read(upTo limit: Int) throws(SystemError) -> [UInt8]? {
        var bytes = [UInt8](repeating: 0, count: limit)
        var result: Result<Int?, SystemError> = .success(nil)
        unsafe bytes.withUnsafeMutableBytes { buffer in
            do throws(SystemError) { result = .success(unsafe try read(into: buffer)) } catch {
                result = .failure(error)
            }
        }
        guard let count = try result.get() else { return nil }
        bytes.removeLast(limit - count)
        return bytes
    }

    /// Writes what fits. - Returns: the bytes written; `nil` if it would block.
    public func write(_ bytes: ArraySlice<UInt8>) throws(SystemError) -> Int? {
        guard !bytes.isEmpty else { return 0 }
        while true {
            let count = unsafe bytes.withUnsafeBytes { unsafe Glibc.write(number, $0.baseAddress!, $0.count) }
            if count >= 0 { return count }
            if errno == EINTR { continue }
            if errno == EAGAIN { return nil }
            throw .last("write", name)
        }
    }

    /// Writes all bytes before the deadline. - Throws: `SystemError` (`ETIMEDOUT` when the deadline passes).
    public func writeAll(_ bytes: [UInt8], deadline: Deadline = .never) throws(SystemError) {
        var rest = bytes[...]
        while !rest.isEmpty {
            if let count = try write(rest) {
                rest = rest.dropFirst(count)
            } else {
                try wait(for: .writable, deadline: deadline, operation: "write")
            }
        }
    }

    /// Everything up to the end. - Throws: `SystemError` (`EFBIG` past `limit`).
    public func readAll(limit: Int = .max) throws(SystemError) -> [UInt8] {
        var all: [UInt8] = []
        while let piece = try read(upTo: 1 << 16), !piece.isEmpty {
            all += piece
            guard all.count <= limit else { throw SystemError("read", name, code: EFBIG) }
        }
        return all
    }

    /// The whole of a file. - Throws: `SystemError` naming the path; `EFBIG` if it holds more than `limit` bytes.
    public static func contents(of path: String, limit: Int = .max) throws(SystemError) -> [UInt8] {
        try open(path, O_RDONLY).readAll(limit: limit)
    }
}
