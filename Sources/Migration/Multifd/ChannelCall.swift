import Host
import MigrationStream
import Transport

/// Connects the channels of a migration, and greets on each.
///
/// Several at a time: with TLS a channel takes three ways there and back, and a destination waits for all of 64 no longer than for one.
struct ChannelCall: Sendable {
    let count: Int
    let migration: MigrationIdentifier
    /// Of the machine; a QEMU destination wants its own.
    var uuid: MigrationIdentifier?
    var kind = MultifdGreeting.Kind.pages

    /// So many handshakes are under way at most: a burst of more would overflow what a listener holds for its process.
    static let atOnce = 16

    /// Starts a thread; another one in tests.
    var startThread: @Sendable (@escaping @Sendable () -> Void) throws(SystemError) -> Void = {
        (body) throws(SystemError) in _ = try HostThread(name: "multifd-conn", body)
    }

    private struct State {
        var next = 0
        var working = 0
        var channels: [Channel?]
        var failure: ChannelError?
    }

    /// - Parameter token: ends all; it is cancelled when one fails, too.
    /// - Returns: all channels, in order.
    /// - Throws: `ChannelError`: the first that happened, with the channel's number. No connection is left then.
    func connect(
        to address: MigrationAddress, connector: Connector, cancel token: CancelToken
    ) throws(ChannelError) -> [Channel] {
        let state = Monitor(State(channels: [Channel?](repeating: nil, count: count)))
        @Sendable func fail(_ error: ChannelError) {
            state.withLock { $0.failure = $0.failure ?? error }
            token.cancel()
        }
        for number in 0..<min(count, Self.atOnce) {
            state.withLock { $0.working += 1 }
            do throws(SystemError) {
                try startThread {
                    while let index = Self.next(state, count) {
                        do throws(ChannelError) {
                            let channel = try one(index, to: address, connector: connector, cancel: token)
                            state.withLock { $0.channels[index] = channel }
                        } catch { fail(error) }
                    }
                    state.withLock { $0.working -= 1 }
                }
            } catch {
                state.withLock { $0.working -= 1 }
                // A host short of threads: those that it had for us connect all channels, in more time.
                guard number == 0 else { break }
                fail(.system(error))
            }
        }
        state.wait { $0.working == 0 ? () : nil }
        let (channels, failure) = state.withLock { ($0.channels.compactMap { $0 }, $0.failure) }
        guard let failure else { return channels }
        for channel in channels { channel.cancel() }
        throw failure
    }

    private static func next(_ state: Monitor<State>, _ count: Int) -> Int? {
        state.withLock { state in
            guard state.failure == nil, state.next < count else { return nil }
            state.next += 1
            return state.next - 1
        }
    }

    private func one(
        _ index: Int, to address: MigrationAddress, connector: Connector, cancel token: CancelToken
    ) throws(ChannelError) -> Channel {
        let channel: Channel
        do throws(ChannelError) { channel = try connector.connect(to: address, cancel: token) } catch {
            if error == .cancelled { throw error }
            throw .unusable("channel \(index + 1) of \(count): \(error.description)")
        }
        let mark = MultifdGreeting.Mark(migration: migration, channels: count, kind: kind)
        let nobody = MigrationIdentifier(high: 0, low: 0)
        do throws(ChannelError) {
            try channel.send(MultifdGreeting(channel: UInt8(index), uuid: uuid ?? nobody, mark: mark).bytes)
        } catch {
            channel.cancel()
            throw error
        }
        return channel
    }
}
