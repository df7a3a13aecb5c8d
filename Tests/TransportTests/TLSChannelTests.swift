import Glibc
import Host
import Synchronization
import Testing

@testable import Transport

@Suite("TLS: bytes on their way", .timeLimit(.minutes(10)))
struct TLSChannelTests {
    @Test(
        "ranges of every size arrive whole, both ways at once, also when both ends change keys all the time",
        arguments: [0, 30_000])
    func bothWays(keyBytes: Int) throws {
        let (a, b) = try tlsPair()
        if keyBytes > 0 { for end in [a, b] { end.tls?.updateKeys(everyBytes: keyBytes) } }
        let source = try Mapping(anonymousByteCount: 8 << 20)
        for word in 0..<source.byteCount / 8 { source.store(UInt64(word) &* 0x9E37_79B9_7F4A_7C15, at: word * 8) }
        let targets = [
            try Mapping(anonymousByteCount: source.byteCount), try Mapping(anonymousByteCount: source.byteCount),
        ]
        let threads = try [(a, b, targets[0], 3), (b, a, targets[1], 4)].flatMap { out, into, target, seed in
            [
                try Background { try Self.transfer(source, seed: seed) { try out.send(&$0) } },
                // Other ranges than the sender's: the stream has no boundaries.
                try Background { try Self.transfer(target, seed: seed + 10) { try into.receive(&$0) } },
            ]
        }
        for thread in threads { try thread.value() }
        let whole = source.read(at: 0, count: source.byteCount)
        for target in targets { #expect(target.read(at: 0, count: target.byteCount) == whole) }
        #expect(a.bytesSent == UInt64(source.byteCount) && a.bytesReceived == a.bytesSent)
    }

    /// Goes over a mapping in ranges of 1 byte to 100 KB, which touch, so that the vectors are cut in ranges by hand.
    private static func transfer(_ mapping: Mapping, seed: Int, _ body: (inout IOVector) throws -> Void) throws {
        var vector = IOVector()
        var state = UInt64(seed)
        var offset = 0
        while offset < mapping.byteCount {
            state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
            let size = state >> 60 < 4 ? Int(state >> 33) % 100_000 : Int(state >> 33) % 5000
            let count = min(size + 1, mapping.byteCount - offset)
            vector.append(mapping, offset: offset, count: count)
            offset += count
            if state >> 40 & 1 == 0 {
                try body(&vector)
                vector.removeAll()
            }
        }
        try body(&vector)
    }

    @Test("an end that was announced is an end; one that was not is an error, and the next receive says so too")
    func truncation() throws {
        let (a, b) = try tlsPair()
        try a.send([1])
        try a.finish()
        #expect(try b.receive(exactly: 1) == [1])
        var rest: [UInt8] = []
        #expect(try b.receive(appendingTo: &rest, upTo: 1) == 0)
        // The other direction is still open.
        try b.send([2])
        #expect(try a.receive(exactly: 1) == [2])
        let socket = try #require(b.input)
        Socket.shutdown(socket)
        for _ in 0..<2 {
            let error = #expect(throws: ChannelError.self) { try a.receive(exactly: 1) }
            #expect(error?.description.contains("without saying so") == true, "\(String(describing: error))")
        }
    }

    @Test("what is not from the peer is noticed, and nothing after it is received")
    func tampering() throws {
        let (a, b) = try tlsPair()
        let socket = try #require(a.input)
        // A record of the right form with a wrong tag.
        try socket.writeAll([0x17, 0x03, 0x03, 0x00, 0x20] + [UInt8](repeating: 0xaa, count: 32))
        let error = #expect(throws: ChannelError.self) { try b.receive(exactly: 1) }
        guard case .tls = error else {
            Issue.record("not an error of TLS: \(String(describing: error))" as Comment)
            return
        }
        #expect(throws: ChannelError.self) { try b.send([1]) }
        // And the sender hears that.
        #expect(throws: ChannelError.self) { try a.receive(exactly: 1) }
    }

    @Test("nothing goes through before the handshake")
    func before() throws {
        let (server, _) = try keyPair(Credentials())
        let listener = try Listener(on: .tcp(host: "127.0.0.1", port: "0"), tls: server)
        let socket = try Socket.connect(host: "127.0.0.1", port: port(of: listener), deadline: .after(seconds: 5))
        let channel = try listener.accept(deadline: .after(seconds: 5))
        try socket.writeAll(Array("QEVM".utf8))
        #expect(throws: ChannelError.self) { try channel.send([1]) }
        #expect(throws: ChannelError.self) { try channel.receive(exactly: 1) }
    }

    @Test("without TLS only this machine is listened to, unless that is allowed")
    func closedByDefault() throws {
        for host in ["", "0.0.0.0", "::", "192.0.2.1"] {
            let error = #expect(throws: ChannelError.self) { try Listener(on: .tcp(host: host, port: "0")) }
            #expect(
                error?.description.contains("--insecure-plaintext") == true, "\(host): \(String(describing: error))")
        }
        for host in ["127.0.0.1", "localhost", "127.3.2.1"] { _ = try Listener(on: .tcp(host: host, port: "0")) }
        _ = try Listener(on: .tcp(host: "", port: "0"), allowsPlaintext: true)
        let (server, _) = try keyPair(Credentials())
        _ = try Listener(on: .tcp(host: "0.0.0.0", port: "0"), tls: server)
        // A socket that somebody else opened is no way around it.
        let open = try Socket.listen(host: "0.0.0.0", port: "0")
        #expect(throws: ChannelError.self) { try Listener(on: .descriptor("open"), descriptors: { _ in open }) }
    }
}
