import Host
import Synchronization

extension Channel {
    /// From now on a send waits while more than that waits in this host to go out. Sockets only; advice.
    public func limitUnsent(bytes: Int) {
        guard kind == .socket else { return }
        if let output = output.withLock({ $0 }) { Socket.limitUnsent(output, bytes: bytes) }
    }

    /// From now on no more than about that much waits in this host to be received. Sockets only; advice.
    public func limitUnreceived(bytes: Int) {
        if kind == .socket, let input { Socket.limitUnreceived(input, bytes: bytes) }
    }

    /// What a byte takes to the peer and back; `nil` where nobody knows.
    public var roundTripNanoseconds: UInt64? {
        kind == .socket ? input.flatMap { Socket.roundTripNanoseconds(of: $0) } : nil
    }
}
