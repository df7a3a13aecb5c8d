import Glibc
import Host
import Testing

@testable import Transport

/// The kinds of channel that can block.
enum Medium: CaseIterable, Sendable {
    case socket, tcp, pipe, tls

    func pair(bufferBytes: CInt? = nil, limits: StallLimits = StallLimits()) throws -> (Channel, Channel) {
        switch self {
        case .socket: try channelPair(bufferBytes: bufferBytes, limits: limits)
        case .tcp: try tcpPair(bufferBytes: bufferBytes, limits: limits)
        case .pipe: try pipePair(limits: limits)
        case .tls: try tlsPair(bufferBytes: bufferBytes, limits: limits)
        }
    }
}

@Suite(.timeLimit(.minutes(10))) struct ChannelTests {
    @Test("a vector of pages arrives whole, through buffers far smaller than it", arguments: Medium.allCases)
    func partialTransfers(medium: Medium) throws {
        let (out, into) = try medium.pair(bufferBytes: 4608)
        let source = try Mapping(anonymousByteCount: 512 * 4096)
        for word in 0..<source.byteCount / 8 { source.store(UInt64(word) &* 0x9E37_79B9_7F4A_7C15, at: word * 8) }
        let sender = try Background {
            var vector = scatteredPages(source)
            try out.send(&vector)
            #expect(vector.byteCount == 0)
            try out.finish()
        }
        let target = try Mapping(anonymousByteCount: source.byteCount)
        var vector = scatteredPages(target)
        try into.receive(&vector)
        try sender.value()
        #expect(target.read(at: 0, count: target.byteCount) == source.read(at: 0, count: source.byteCount))
        #expect(out.bytesSent == 512 * 4096 && into.bytesReceived == 512 * 4096)
        var rest: [UInt8] = []
        #expect(try into.receive(appendingTo: &rest, upTo: 10) == 0)
    }

    @Test("bytes are received behind what the buffer holds, and no more than asked for", arguments: Medium.allCases)
    func growableBuffer(medium: Medium) throws {
        let (out, into) = try medium.pair()
        try out.send([1, 2, 3, 4, 5])
        var bytes: [UInt8] = [9]
        #expect(try into.receive(appendingTo: &bytes, upTo: 3) == 3)
        #expect(bytes == [9, 1, 2, 3])
        var raw = [UInt8](repeating: 0, count: 8)
        let count = try unsafe raw.withUnsafeMutableBytes { try unsafe into.receive(into: $0) }
        #expect(count == 2 && raw.prefix(3) == [4, 5, 0])
    }

    @Test("a stream that ends inside a record says how far it came", arguments: Medium.allCases)
    func endInside(medium: Medium) throws {
        let (out, into) = try medium.pair()
        try out.send([UInt8](repeating: 7, count: 4100))
        try out.finish()
        let mapping = try Mapping(anonymousByteCount: 8192)
        var vector = scatteredPages(mapping)
        #expect(throws: ChannelError.endOfStream(peer: into.peer, received: 4100, wanted: 8192)) {
            try into.receive(&vector)
        }
        #expect(mapping.load(at: 4096, as: UInt8.self) == 7)
        #expect(throws: ChannelError.endOfStream(peer: into.peer, received: 0, wanted: 1)) {
            try into.receive(exactly: 1)
        }
    }

    @Test("a socket that has finished sending still hears the answer")
    func answerAfterFinish() throws {
        let (a, b) = try channelPair()
        #expect(a.isBidirectional)
        try a.send([1])
        try a.finish()
        #expect(try b.receive(exactly: 1) == [1])
        var rest: [UInt8] = []
        #expect(try b.receive(appendingTo: &rest, upTo: 1) == 0)
        try b.send([2, 3])
        #expect(try a.receive(exactly: 2) == [2, 3])
        #expect(throws: ChannelError.self) { try a.send([4]) }
    }

    @Test(
        "sending to a peer that has gone is an error that names it, not the end of the process",
        arguments: [Medium.socket, .pipe])
    func closedPeer(medium: Medium) throws {
        var pair: (Channel, Channel)? = try medium.pair()
        let out = try #require(pair).0
        pair = nil
        let error = #expect(throws: ChannelError.self) { try out.send([1]) }
        #expect(error == .system(SystemError("send to", out.peer, code: EPIPE)))
    }

    @Test("a TCP peer that closes with bytes unread is an error of a later send")
    func resetByPeer() throws {
        var pair: (Channel, Channel)? = try tcpPair()
        let out = try #require(pair).0
        try out.send([1])
        pair = nil
        let error = #expect(throws: ChannelError.self) {
            while true { try out.send([UInt8](repeating: 0, count: 1 << 20)) }
        }
        let causes = [EPIPE, ECONNRESET].map { ChannelError.system(SystemError("send to", out.peer, code: $0)) }
        #expect(causes.contains { $0 == error })
    }

    @Test("a pipe goes one way")
    func oneWay() throws {
        let (out, into) = try pipePair()
        #expect(!out.isBidirectional && !into.isBidirectional)
        #expect(throws: ChannelError.unusable("receive from pipe: the channel is for sending only")) {
            try out.receive(exactly: 1)
        }
        #expect(throws: ChannelError.unusable("send to pipe: the channel is for receiving only, or finished")) {
            try into.send([1])
        }
        try out.finish()
        #expect(throws: ChannelError.self) { try out.send([1]) }
    }

    // MARK: Stalls

    @Test("a peer that stops reading is an error after the stall limit", arguments: Medium.allCases)
    func stalledSend(medium: Medium) throws {
        let (out, into) = try medium.pair(bufferBytes: 4608, limits: StallLimits(sendMilliseconds: 200))
        let start = Clock.monotonicNanoseconds
        #expect(throws: ChannelError.stalled(operation: "send to", peer: out.peer, milliseconds: 200)) {
            try out.send([UInt8](repeating: 0, count: 4 << 20))
        }
        let milliseconds = (Clock.monotonicNanoseconds - start) / 1_000_000
        #expect((200..<1500).contains(milliseconds))
        #expect(out.bytesSent > 0 && into.bytesReceived == 0)
    }

    @Test("a peer that reads slowly, but reads, does not stall", arguments: Medium.allCases)
    func slowPeer(medium: Medium) throws {
        let (out, into) = try medium.pair(bufferBytes: 4608, limits: StallLimits(sendMilliseconds: 1000))
        let reader = try Background {
            for _ in 0..<10 {
                Clock.sleep(nanoseconds: 150_000_000)
                _ = try into.receive(exactly: 256 << 10)
            }
        }
        try out.send([UInt8](repeating: 0, count: 2560 << 10))
        try reader.value()
    }

    @Test("a receive has a stall limit when it is asked for", arguments: Medium.allCases)
    func stalledReceive(medium: Medium) throws {
        let (out, into) = try medium.pair()
        try into.setStallLimits(StallLimits(receiveMilliseconds: 150))
        let start = Clock.monotonicNanoseconds
        #expect(throws: ChannelError.stalled(operation: "receive from", peer: into.peer, milliseconds: 150)) {
            try into.receive(exactly: 1)
        }
        #expect(Clock.monotonicNanoseconds - start >= 150_000_000)
        try into.setStallLimits(StallLimits())
        let late = try Background { try into.receive(exactly: 1) }
        Clock.sleep(nanoseconds: 300_000_000)
        try out.send([5])
        #expect(try late.value() == [5])
    }

    @Test("who waits for the end of a peer does not listen for ever to one that talks on")
    func talksOn() throws {
        let (out, into) = try channelPair(limits: StallLimits(sendMilliseconds: 1000))
        let talker = try Background {
            while (try? into.send([1])) != nil { Clock.sleep(nanoseconds: 10_000_000) }
        }
        try out.finish()
        #expect(throws: ChannelError.stalled(operation: "wait for the end of", peer: out.peer, milliseconds: 1000)) {
            try out.awaitEnd()
        }
        out.cancel()
        try talker.value()
    }

    @Test("a stall is told in one sentence")
    func stallSentence() {
        let error = ChannelError.stalled(operation: "send to", peer: "tcp:192.0.2.1:4444", milliseconds: 30_000)
        #expect(
            error.description == "send to tcp:192.0.2.1:4444: no byte moved for 30 s; "
                + "the peer hangs or the way to it is blocked")
    }

    // MARK: Cancelling

    @Test("cancelling ends a blocked send", arguments: Medium.allCases)
    func cancelSend(medium: Medium) throws {
        try expectQuickCancel {
            let (out, into) = try medium.pair(bufferBytes: 4608)
            let blocked = try Background { [into] in
                try out.send([UInt8](repeating: 0, count: 4 << 20))
                _ = into
            }
            return (blocked, { out.cancel() })
        }
    }

    @Test("cancelling ends a blocked receive", arguments: Medium.allCases)
    func cancelReceive(medium: Medium) throws {
        try expectQuickCancel {
            let (out, into) = try medium.pair()
            let blocked = try Background { [out] in
                _ = try into.receive(exactly: 1)
                _ = out
            }
            return (blocked, { into.cancel() })
        }
    }

    @Test("after cancelling, every operation says so", arguments: Medium.allCases)
    func cancelled(medium: Medium) throws {
        let (out, into) = try medium.pair()
        out.cancel()
        into.cancel()
        into.cancel()
        #expect(out.isCancelled)
        #expect(throws: ChannelError.cancelled) { try out.send([1]) }
        #expect(throws: ChannelError.cancelled) { try into.receive(exactly: 1) }
        #expect(throws: ChannelError.cancelled) { try out.finish() }
    }
}
