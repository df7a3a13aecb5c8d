import Glibc
public import Host

/// The program that this process runs.
public enum ThisProgram {
    /// Where it lies, to start it again. - Throws: `SystemError` without /proc.
    public static func path() throws(SystemError) -> String {
        var buffer = [UInt8](repeating: 0, count: Int(PATH_MAX))
        // SAFETY: readlink fills at most the buffer's count and tells how much.
        let count = unsafe buffer.withUnsafeMutableBytes {
            unsafe readlink("/proc/self/exe", $0.baseAddress!.assumingMemoryBound(to: CChar.self), $0.count)
        }
        guard count > 0 else { throw .last("read link", "/proc/self/exe") }
        return String(decoding: buffer.prefix(count), as: UTF8.self)
    }

    /// Becomes another program, which the kernel ends when the process that started this one dies. - Throws: why that failed.
    public static func become(_ arguments: [String]) throws(SystemError) -> Never {
        precondition(!arguments.isEmpty, "a program to become")
        try ChildProcess.dieWithParent()
        // SAFETY: the copies live until execvp has replaced this process, or until the process ends by the error.
        var words: [UnsafeMutablePointer<CChar>?] = unsafe arguments.map { unsafe strdup($0) } + [nil]
        unsafe execvp(arguments[0], &words)
        throw .last("start", arguments[0])
    }
}
