import Host
import Synchronization
import Transport

/// What the destination says on its connections. It is said at once where the peer reads what it is told; a peer that does not is
/// waited for by a thread of its own, `migration-word`, and by nobody who holds the core's lock.
final class AnswerQueue: Sendable {
    fileprivate enum Word {
        case bytes([UInt8])
        case close
    }

    private struct Line {
        var words: [Word] = []
        var byteCount = 0
    }

    /// Connections whose peers are waited for, each by a thread.
    private let lines = Mutex<[ConnectionID: Line]>([:])
    /// Held by who says something.
    private let turn = Mutex(())
    /// So much is kept for a peer that does not read.
    private static let mostBytes = 1 << 16

    /// From any thread; nobody waits here for a peer. - Parameter failed: called on the thread that waited, with a sentence, if nothing came of it.
    /// - Throws: `ChannelError` where that is known at once, and for a peer that has been told too much already.
    func say(
        _ bytes: [UInt8], on channel: Channel, _ id: ConnectionID, failed: @escaping @Sendable (String) -> Void
    ) throws(ChannelError) {
        try turn.withLock { (_) throws(ChannelError) in try sayInTurn(bytes, on: channel, id, failed) }
    }

    private func sayInTurn(
        _ bytes: [UInt8], on channel: Channel, _ id: ConnectionID, _ failed: @escaping @Sendable (String) -> Void
    ) throws(ChannelError) {
        let isWaitedFor = try lines.withLock { (lines) throws(ChannelError) -> Bool in
            guard lines[id] != nil else { return false }
            guard (lines[id]?.byteCount ?? 0) + bytes.count <= Self.mostBytes else {
                throw .unusable("\(channel.peer) does not read what it is told")
            }
            lines[id]?.words.append(.bytes(bytes))
            lines[id]?.byteCount += bytes.count
            return true
        }
        guard !isWaitedFor else { return }
        if channel.takesBytesNow { return try channel.send(bytes) }
        try wait(for: channel, id, .bytes(bytes), failed)
    }

    /// Says behind everything else that nothing more comes, and closes.
    func close(_ channel: Channel, _ id: ConnectionID) {
        let isWaitedFor = lines.withLock { lines in
            lines[id]?.words.append(.close)
            return lines[id] != nil
        }
        guard !isWaitedFor else { return }
        if !channel.takesBytesNow, (try? wait(for: channel, id, .close) { _ in }) != nil { return }
        Self.finish(channel)
    }

    private static func finish(_ channel: Channel) {
        // A peer that is gone already is no news.
        if channel.kind == .socket, channel.takesBytesNow { try? channel.finish() }
        channel.cancel()
    }

    private func wait(
        for channel: Channel, _ id: ConnectionID, _ first: Word, _ failed: @escaping @Sendable (String) -> Void
    ) throws(ChannelError) {
        lines.withLock { $0[id] = Line(words: [first]) }
        do throws(SystemError) {
            _ = try HostThread(name: "migration-word") { [self] in
                do throws(ChannelError) {
                    while let word = next(id) {
                        guard case .bytes(let bytes) = word else { return Self.finish(channel) }
                        try channel.send(bytes)
                    }
                } catch {
                    let isClosed =
                        lines.withLock { $0.removeValue(forKey: id) }?.words.contains(where: \.isClose) == true
                    if isClosed { channel.cancel() } else { failed(error.description) }
                }
            }
        } catch {
            lines.withLock { $0[id] = nil }
            throw .system(error)
        }
    }

    private func next(_ id: ConnectionID) -> Word? {
        lines.withLock { lines in
            guard let line = lines[id], let word = line.words.first else {
                lines[id] = nil
                return nil
            }
            lines[id]?.words.removeFirst()
            if case .bytes(let bytes) = word { lines[id]?.byteCount -= bytes.count } else { lines[id] = nil }
            return word
        }
    }
}

extension AnswerQueue.Word {
    fileprivate var isClose: Bool { if case .close = self { true } else { false } }
}
