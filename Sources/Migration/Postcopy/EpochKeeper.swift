import GuestMemory
import Host
import Machine
import MigrationStream
import Synchronization
import Transport

/// The source's end of a safety net: has the guest's memory and state as they were at the end of the last epoch that it said it has.
///
/// Pages of an epoch are pages that the destination has: they were sent, and are not sent again on any connection, whatever they hold here
/// since. One thread per link, `epoch-keep`.
final class EpochKeeper: Sendable {
    /// A guest as it was at the end of an epoch.
    struct Kept: Sendable {
        var epoch: UInt64 = 0
        /// `nil`: of the epoch in which it left this machine, which has that state.
        var states: [DeviceState]?
        var guestRuns = true
    }

    private struct State {
        var kept = Kept()
        /// Counts links: what an earlier one still brings does not count.
        var link: UInt64 = 0
        var channel: Channel?
        /// The guest left. While it is here nobody else writes its memory.
        var isAway = false
        var figures = MigrationInfo.SafetyNet()
    }

    private let memory: GuestMemory
    private let blocks: [RAMBlockDescription]
    private let state = Mutex(State())
    /// Held by who says something: two may.
    private let turn = Mutex(())

    init(_ memory: GuestMemory, _ blocks: [RAMBlockDescription]) {
        self.memory = memory
        self.blocks = blocks
    }

    var figures: MigrationInfo.SafetyNet { state.withLock { $0.figures } }

    // MARK: From other threads

    /// A link is there; the destination hears which epoch is kept here.
    /// - Parameters:
    ///   - stays: the destination says that the guest stays there.
    ///   - failed: told why the link is of no use any more.
    func attach(
        _ channel: Channel, stays: @escaping @Sendable () -> Void, failed: @escaping @Sendable (ChannelError) -> Void
    ) throws(SystemError) {
        let link = state.withLock { state in
            state.link += 1
            state.channel = channel
            return state.link
        }
        _ = try HostThread.detached(name: "epoch-keep") { [self] in
            do throws(ChannelError) { try read(channel, link, stays) } catch {
                guard isCurrent(link) else { return }
                failed(error)
                // The destination need not wait to see that nobody reads.
                channel.cancel()
            }
        }
    }

    /// The connection is gone: nothing more is kept of what it brings.
    func end() {
        let channel = state.withLock { state in
            state.link += 1
            return state.channel.take()
        }
        channel?.cancel()
    }

    /// The right to run it goes: from here on epochs are kept, the first behind what is here.
    func guestLeaves() {
        state.withLock { state in
            state.kept = Kept()
            state.isAway = true
        }
    }

    /// It runs here again.
    func guestIsBack() { state.withLock { $0.isAway = false } }

    /// The guest will never be taken back: the destination may know. Does not wait for it.
    func release() {
        let (link, channel) = state.withLock { state in
            state.figures.isOver = true
            return (state.link, state.channel)
        }
        guard let channel else { return }
        do throws(SystemError) {
            try HostThread.detached(name: "epoch-keep") { [self] in
                // If it does not reach the destination, that asks again.
                do throws(ChannelError) { try say(.released, on: channel) } catch {
                    if isCurrent(link) { channel.cancel() }
                }
            }
        } catch { channel.cancel() }
    }

    /// What the guest is taken back as: from here on no epoch is kept, whatever link comes.
    func takeOut() -> Kept {
        guestIsBack()
        end()
        return state.withLock { $0.kept }
    }

    /// It was not taken back after all.
    func putBack() { state.withLock { $0.isAway = true } }

    private func isCurrent(_ link: UInt64) -> Bool { state.withLock { $0.link == link } }

    private func say(_ message: EpochMessage, on channel: Channel) throws(ChannelError) {
        try turn.withLock { (_) throws(ChannelError) in try channel.send(message.bytes) }
    }

    // MARK: The thread

    /// What came of the epoch under way.
    private struct Epoch {
        struct Run {
            let block: Int
            let first: UInt64
            let count: UInt64
            /// `nil`: zeroes.
            let room: EpochBuffer.Room?
        }

        var buffer = EpochBuffer()
        var runs: [Run] = []
        var states: [DeviceState] = []
        var pages: UInt64 { runs.reduce(0) { $0 + $1.count } }

        mutating func removeAll() {
            buffer.removeAll()
            runs = []
            states = []
        }
    }

    private func read(_ channel: Channel, _ link: UInt64, _ stays: () -> Void) throws(ChannelError) {
        try say(.kept(epoch: state.withLock { $0.kept.epoch }), on: channel)
        var decoder = EpochDecoder(blocks)
        var buffer = ReceiveBuffer(capacity: 64 << 10)
        var epoch = Epoch()
        var isStaying = false
        while true {
            while let message = try Self.next(&decoder, &buffer) {
                switch message {
                case .pages(let block, let first, let count):
                    let room = try Self.placing { () throws(SystemError) in
                        try epoch.buffer.room(count * Wire.pageSize)
                    }
                    try Self.read(count * Wire.pageSize, into: room, &decoder, &buffer, channel)
                    epoch.runs.append(.init(block: block, first: first, count: UInt64(count), room: room))
                case .zeroes(let block, let first, let count):
                    epoch.runs.append(.init(block: block, first: first, count: count, room: nil))
                case .section(let section):
                    epoch.states.append(
                        DeviceState(
                            name: section.name, instance: section.instance, version: section.version,
                            body: section.body))
                case .end(let number, let guestRuns):
                    guard try keep(epoch, number, guestRuns, link) else { return }
                    epoch.removeAll()
                    try say(.kept(epoch: number), on: channel)
                // Once: it may say so without end.
                case .stays where isStaying: break
                case .stays:
                    isStaying = true
                    stays()
                case .kept, .released: throw .unusable("the destination says on its safety net what a source would")
                }
            }
            let count = try unsafe buffer.fill(atLeast: 16 << 10) { (room) throws(ChannelError) in
                try unsafe channel.receive(into: room)
            }
            guard count > 0 else { throw .unusable("the destination closed its safety net") }
        }
    }

    /// All of the epoch is here: from now on the guest is taken back as it was at its end, or later.
    /// - Returns: false: this link is none any more, and what it brought is not kept.
    private func keep(
        _ epoch: Epoch, _ number: UInt64, _ guestRuns: Bool, _ link: UInt64
    ) throws(ChannelError) -> Bool {
        let fault = state.withLock { state -> String?? in
            guard state.link == link else { return nil }
            guard state.isAway else { return .some("an epoch comes while the guest is here") }
            guard number == state.kept.epoch + 1 else {
                return .some(
                    StreamError(.epoch(.order(epoch: number, behind: state.kept.epoch)), position: 0).description)
            }
            for run in epoch.runs {
                let mapping = memory.blocks[run.block].mapping
                let (offset, count) = (Int(run.first) * Wire.pageSize, Int(run.count) * Wire.pageSize)
                if let room = run.room {
                    mapping.copy(from: room.mapping, at: room.offset, count: count, to: offset)
                } else {
                    mapping.zero(at: offset, count: count)
                }
            }
            state.kept = Kept(epoch: number, states: epoch.states, guestRuns: guestRuns)
            state.figures.epochs = number
            state.figures.add(pages: epoch.pages, bytes: UInt64(epoch.buffer.byteCount), paused: 0)
            return .some(nil)
        }
        guard let fault else { return false }
        if let fault { throw .unusable(fault) }
        return true
    }

    private static func next(
        _ decoder: inout EpochDecoder, _ buffer: inout ReceiveBuffer
    ) throws(ChannelError) -> EpochMessage? {
        do throws(StreamError) { return try decoder.next(from: &buffer) } catch { throw .unusable(error.description) }
    }

    private static func placing<R>(_ body: () throws(SystemError) -> R) throws(ChannelError) -> R {
        do throws(SystemError) { return try body() } catch { throw .system(error) }
    }

    private static func read(
        _ count: Int, into room: EpochBuffer.Room, _ decoder: inout EpochDecoder, _ buffer: inout ReceiveBuffer,
        _ channel: Channel
    ) throws(ChannelError) {
        let ahead = min(buffer.count, count)
        if ahead > 0 {
            unsafe room.mapping.withMutableBytes(at: room.offset, count: ahead) { _ = unsafe buffer.move(to: $0) }
        }
        if ahead < count {
            var vector = IOVector()
            vector.append(room.mapping, offset: room.offset + ahead, count: count - ahead)
            try channel.receive(&vector)
        }
        decoder.payloadConsumed(count)
    }
}
