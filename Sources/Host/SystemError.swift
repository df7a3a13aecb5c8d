import Glibc

/// A failed system call as one sentence: the operation, the object, the cause and, where there is one, the remedy.
public struct SystemError: Error, Equatable, Sendable, CustomStringConvertible {
    /// What was tried: `open`, `connect`, `KVM_CREATE_VM`.
    public let operation: String
    /// What it was tried on: a path, an address, a guest range. May be empty.
    public let object: String
    /// The errno value, positive.
    public let code: CInt
    /// What the reader can do about it.
    public let remedy: String?

    public init(_ operation: String, _ object: String = "", code: CInt, remedy: String? = nil) {
        self.operation = operation
        self.object = object
        self.code = code
        self.remedy = remedy
    }

    /// From the errno of the system call that failed just now.
    public static func last(_ operation: String, _ object: String = "", remedy: String? = nil) -> SystemError {
        SystemError(operation, object, code: errno, remedy: remedy)
    }

    /// The system's words for the errno value, without a capital.
    public var cause: String { Self.text(of: code) }

    public var description: String {
        let head = object.isEmpty ? operation : "\(operation) \(object)"
        let sentence = "\(head): \(cause)"
        guard let remedy else { return sentence }
        return "\(sentence); \(remedy)"
    }

    /// The system's words for an errno value, without a capital ("connection refused").
    public static func text(of code: CInt) -> String {
        var buffer = [CChar](repeating: 0, count: 256)
        // SAFETY: the buffer is ours and its size is passed along; the XSI variant fills it and terminates it.
        let status = unsafe buffer.withUnsafeMutableBufferPointer { unsafe strerror_r(code, $0.baseAddress!, $0.count) }
        guard status == 0 else { return "error \(code)" }
        let bytes = buffer.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }
        let words = String(decoding: bytes, as: UTF8.self)
        return words.prefix(1).lowercased() + words.dropFirst()
    }
}

/// The result of a call of CLinux (`-errno` on failure), or a `SystemError`.
@discardableResult
public func checked(
    _ result: CInt, _ operation: String, _ object: String = "", remedy: String? = nil
)
    throws(SystemError) -> CInt
{
    guard result < 0 else { return result }
    throw SystemError(operation, object, code: -result, remedy: remedy)
}
