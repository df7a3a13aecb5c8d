import Glibc
import Host
import TestSupport
import Testing

@testable import Transport

/// Certificates and keys for handshakes, good and bad, in folders of one directory.
final class Credentials: Sendable {
    let directory: Directory

    init() throws { directory = try Directory() }

    func folder(_ name: String) -> String { directory.file(name) }

    func x509(
        _ name: String, _ endpoint: TLSCredentials.Endpoint, verifiesPeer: Bool = true, checksSanity: Bool = false
    ) throws -> TLSCredentials {
        try TLSCredentials(
            name, x509Folder: folder(name), endpoint: endpoint, verifiesPeer: verifiesPeer, checksSanity: checksSanity)
    }

    func psk(
        _ endpoint: TLSCredentials.Endpoint, keys: [String: String] = ["qemu": "00112233445566778899aabbccddeeff"],
        user: String = "qemu"
    ) throws -> TLSCredentials {
        let name = "psk-\(endpoint.rawValue)-\(keys.hashValue)"
        try CertificateAuthority.writeKeys(keys, to: folder(name))
        return try TLSCredentials("psk0", pskFolder: folder(name), endpoint: endpoint, user: user)
    }
}

/// A pair of pre-shared keys that fit.
func keyPair(_ credentials: Credentials) throws -> (server: TLSSettings, client: TLSSettings) {
    (TLSSettings(try credentials.psk(.server)), TLSSettings(try credentials.psk(.client)))
}

/// What became of one connection at both ends. Who serves says a byte once the handshake is done; who connects has to hear it.
struct Meeting {
    let server: Result<Channel, any Error>
    let client: Result<Channel, any Error>

    init(
        server: TLSSettings?, client: TLSSettings?, host: String = "127.0.0.1", deadline: Deadline = .after(seconds: 8)
    ) throws {
        let listener = try Listener(on: .tcp(host: "127.0.0.1", port: "0"), tls: server)
        let port = try port(of: listener)
        let serving = try Background {
            let channel = try listener.accept(deadline: deadline)
            do {
                try channel.handshake(deadline: deadline)
                // Plaintext is found out by what comes.
                if server == nil { try Self.receive(from: channel) }
                try channel.send([42])
            } catch {
                channel.cancel()
                throw error
            }
            return channel
        }
        self.client = Result {
            let channel = try Connector(tls: client).connect(
                to: .tcp(host: host, port: port), deadline: deadline)
            if client == nil { try channel.send(Array("QEVM plaintext".utf8)) }
            #expect(try Self.receive(from: channel) == [42])
            return channel
        }
        self.server = Result { try serving.value() }
    }

    @discardableResult
    private static func receive(from channel: Channel) throws -> [UInt8] {
        var bytes: [UInt8] = []
        guard try channel.receive(appendingTo: &bytes, upTo: 100) > 0 else {
            throw ChannelError.endOfStream(peer: channel.peer, received: 0, wanted: 1)
        }
        return bytes
    }

    /// The sentence of a failure.
    static func words(_ result: Result<Channel, any Error>) -> String {
        switch result {
        case .success: "it worked"
        case .failure(let error): "\(error)"
        }
    }
}

func port(of listener: Listener) throws -> String {
    guard case .inet(_, let port) = listener.addresses.first else { throw ChannelError.cancelled }
    return port
}

/// Two channels over TCP on this machine, with TLS, shaken hands.
func tlsPair(bufferBytes: CInt? = nil, limits: StallLimits = StallLimits()) throws -> (Channel, Channel) {
    let (server, client) = try keyPair(Credentials())
    let listener = try Listener(on: .tcp(host: "127.0.0.1", port: "0"), limits: limits, tls: server)
    let port = try port(of: listener)
    let accepting = try Background {
        let channel = try listener.accept(deadline: .after(seconds: 5))
        try channel.handshake(deadline: .after(seconds: 5))
        return channel
    }
    let a = try Connector(limits: limits, tls: client).connect(
        to: .tcp(host: "127.0.0.1", port: port), deadline: .after(seconds: 5))
    let b = try accepting.value()
    if let bufferBytes { setBuffers(of: [a.input, b.input].compactMap(\.self), max(bufferBytes, 1 << 16)) }
    return (a, b)
}
