import Host
import TestSupport
import Testing
import Transport

@testable import Migration

@Suite("What a destination says to peers that are slow to read")
struct AnswerQueueTests {
    private let listener: Listener
    private let peer: Descriptor
    private let channel: Channel
    private let path = temporaryPath("answers-\(UInt64.random(in: 0...UInt64.max))")

    init() throws {
        listener = try Listener(on: .unix(path: path), tls: nil, descriptors: { _ in nil })
        peer = try Socket.connect(unix: path)
        channel = try listener.accept()
    }

    /// Says words until the socket takes no more and the queue neither. - Returns: all bytes said.
    private func fill(_ queue: AnswerQueue, _ id: ConnectionID) throws -> Int {
        let word = [UInt8](repeating: 7, count: 1024)
        var (said, refusals) = (0, 0)
        while refusals < 20 {
            do {
                try queue.say(word, on: channel, id) { _ in }
                (said, refusals) = (said + word.count, 0)
                try #require(said < 64 << 20, "the socket takes everything")
            } catch is ChannelError {
                refusals += 1
                Clock.sleep(nanoseconds: 10_000_000)
            }
        }
        return said
    }

    @Test("a peer that reads on hears all, though its connection was closed", .timeLimit(.minutes(10)))
    func patient() throws {
        let queue = AnswerQueue()
        let said = try fill(queue, ConnectionID(1))
        queue.close(channel, ConnectionID(1))
        var heard = 0
        while let bytes = try peer.read(upTo: 1 << 20), !bytes.isEmpty { heard += bytes.count }
        #expect(heard == said)
        #expect(throws: ChannelError.self) { try channel.send([1]) }
    }

    @Test(
        "a peer that takes a little now and then does not keep a closed connection for ever", .timeLimit(.minutes(10)))
    func dripping() throws {
        let queue = AnswerQueue(closingNanoseconds: 200_000_000)
        let said = try fill(queue, ConnectionID(1))
        queue.close(channel, ConnectionID(1))
        let end = Deadline.after(seconds: 1)
        var heard = 0
        while !end.hasPassed {
            heard += try peer.read(upTo: 512)?.count ?? 0
            Clock.sleep(nanoseconds: 50_000_000)
        }
        // What the socket held by then is still there; what was waiting for it is not.
        while let bytes = try peer.read(upTo: 1 << 20), !bytes.isEmpty { heard += bytes.count }
        #expect(heard < said)
    }
}
