import Glibc
public import Host

/// A folder for this process alone, mode 0700, that is gone with all in it after `remove`.
public struct PrivateFolder: Sendable {
    public let path: String

    /// - Parameter purpose: becomes part of the name: `godwit-demo-...`.
    /// - Throws: `SystemError` if it cannot be made.
    public init(_ purpose: String) throws(SystemError) {
        // SAFETY: the string is copied before anything could change the environment.
        let wanted = unsafe getenv("TMPDIR").map { unsafe String(cString: $0) } ?? "/tmp"
        // Paths of unix sockets are short.
        let parent = wanted.hasPrefix("/") && wanted.utf8.count < 60 ? wanted : "/tmp"
        var template = Array("\(parent)/godwit-\(purpose)-XXXXXX".utf8CString)
        // SAFETY: mkdtemp changes the six X of the terminated text in place.
        guard unsafe mkdtemp(&template) != nil else { throw .last("make a folder in", parent) }
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    /// Removes the folder and the files in it.
    public func remove() {
        for name in (try? FileSystem.names(inFolder: path)) ?? [] { Descriptor.remove("\(path)/\(name)") }
        unsafe rmdir(path)
    }
}
