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
        let channel: Channel
        var words: [Word] = []
        var byteCount = 0
        /// Of a connection that is closed behind all that was said: so long its peer may take to read it.
        var end: Deadline?
    }

    private struct State {
        /// Connections whose peers are waited for, each by a thread.
        var lines: [ConnectionID: Line] = [:]
        /// A thread looks at the ends of lines.
        var isWatched = false
    }

    private let state = Monitor(State())
    /// Held by who says something.
    private let turn = Mutex(())
    private let closingNanoseconds: UInt64
    /// So much is kept for a peer that does not read.
    private static let mostBytes = 1 << 16

    /// - Parameter closingNanoseconds: how long the peer of a connection that is closed may take to read its last words, whatever it reads
    ///   meanwhile: to the channel every byte is a sign of life.
    init(closingNanoseconds: UInt64 = 10_000_000_000) { self.closingNanoseconds = closingNanoseconds }

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
        let isWaitedFor = try state.withLock { (state) throws(ChannelError) -> Bool in
            guard let line = state.lines[id] else { return false }
            guard line.byteCount + bytes.count <= Self.mostBytes else {
                throw .unusable("\(channel.peer) does not read what it is told")
            }
            state.lines[id]?.words.append(.bytes(bytes))
            state.lines[id]?.byteCount += bytes.count
            return true
        }
        guard !isWaitedFor else { return }
        if channel.takesBytesNow { return try channel.send(bytes) }
        try wait(for: channel, id, bytes, failed)
    }

    /// Says behind everything else that nothing more comes, and closes.
    func close(_ channel: Channel, _ id: ConnectionID) {
        let (isWaitedFor, isWatched) = state.withLock { state in
            guard state.lines[id] != nil else { return (false, false) }
            state.lines[id]?.words.append(.close)
            state.lines[id]?.end = .after(nanoseconds: closingNanoseconds)
            defer { state.isWatched = true }
            return (true, state.isWatched)
        }
        guard isWaitedFor else { return Self.finish(channel) }
        guard !isWatched else { return }
        do throws(SystemError) { try HostThread.detached(name: "migration-last") { [self] in watchEnds() } } catch {
            // Nobody can look at the clock: then nobody is waited for.
            let closed = state.withLock { state in
                state.isWatched = false
                return state.lines.values.filter { $0.end != nil }.map(\.channel)
            }
            for channel in closed { channel.cancel() }
        }
    }

    /// Cancels connections that are closed and take too long, as long as there are any that are closed.
    private func watchEnds() {
        while let next = nextEnd() {
            // Those that are closed later have more time: only this end matters, as long as its peer is waited for.
            state.wait(deadline: next) { state in state.lines.values.contains { $0.end == next } ? nil : () }
            let late = state.withLock { state in
                let ids = state.lines.keys.filter { state.lines[$0]?.end?.hasPassed == true }
                // Their threads notice, and are not looked at any more.
                for id in ids { state.lines[id]?.end = nil }
                return ids.compactMap { state.lines[$0]?.channel }
            }
            for channel in late { channel.cancel() }
        }
    }

    private func nextEnd() -> Deadline? {
        state.withLock { state in
            let next = state.lines.values.compactMap(\.end).min()
            state.isWatched = next != nil
            return next
        }
    }

    private static func finish(_ channel: Channel) {
        // A peer that is gone already is no news.
        if channel.kind == .socket, channel.takesBytesNow { try? channel.finish() }
        channel.cancel()
    }

    private func wait(
        for channel: Channel, _ id: ConnectionID, _ first: [UInt8], _ failed: @escaping @Sendable (String) -> Void
    ) throws(ChannelError) {
        state.withLock { $0.lines[id] = Line(channel: channel, words: [.bytes(first)], byteCount: first.count) }
        do throws(SystemError) {
            _ = try HostThread(name: "migration-word") { [self] in
                do throws(ChannelError) {
                    while let word = next(id) {
                        guard case .bytes(let bytes) = word else { return Self.finish(channel) }
                        try channel.send(bytes)
                    }
                } catch {
                    let isClosed =
                        state.withLock { $0.lines.removeValue(forKey: id) }?.words.contains(where: \.isClose) == true
                    if isClosed { channel.cancel() } else { failed(error.description) }
                }
            }
        } catch {
            state.withLock { $0.lines[id] = nil }
            throw .system(error)
        }
    }

    private func next(_ id: ConnectionID) -> Word? {
        state.withLock { state in
            guard let word = state.lines[id]?.words.first else {
                state.lines[id] = nil
                return nil
            }
            state.lines[id]?.words.removeFirst()
            if case .bytes(let bytes) = word {
                state.lines[id]?.byteCount -= bytes.count
            } else {
                state.lines[id] = nil
            }
            return word
        }
    }
}

extension AnswerQueue.Word {
    fileprivate var isClose: Bool { if case .close = self { true } else { false } }
}
