import Synchronization
import Transport

/// Connections whose TLS handshake is under way. There are so many at most: when another comes, the oldest gives way.
///
/// A peer with good credentials is done in milliseconds, and one that never will be cannot keep it out by waiting.
final class HandshakeQueue: Sendable {
    static let limit = 128
    private let waiting = Mutex<[(id: ConnectionID, channel: Channel)]>([])

    func enter(_ id: ConnectionID, _ channel: Channel) {
        let evicted = waiting.withLock { waiting in
            waiting.append((id, channel))
            return waiting.count > Self.limit ? waiting.removeFirst() : nil
        }
        evicted?.channel.cancel()
    }

    func leave(_ id: ConnectionID) { waiting.withLock { $0.removeAll { $0.id == id } } }
}
