import Glibc
import Host
import TestSupport
import Testing

@testable import Transport

@Suite(
    "TLS: certificates", .timeLimit(.minutes(10)),
    .enabled(if: CertificateAuthority.isInstalled, "needs the program openssl"))
struct TLSCertificateTests {
    private let credentials: Credentials
    private let authority: CertificateAuthority

    init() throws {
        credentials = try Credentials()
        authority = try CertificateAuthority("Authority", in: credentials.folder("authority"))
        try authority.issue(.server, to: credentials.folder("server"), name: "destination")
        try authority.issue(.client, to: credentials.folder("client"), name: "source")
    }

    private func meet(
        server: String = "server", client: String = "client", host: String = "127.0.0.1", hostname: String? = nil,
        peers: TLSPeerList? = nil, verifiesPeer: Bool = true
    ) throws -> (server: String, client: String) {
        let meeting = try Meeting(
            server: TLSSettings(try credentials.x509(server, .server, verifiesPeer: verifiesPeer), peers: peers),
            client: TLSSettings(try credentials.x509(client, .client), hostname: hostname), host: host)
        return (Meeting.words(meeting.server), Meeting.words(meeting.client))
    }

    @Test("good certificates are enough, by address, by name, and by the name that was asked for")
    func good() throws {
        for (host, name) in [("127.0.0.1", nil), ("localhost", nil), ("127.0.0.1", "localhost")] as [(String, String?)]
        {
            let result = try meet(host: host, hostname: name)
            #expect(result.server == "it worked" && result.client == "it worked", "\(result)")
        }
        // What object-add makes sure of.
        _ = try credentials.x509("server", .server, checksSanity: true)
        _ = try credentials.x509("client", .client, checksSanity: true)
    }

    @Test("the subject on the list comes in, in either order of its parts; another does not")
    func list() throws {
        let names = ["CN=source,O=Godwit tests", "O=Godwit tests,CN=source"]
        for name in names {
            let result = try meet(peers: TLSPeerList(identity: name))
            #expect(result.server == "it worked" && result.client == "it worked", "\(result)")
        }
        let result = try meet(peers: TLSPeerList(identity: "CN=other,O=Godwit tests"))
        #expect(result.server.contains("'CN=source,O=Godwit tests' is not on the list"), "\(result)")
        #expect(result.client.contains("not on its list"), "\(result)")
    }

    @Test("a client without a certificate is refused, unless the server asks for none")
    func none() throws {
        try authority.trust(in: credentials.folder("nobody"))
        let refused = try meet(client: "nobody")
        #expect(refused.server.contains("it showed no certificate"), "\(refused)")
        #expect(refused.client.contains("it demands a certificate"), "\(refused)")
        let admitted = try meet(client: "nobody", verifiesPeer: false)
        #expect(admitted.server == "it worked" && admitted.client == "it worked", "\(admitted)")
        #expect(throws: ChannelError.self) {
            try meet(client: "nobody", peers: TLSPeerList(identity: "anybody"), verifiesPeer: false)
        }
    }

    /// A bad certificate: whose it is, how it is made, what we say of it and what its owner hears.
    struct Bad: Sendable, CustomTestStringConvertible {
        let testDescription: String
        let make: @Sendable (TLSCertificateTests, CertificateAuthority.Purpose) throws -> Void
        let words: String
        let heard: String
    }

    private static let bad = [
        Bad(
            testDescription: "expired",
            make: { try $0.authority.issue($1, to: $0.credentials.folder("bad"), name: "bad", validity: .expired) },
            words: "has expired", heard: "our certificate has expired"),
        Bad(
            testDescription: "not yet valid",
            make: { try $0.authority.issue($1, to: $0.credentials.folder("bad"), name: "bad", validity: .notYet) },
            words: "is not valid yet", heard: "refuses our certificate"),
        Bad(
            testDescription: "of an unknown authority",
            make: { tests, purpose in
                let other = try CertificateAuthority("Other", in: tests.credentials.folder("other"))
                try other.issue(purpose, to: tests.credentials.folder("bad"), name: "bad")
                try tests.authority.trust(in: tests.credentials.folder("bad"))
            }, words: "not signed by an authority in our ca-cert.pem", heard: "does not know the authority"),
        Bad(
            testDescription: "for the other end",
            make: { tests, purpose in
                try tests.authority.issue(
                    purpose == .server ? .client : .server, to: tests.credentials.folder("bad"), name: "bad",
                    as: purpose)
            }, words: "not made for this end", heard: "refuses our certificate"),
        Bad(
            testDescription: "revoked",
            make: { tests, purpose in
                let folder = tests.credentials.folder("bad")
                try tests.authority.issue(purpose, to: folder, name: "bad")
                let lister = tests.credentials.folder(purpose == .server ? "client" : "server")
                try tests.authority.revoke(purpose, of: folder, listIn: lister)
            }, words: "has been revoked", heard: "our certificate has been revoked"),
    ]

    @Test("a bad certificate is refused, and both ends say why", arguments: bad)
    func refused(bad: Bad) throws {
        try bad.make(self, .client)
        let client = try meet(client: "bad")
        #expect(client.server.contains(bad.words) && client.server.contains("CN=bad"), "\(client)")
        #expect(client.client.contains(bad.heard), "\(client)")
        // And the other way round.
        try bad.make(self, .server)
        let server = try meet(server: "bad")
        #expect(server.client.contains(bad.words) && server.client.contains("CN=bad"), "\(server)")
        #expect(server.server.contains(bad.heard), "\(server)")
        // object-add would have told the owner before, unless only the peer's files say so.
        guard !["revoked"].contains(bad.testDescription) else { return }
        #expect(throws: TLSError.self) { try credentials.x509("bad", .server, checksSanity: true) }
    }

    @Test("a certificate for another host is refused, by name and by address")
    func wrongHost() throws {
        try authority.issue(
            .server, to: credentials.folder("far"), name: "far", hosts: ["DNS:far.example", "IP:192.0.2.1"])
        for host in ["127.0.0.1", "localhost"] {
            let result = try meet(server: "far", host: host)
            #expect(result.client.contains("is not made for '\(host)'"), "\(result)")
        }
        let told = try meet(server: "far", hostname: "far.example")
        #expect(told.client == "it worked", "\(told)")
        let wrongName = try meet(hostname: "far.example")
        #expect(wrongName.client.contains("is not made for 'far.example'"), "\(wrongName)")
    }

    @Test("files that are missing, or are not what they should be, are named")
    func files() throws {
        func refusal(_ name: String, _ endpoint: TLSCredentials.Endpoint) -> String {
            do {
                _ = try credentials.x509(name, endpoint, checksSanity: true)
                return "it worked"
            } catch { return "\(error)" }
        }
        #expect(refusal("nowhere", .client).contains("ca-cert.pem: no such file"))
        #expect(refusal("client", .server).contains("server-cert.pem: no such file"))
        try authority.issue(.server, to: credentials.folder("mixed"), name: "a")
        try authority.issue(.server, to: credentials.folder("mixed2"), name: "b")
        let key = try Descriptor.contents(of: credentials.folder("mixed2") + "/server-key.pem")
        try Descriptor.create(credentials.folder("mixed") + "/server-key.pem").writeAll(key)
        #expect(refusal("mixed", .server).contains("server-key.pem is not"))
        try Descriptor.create(credentials.folder("mixed2") + "/server-cert.pem").writeAll(Array("no PEM".utf8))
        #expect(refusal("mixed2", .server).contains("server-cert.pem is not a certificate"))
        #expect(throws: TLSError.self) {
            try TLSCredentials("c", x509Folder: credentials.folder("client"), endpoint: .client, verifiesPeer: false)
        }
    }
}
