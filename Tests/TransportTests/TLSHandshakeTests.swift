import Glibc
import Host
import TestSupport
import Testing

@testable import Transport

@Suite("TLS: who is let in", .timeLimit(.minutes(10)))
struct TLSHandshakeTests {
    @Test("pre-shared keys: both ends prove the key, and the server knows the user")
    func preSharedKey() throws {
        let (server, client) = try keyPair(Credentials())
        let meeting = try Meeting(server: server, client: client)
        let (a, b) = (try meeting.server.get(), try meeting.client.get())
        #expect(a.isSecure && b.isSecure && !a.awaitsHandshake)
        #expect(a.security?.peerName == "qemu")
        #expect(a.security?.cipher == "TLS_AES_128_GCM_SHA256" && b.security?.cipher == a.security?.cipher)
        try b.send([1, 2, 3])
        #expect(try a.receive(exactly: 3) == [1, 2, 3])
        try a.finish()
        var rest: [UInt8] = []
        #expect(try b.receive(appendingTo: &rest, upTo: 10) == 0)
    }

    private static let other = ["qemu": "ffeeddccbbaa99887766554433221100"]

    @Test("a wrong key and an unknown user are told at both ends, and both sentences say what to do")
    func wrongKey() throws {
        let credentials = try Credentials()
        let server = TLSSettings(try credentials.psk(.server))
        let wrong = try Meeting(server: server, client: TLSSettings(try credentials.psk(.client, keys: Self.other)))
        #expect(Meeting.words(wrong.server).contains("pre-shared key is not the one in our keys.psk"))
        #expect(Meeting.words(wrong.client).contains("it refuses our pre-shared key"))
        let stranger = TLSSettings(try credentials.psk(.client, keys: ["eve": "00ff"], user: "eve"))
        let unknown = try Meeting(server: server, client: stranger)
        #expect(Meeting.words(unknown.server).contains("no pre-shared key that is in our keys.psk"))
        #expect(Meeting.words(unknown.client).contains("it refuses our pre-shared key"))
    }

    @Test("a user with a good key who is not on the list is refused, and the log names the user")
    func listOfUsers() throws {
        let credentials = try Credentials()
        let server = try credentials.psk(.server)
        let client = TLSSettings(try credentials.psk(.client))
        let refused = try Meeting(
            server: TLSSettings(server, peers: TLSPeerList(identity: "somebody")), client: client)
        #expect(Meeting.words(refused.server).contains("'qemu' is not on the list"))
        #expect(Meeting.words(refused.client).contains("not on its list"))
        let admitted = try Meeting(server: TLSSettings(server, peers: TLSPeerList(identity: "qemu")), client: client)
        #expect(Meeting.words(admitted.server) == "it worked" && Meeting.words(admitted.client) == "it worked")
    }

    @Test("plaintext into TLS and TLS into plaintext: each end says which of the two it is")
    func plaintext() throws {
        let (server, client) = try keyPair(Credentials())
        let intoTLS = try Meeting(server: server, client: nil)
        #expect(Meeting.words(intoTLS.server).contains("what it sent is not TLS"))
        #expect(Meeting.words(intoTLS.client).contains("it speaks TLS, and this side does not"))
        let intoPlain = try Meeting(server: nil, client: client)
        #expect(Meeting.words(intoPlain.server).contains("it speaks TLS, and this side does not"))
        #expect(Meeting.words(intoPlain.client).contains("may not speak TLS"))
    }

    @Test("a peer that says nothing, or a byte now and then, has until the deadline")
    func slowPeer() throws {
        let (server, _) = try keyPair(Credentials())
        let listener = try Listener(on: .tcp(host: "127.0.0.1", port: "0"), tls: server)
        let socket = try Socket.connect(
            host: "127.0.0.1", port: port(of: listener), deadline: .after(seconds: 5))
        let channel = try listener.accept(deadline: .after(seconds: 5))
        #expect(channel.awaitsHandshake)
        let start = Clock.monotonicNanoseconds
        let serving = try Background { try channel.handshake(deadline: .after(milliseconds: 400)) }
        // The head of a record, byte by byte.
        for byte in [0x16, 0x03, 0x01, 0x02, 0x00, 0x01] as [UInt8] {
            try socket.writeAll([byte])
            Clock.sleep(nanoseconds: 60_000_000)
        }
        #expect(throws: ChannelError.self) { try serving.value() }
        let took = (Clock.monotonicNanoseconds - start) / 1_000_000
        #expect(took >= 400 && took < 3000, "\(took) ms")
        #expect(throws: ChannelError.self) { try channel.receive(exactly: 1) }
    }

    @Test("a handshake that waits ends when the channel is cancelled, and when who connects is")
    func cancel() throws {
        let (server, client) = try keyPair(Credentials())
        try expectQuickCancel {
            let listener = try Listener(on: .tcp(host: "127.0.0.1", port: "0"), tls: server)
            let socket = try Socket.connect(
                host: "127.0.0.1", port: port(of: listener), deadline: .after(seconds: 5))
            let channel = try listener.accept(deadline: .after(seconds: 5))
            let blocked = try Background {
                try channel.handshake()
                _ = socket.number
            }
            return (blocked, { channel.cancel() })
        }
        try expectQuickCancel {
            let listener = try Listener(on: .tcp(host: "127.0.0.1", port: "0"))
            let token = try CancelToken()
            let address = MigrationAddress.tcp(host: "127.0.0.1", port: try port(of: listener))
            let blocked = try Background {
                _ = try Connector(tls: client).connect(to: address, cancel: token)
                listener.close()
            }
            return (blocked, { token.cancel() })
        }
    }

    @Test("without a host name to check, and over what is no socket, TLS is refused before anything is sent")
    func addresses() throws {
        let credentials = try Credentials()
        let (server, client) = try keyPair(credentials)
        for address in [MigrationAddress.command("cat"), .file(path: credentials.folder("state"), offset: 0)] {
            #expect(throws: ChannelError.self) { try Connector(tls: client).connect(to: address) }
            #expect(throws: ChannelError.self) { try Listener(on: address, tls: server) }
        }
        let path = credentials.folder("socket")
        let wrongEnd = #expect(throws: ChannelError.self) { try Listener(on: .unix(path: path), tls: client) }
        #expect(wrongEnd?.description.contains("endpoint=server") == true)
    }
}

@Suite("TLS: lists of peers")
struct TLSPeerListTests {
    @Test("the first rule that matches decides, else the policy")
    func rules() {
        let list = TLSPeerList(
            rules: [
                .init("CN=bad,O=Example", policy: .deny), .init("CN=*,O=Example", policy: .allow, format: .glob),
                .init("qem?", policy: .allow, format: .glob),
            ])
        #expect(list.admits(["CN=good,O=Example"]) && list.admits(["O=Example,CN=good", "CN=good,O=Example"]))
        #expect(!list.admits(["CN=bad,O=Example"]) && !list.admits(["CN=good,O=Example "]) && !list.admits([]))
        #expect(list.admits(["qemu"]) && !list.admits(["qem"]) && !list.admits(["qemuu"]))
        #expect(TLSPeerList(rules: [], policy: .allow).admits(["anybody"]))
        let hard = TLSPeerList(rules: [.init("a*a*a*a*b", policy: .allow, format: .glob)])
        #expect(!hard.admits([String(repeating: "a", count: 2000)]))
    }
}
