public import Host

/// Why a channel could not be opened, or cannot go on. The description is one sentence with the operation, the peer and the cause.
public enum ChannelError: Error, Equatable, Sendable, CustomStringConvertible {
    /// `Channel.cancel`, `CancelToken.cancel` or `Listener.close` ended the operation.
    case cancelled
    /// The peer moved no byte for the stall limit.
    case stalled(operation: String, peer: String, milliseconds: UInt64)
    /// The stream ended inside something that has a known length, in bytes.
    case endOfStream(peer: String, received: Int, wanted: Int)
    /// The command of an `exec:` channel ended, but not well.
    case commandFailed(command: String, status: ChildProcess.ExitStatus)
    /// What was asked for cannot be done on this kind of channel or address: the object, the reason, the remedy.
    case unusable(String)
    /// TLS keeps the channel from being used: the peer, the cause, the remedy.
    case tls(String)
    /// A system call failed; its object is the peer. `ETIMEDOUT`: a deadline passed.
    case system(SystemError)

    public var description: String {
        switch self {
        case .cancelled: "the operation was cancelled"
        case .stalled(let operation, let peer, let milliseconds):
            "\(operation) \(peer): no byte moved for \(Self.duration(milliseconds)); the peer hangs or the way to it is blocked"
        case .endOfStream(let peer, let received, let wanted):
            "receive from \(peer): the stream ended after \(received) of \(wanted) bytes; the peer ended before it was done"
        case .commandFailed(let command, .exited(let code)): "exec:\(command): the command ended with status \(code)"
        case .commandFailed(let command, .signalled(let signal)):
            "exec:\(command): the command was ended by signal \(signal)"
        case .unusable(let sentence), .tls(let sentence): sentence
        case .system(let error): error.description
        }
    }

    private static func duration(_ milliseconds: UInt64) -> String {
        milliseconds % 1000 == 0 ? "\(milliseconds / 1000) s" : "\(milliseconds) ms"
    }
}

/// Runs a call of Host as part of a channel's work.
func channelled<R>(_ body: () throws(SystemError) -> R) throws(ChannelError) -> R {
    do throws(SystemError) { return try body() } catch { throw .system(error) }
}
