import CLinux
import Glibc

/// Names in the file system: folders, what lies in them, who owns it. Nothing here follows a symbolic link at the end of a path.
public enum FileSystem {
    /// What lstat(2) tells.
    public struct Status: Sendable, Equatable {
        public enum Kind: Sendable { case folder, socket, file, link, other }
        public let kind: Kind
        public let ownerUserID: UInt32
        /// The permission bits alone.
        public let mode: UInt32
        let device: UInt64
        let inode: UInt64

        /// Whether both are one and the same file.
        public func isSameFile(as other: Status) -> Bool { device == other.device && inode == other.inode }
    }

    /// - Returns: `nil` if there is nothing at the path. - Throws: `SystemError` naming the path.
    public static func status(of path: String) throws(SystemError) -> Status? {
        var raw = stat()
        // SAFETY: lstat reads the path and fills the structure; it keeps neither.
        guard unsafe lstat(path, &raw) == 0 else {
            if errno == ENOENT || errno == ENOTDIR { return nil }
            throw .last("look at", path)
        }
        let kind: Status.Kind =
            switch raw.st_mode & S_IFMT {
            case S_IFDIR: .folder
            case S_IFSOCK: .socket
            case S_IFREG: .file
            case S_IFLNK: .link
            default: .other
            }
        return Status(
            kind: kind, ownerUserID: raw.st_uid, mode: raw.st_mode & 0o7777, device: UInt64(raw.st_dev),
            inode: UInt64(raw.st_ino))
    }

    /// Makes a folder with this mode, whatever the umask, if there is nothing at the path yet.
    public static func makeFolder(_ path: String, mode: UInt32 = 0o700) throws(SystemError) {
        // SAFETY: both calls read the path and keep nothing.
        guard unsafe mkdir(path, mode) == 0 else {
            if errno == EEXIST { return }
            throw .last("make folder", path)
        }
        guard unsafe chmod(path, mode) == 0 else { throw .last("make folder", path) }
    }

    /// Removes a file, a link or a socket; that it is gone already is no error.
    public static func remove(_ path: String) throws(SystemError) {
        // SAFETY: unlink reads the path for the time of the call.
        guard unsafe unlink(path) == 0 || errno == ENOENT else { throw .last("remove", path) }
    }

    /// The names in a folder without `.` and `..`, sorted.
    public static func names(inFolder path: String) throws(SystemError) -> [String] {
        // SAFETY: the stream is closed once, after the last entry; an entry is copied before the next is read.
        guard let stream = unsafe opendir(path) else { throw .last("open folder", path) }
        defer { unsafe closedir(stream) }
        var names: [String] = []
        while let entry = unsafe readdir(stream) {
            let bytes = unsafe withUnsafeBytes(of: &entry.pointee.d_name) { unsafe [UInt8]($0.prefix { $0 != 0 }) }
            names.append(String(decoding: bytes, as: UTF8.self))
        }
        return names.filter { $0 != "." && $0 != ".." }.sorted()
    }

    /// The exclusive lock of a folder (flock): held as long as the descriptor lives.
    /// - Throws: `SystemError`, `ETIMEDOUT` if another process holds it until the deadline.
    public static func lockFolder(_ path: String, deadline: Deadline) throws(SystemError) -> Descriptor {
        let folder = try Descriptor.open(path, O_RDONLY | O_DIRECTORY)
        while flock(folder.number, LOCK_EX | LOCK_NB) != 0 {
            guard errno == EWOULDBLOCK || errno == EINTR else { throw .last("lock folder", path) }
            if deadline.hasPassed { throw SystemError("lock folder", path, code: ETIMEDOUT) }
            Clock.sleep(nanoseconds: 1_000_000)
        }
        return folder
    }
}

/// The user on whose behalf this process acts.
public enum Account {
    public static var effectiveUserID: UInt32 { geteuid() }
}
