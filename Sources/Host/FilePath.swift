import CLinux
import Glibc

/// Names of files, as the kernel resolves them.
public enum FilePath {
    /// The same file's name from the root, for a process that may be somewhere else; symbolic links stay.
    /// - Throws: `SystemError` where the present folder is gone.
    public static func absolute(_ path: String) throws(SystemError) -> String {
        guard !path.hasPrefix("/") else { return path }
        // SAFETY: with no buffer the C library makes one, which is ours to free.
        guard let folder = unsafe getcwd(nil, 0) else { throw SystemError("find", "the present folder", code: errno) }
        defer { unsafe free(folder) }
        return unsafe String(cString: folder) + "/" + path
    }

    /// The name behind all symbolic links; `nil` if there is no such file.
    public static func resolved(_ path: String) -> String? {
        // SAFETY: as above.
        guard let name = unsafe realpath(path, nil) else { return nil }
        defer { unsafe free(name) }
        return unsafe String(cString: name)
    }

    public static func isRegularFile(_ path: String) -> Bool {
        var status = stat()
        return unsafe stat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
    }

    /// Gives a file another name in the same folder, in place of one that has it already: at no moment has neither file that name. Returns
    /// when the folder is on the disk.
    public static func rename(_ path: String, to other: String) throws(SystemError) {
        guard unsafe Glibc.rename(path, other) == 0 else {
            throw SystemError("rename", "\(path) to \(other)", code: errno)
        }
        let folder = other.lastIndex(of: "/").map { other[...$0] } ?? "."
        try Descriptor.open(String(folder), O_RDONLY | O_DIRECTORY).synchronize()
    }
}
