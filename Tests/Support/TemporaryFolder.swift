import Glibc
import Host
import Synchronization

/// A path in a folder that belongs to this process, and goes with it: also when a child process of a test fails (`Child`). Only one that
/// is killed leaves it.
public func temporaryPath(_ name: String) -> String { "\(TemporaryFolder.path)/\(name)" }

/// The folder of this process.
enum TemporaryFolder {
    private static let isMade = Atomic(false)

    static let path: String = {
        let path = "/tmp/godwit-test-\(getpid())"
        // It may have been left by a process of the same number.
        removeAll(path)
        unsafe mkdir(path, 0o700)
        isMade.store(true, ordering: .sequentiallyConsistent)
        atexit { TemporaryFolder.remove() }
        return path
    }()

    /// `_exit` takes no leave: who calls it calls this before.
    static func remove() {
        if isMade.load(ordering: .sequentiallyConsistent) { removeAll(path) }
    }

    /// Removes a folder of ours and all in it, also where a file system is still mounted.
    static func removeAll(_ folder: String) {
        for name in (try? FileSystem.names(inFolder: folder)) ?? [] {
            let path = "\(folder)/\(name)"
            if (try? FileSystem.status(of: path))?.kind == .folder { removeAll(path) } else { Descriptor.remove(path) }
        }
        guard unsafe rmdir(folder) != 0, errno == EBUSY else { return }
        unsafe umount2(folder, CInt(MNT_DETACH))
        unsafe rmdir(folder)
    }
}

extension Child {
    /// A file system that this process alone sees, and the threads that the caller starts from here on: it goes with the process, however
    /// that ends.
    public static func mount(_ kind: String, at folder: String, options: String? = nil) {
        // SAFETY: glibc's function, with the type it has; it reads one number.
        let unshare = unsafe unsafeBitCast(
            dlsym(nil, "unshare"), to: (@convention(c) (CInt) -> CInt)?.self)
        let newNamespace: CInt = 0x20000
        claim(unshare?(newNamespace) == 0, "there is no other view of the file systems")
        claim(unsafe Glibc.mount("none", "/", nil, UInt(MS_REC | MS_PRIVATE), nil) == 0, "it is not ours alone")
        unsafe mkdir(folder, 0o700)
        claim(unsafe Glibc.mount("none", folder, kind, 0, options) == 0, "a \(kind) is not mounted")
    }
}
