import GuestMemory
import Host
import MigrationStream
import Synchronization
import Transport

// Postcopy goes on over another connection: the shell's part at the destination. All of it happens on the thread that reads that connection,
// on which nobody else says anything before the source is told that it may go on.

extension IncomingMigration {
    /// Bytes of a bitmap that are written at once.
    private static let bitmapWriteBytes = 256 << 10
    /// Requests that are said at once.
    private static let repeatedRequests = 256

    /// The operator gives up the connection (`migrate-pause`).
    func breakOff() { post(.breakOff) }

    /// Which pages of a block the source need not send: those that came, and those that it was never to send.
    func tellReceived(_ name: String, on channel: Channel) throws {
        guard let pending = postcopy?.pending, let block = blocks.firstIndex(where: { $0.name == name }) else { return }
        var writer = StreamWriter()
        writer.message(
            .postcopy(.receivedBitmap(block: name, byteCount: ReceivedBitmap.byteCount(of: blocks[block]))))
        var bytes = writer.take()
        for word in 0..<pending.wordCount(of: block) {
            let bits = pending.receivedBits(inWord: word, of: block)
            for shift in stride(from: 0, to: UInt64(64), by: 8) {
                bytes.append(UInt8(truncatingIfNeeded: bits >> shift))
            }
            guard bytes.count >= Self.bitmapWriteBytes else { continue }
            try channel.send(bytes)
            bytes.removeAll(keepingCapacity: true)
        }
        writer.message(.postcopy(.bitmapEnded(block: name)))
        try channel.send(bytes + writer.take())
    }

    /// The source serves requests again. What was asked for before and did not come is asked for once more.
    func goOn(_ id: ConnectionID, _ receiver: inout PageReceiver) throws {
        guard let postcopy else { return }
        receiver.placer = try postcopy.placer(inOrder: true)
        receiver.isCounted = true
        // First: who asks from now on asks there, and who asked before is found below.
        postcopySource.withLock { $0 = id }
        var requests: [PageRequest] = []
        func say() {
            var writer = StreamWriter()
            for request in requests { writer.message(.postcopy(.requestPages(request))) }
            requests.removeAll()
            if let reason = self.say(writer.bytes, on: id) { post(.disconnected(id, reason)) }
        }
        for block in blocks.indices {
            postcopy.pending.forEachOpenRequest(of: block) { page in
                requests.append(
                    PageRequest(
                        block: blocks[block].name, offset: page.offset.value, length: UInt32(GuestPage.byteCount)))
                if requests.count == Self.repeatedRequests { say() }
            }
        }
        if !requests.isEmpty { say() }
    }
}

extension PendingPages {
    func wordCount(of block: Int) -> Int { blocks[block].expected.wordCount }

    /// The pages of a word that need not be sent.
    func receivedBits(inWord word: Int, of block: Int) -> UInt64 {
        let record = blocks[block]
        let left = record.expected.pageCount - UInt64(word) * 64
        let pages = left < 64 ? ~(UInt64.max << left) : .max
        return (~record.expected.bits(inWord: word) | record.placed.bits(inWord: word)) & pages
    }

    /// Pages that were asked for and have not come.
    func forEachOpenRequest(of block: Int, _ body: (PageIndex) -> Void) {
        let record = blocks[block]
        var position = PageIndex(0)
        while let run = record.asked.nextRun(from: position, missingFrom: record.placed) {
            for page in run { body(page) }
            position = run.upperBound
        }
    }
}
