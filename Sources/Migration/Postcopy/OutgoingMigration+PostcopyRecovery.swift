import GuestMemory
import Host
import MigrationStream
import Synchronization
import Transport

// Postcopy goes on over another connection: the shell's part.

extension OutgoingMigration {
    /// The operator gives up the connection of a guest that moved (`migrate-pause`).
    func breakOff() throws(MigrationError) { try command(.breakOff) }

    /// On the thread that reads answers: a bitmap goes where it is needed, and no further.
    func takeBitmap(
        of block: String, _ decoder: inout ReturnPathDecoder, _ buffer: inout ReceiveBuffer, _ channel: Channel
    ) throws {
        guard let bitmaps = sender.postcopy?.bitmaps.withLock({ $0 }) else {
            throw PageRequests.Refusal.bitmapUnasked(block: block)
        }
        try bitmaps.begin(block)
        while decoder.payloadBytes > 0 {
            if buffer.isEmpty {
                let count = try unsafe buffer.fill(atLeast: 1024) { (room) throws(ChannelError) in
                    try unsafe channel.receive(into: room)
                }
                guard count > 0 else { throw ChannelError.endOfStream(peer: channel.peer, received: 0, wanted: 1) }
            }
            let count = min(buffer.count, decoder.payloadBytes)
            bitmaps.take(buffer.bytes.extracting(first: count))
            buffer.consume(count)
            decoder.payloadConsumed(count)
        }
    }

    /// All bitmaps are here: from now on pages may be asked for.
    func adoptBitmaps() {
        do throws(SystemError) {
            try sender.postcopy?.adoptBitmaps()
            noteHome()
        } catch { post(.disconnected("what the destination has could not be taken in: \(error.description)")) }
    }
}

extension PostcopySource {
    /// Another connection is there: nothing of the one before counts any more.
    func prepareRecovery() { startOver() }

    /// What is to be sent from here on.
    func adoptBitmaps() throws(SystemError) {
        guard let received = bitmaps.withLock({ $0.take() })?.received, let old = pages.withLock({ $0 }) else { return }
        let left = try OutgoingPages(old, without: received)
        pages.withLock { $0 = left }
        statistics.recovered(remainingPages: left.count)
        requests.open(left)
    }
}
