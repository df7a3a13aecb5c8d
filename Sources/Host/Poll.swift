import Glibc

/// What a descriptor can be waited for.
public struct Readiness: OptionSet, Sendable {
    public let rawValue: CShort
    public init(rawValue: CShort) { self.rawValue = rawValue }
    public static let readable = Readiness(rawValue: CShort(POLLIN))
    public static let writable = Readiness(rawValue: CShort(POLLOUT))
    /// The peer has gone or the descriptor has an error; reported without being asked for.
    public static let closed = Readiness(rawValue: CShort(POLLHUP | POLLERR | POLLNVAL))
}

/// Waits until one of the descriptors is ready. - Returns: what each is ready for; all empty when the deadline passed.
public func poll(_ wanted: [(Descriptor, Readiness)], deadline: Deadline = .never) throws(SystemError) -> [Readiness] {
    var entries = wanted.map { pollfd(fd: $0.0.number, events: $0.1.rawValue, revents: 0) }
    while true {
        // SAFETY: poll reads and writes the entries of the array for the time of the call.
        let count = unsafe entries.withUnsafeMutableBufferPointer {
            unsafe Glibc.poll($0.baseAddress, nfds_t($0.count), deadline.pollMilliseconds)
        }
        if count >= 0 { return entries.map { Readiness(rawValue: $0.revents) } }
        if errno != EINTR { throw .last("poll") }
    }
}

extension Descriptor {
    /// Waits for one thing. - Throws: `SystemError` with `ETIMEDOUT` when the deadline passes.
    public func wait(for readiness: Readiness, deadline: Deadline, operation: String) throws(SystemError) {
        let ready = try poll([(self, readiness)], deadline: deadline)
        if ready[0].isEmpty { throw SystemError(operation, name, code: ETIMEDOUT) }
    }
}
