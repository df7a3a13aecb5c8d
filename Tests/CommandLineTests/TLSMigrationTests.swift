import Glibc
import Host
import QMP
import TestSupport
import Testing

@Suite("Migrations through TLS, and none without where others listen", .serialized, .timeLimit(.minutes(10)))
struct TLSMigrationTests {
    private let bench: Workbench

    init() throws { bench = try Workbench() }

    private func object(_ type: String, _ folder: String, _ endpoint: String) -> [String] {
        ["--object", "\(type),id=tls0,dir=\(folder),endpoint=\(endpoint)"]
    }

    private func keys(
        _ name: String = "keys", _ keys: [String: String] = ["qemu": "00112233445566778899"]
    ) throws -> String {
        let folder = "\(bench.folder)/\(name)"
        try CertificateAuthority.writeKeys(keys, to: folder)
        return folder
    }

    private func migrate(_ source: String, to port: String, _ options: String...) throws -> Workbench.Outcome {
        try bench.run(["migrate", source, "tcp:127.0.0.1:\(port)"] + options)
    }

    // MARK: With a guest

    private let guest = ["--memory", "48M", "--guest", "dirty,working-set=8M,rate=8M"]

    @Test(
        "a running guest arrives whole through TLS with certificates, past strangers with bad ones",
        .enabled(if: Workbench.hasKVM && CertificateAuthority.isInstalled, "needs /dev/kvm and the program openssl"))
    func certificates() throws {
        let authority = try CertificateAuthority("Authority", in: "\(bench.folder)/authority")
        let folder = "\(bench.folder)/pki"
        try authority.issue(.server, to: folder, name: "destination", hosts: ["IP:127.0.0.1"])
        try authority.issue(.client, to: folder, name: "source")
        try authority.issue(.client, to: "\(bench.folder)/expired", name: "late", validity: .expired)
        let destination = try bench.startVM(
            "destination",
            ["--memory", "48M", "--incoming", "tcp:127.0.0.1:0", "--tls-creds", "tls0", "--tls-authz", "list"]
                + object("tls-creds-x509", folder, "server")
                + ["--object", "authz-list,id=list,rules.0.match=CN=s*,rules.0.policy=allow,rules.0.format=glob"])
        let port = try destination.port()
        let source = try bench.startVM(
            "source",
            guest + object("tls-creds-x509", folder, "client")
                + ["--object", "tls-creds-x509,id=late,dir=\(bench.folder)/expired,endpoint=client,sanity-check=no"])
        try source.waitForGuest()

        let expired = try migrate("source", to: port, "--tls", "late")
        #expect(
            expired.status == .exited(1) && expired.lastErrorLine.contains("our certificate has expired"), "\(expired)")
        #expect(destination.waitForLog("its certificate (CN=late,O=Godwit tests) has expired"), "\(destination.log)")
        let wrongHost = try bench.run(["migrate", "source", "tcp:localhost:\(port)", "--tls", "tls0"])
        #expect(wrongHost.lastErrorLine.contains("is not made for 'localhost'"), "\(wrongHost)")
        let plain = try migrate("source", to: port, "--tls", "")
        #expect(plain.status == .exited(1) && plain.lastErrorLine.contains("it speaks TLS"), "\(plain)")
        #expect(destination.waitForLog("what it sent is not TLS"), "\(destination.log)")
        #expect(try source.status() == "running" && destination.status() == "inmigrate")

        let outcome = try bench.run([
            "migrate", "source", "tcp:localhost:\(port)", "--tls", "tls0", "--tls-hostname", "127.0.0.1",
        ])
        #expect(outcome.status == .exited(0), "\(outcome) \(destination.log)")
        #expect(try destination.client.execute("x-check-guest")["verified"] == true)
        #expect(
            destination.log.contains("TLS 1.3, TLS_") && destination.log.contains("CN=source"), "\(destination.log)")
        #expect(source.log.contains("CN=destination"), "\(source.log)")
    }

    @Test(
        "a running guest arrives whole through TLS with a pre-shared key",
        .enabled(if: Workbench.hasKVM, "needs /dev/kvm"))
    func preSharedKey() throws {
        let folder = try keys()
        let destination = try bench.startVM(
            "destination",
            ["--memory", "48M", "--incoming", "tcp:127.0.0.1:0", "--tls-creds", "tls0"]
                + object("tls-creds-psk", folder, "server"))
        let source = try bench.startVM("source", guest + object("tls-creds-psk", folder, "client"))
        try source.waitForGuest()
        let outcome = try migrate("source", to: destination.port(), "--tls", "tls0")
        #expect(outcome.status == .exited(0), "\(outcome) \(destination.log)")
        #expect(try destination.client.execute("x-check-guest")["verified"] == true)
    }

    // MARK: Without

    private let machine = ["--machine", "none", "--memory", "16M"]

    @Test("peers that hang and a thousand that talk nonsense do not keep the real source out")
    func strangers() throws {
        let folder = try keys()
        let destination = try bench.startVM(
            "destination",
            machine + ["--incoming", "tcp:127.0.0.1:0", "--tls-creds", "tls0"]
                + object("tls-creds-psk", folder, "server"))
        let port = try destination.port()
        func connect() throws -> Descriptor {
            try Socket.connect(host: "127.0.0.1", port: port, deadline: .after(seconds: 5))
        }
        // More than there are places.
        var hanging: [Descriptor] = []
        for number in 0..<200 {
            let socket = try connect()
            if number % 2 == 0 { try socket.writeAll([0x16, 0x03, 0x01]) }
            hanging.append(socket)
        }
        var random = SeededRandom(seed: 11)
        for _ in 0..<1000 {
            let bytes = (0..<Int(random.next() % 300)).map { _ in UInt8(truncatingIfNeeded: random.next() >> 8) }
            try? connect().writeAll(bytes, deadline: .after(seconds: 5))
        }
        let source = try bench.startVM("source", machine + object("tls-creds-psk", folder, "client"))
        try source.client.execute("migrate-set-parameters", ["tls-creds": "tls0"])
        try source.migrate(to: "tcp:127.0.0.1:\(port)")
        try source.waitForMigration("completed")
        #expect(destination.wait(seconds: 5) { (try? destination.status()) == "running" }, "\(destination.log)")
        #expect(destination.log.contains("what it sent is not TLS"))
        // Those that hang are sent away after their time.
        let oldest = try #require(hanging.last)
        try oldest.wait(for: .readable, deadline: .after(seconds: 15), operation: "wait for the end")
        #expect(destination.waitForLog("was not complete in time", seconds: 15), "\(destination.log)")
    }

    @Test("on loopback, without TLS, silent peers and a thousand with nonsense do not keep the real source out either")
    func strangersInPlaintext() throws {
        let destination = try bench.startVM("destination", machine + ["--incoming", "tcp:127.0.0.1:0"])
        let port = try destination.port()
        func connect() throws -> Descriptor {
            try Socket.connect(host: "127.0.0.1", port: port, deadline: .after(seconds: 5))
        }
        var random = SeededRandom(seed: 12)
        for _ in 0..<1000 {
            let bytes = (0..<Int(random.next() % 300)).map { _ in UInt8(truncatingIfNeeded: random.next() >> 8) }
            try? connect().writeAll(bytes, deadline: .after(seconds: 5))
        }
        let hanging = try (0..<200).map { _ in try connect() }
        let source = try bench.startVM("source", machine)
        try source.migrate(to: "tcp:127.0.0.1:\(port)")
        try source.waitForMigration("completed")
        #expect(destination.wait(seconds: 5) { (try? destination.status()) == "running" }, "\(destination.log)")
        #expect(hanging.count == 200 && destination.log.contains("said nothing for the longest time"))
    }

    @Test("waiting for a migration in plaintext where others reach it is refused, by command line and by QMP")
    func closedByDefault() throws {
        for address in ["tcp::0", "tcp:0.0.0.0:0", "tcp:[::]:0"] {
            let outcome = try bench.run(["run", "--name", "open", "--incoming", address] + machine)
            #expect(outcome.status == .exited(1), "\(outcome)")
            #expect(outcome.lastErrorLine.contains("--insecure-plaintext"), "\(outcome)")
        }
        #expect(try FileSystem.names(inFolder: bench.runtime) == [])
        let closed = try bench.startVM("closed", machine + ["--incoming", "defer"])
        let error = #expect(throws: QMPClientError.self) {
            try closed.client.execute("migrate-incoming", ["uri": "tcp:0.0.0.0:0"])
        }
        #expect("\(String(describing: error))".contains("--insecure-plaintext"))
        // And it can still be told a better place.
        try closed.client.execute("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
        let open = try bench.startVM("open", machine + ["--incoming", "tcp:0.0.0.0:0", "--insecure-plaintext"])
        #expect(!(try open.port()).isEmpty)
        let folder = try keys()
        let secure = try bench.startVM(
            "secure",
            machine + ["--incoming", "tcp:0.0.0.0:0", "--tls-creds", "tls0"] + object("tls-creds-psk", folder, "server")
        )
        #expect(!(try secure.port()).isEmpty)
    }

    @Test("objects that cannot be used are refused with a sentence, and the VM stays")
    func objects() throws {
        let folder = try keys()
        let vm = try bench.startVM("vm", machine + ["--incoming", "defer"])
        func refusal(_ command: String, _ arguments: JSON) -> String {
            do {
                try vm.client.execute(command, arguments)
                return "it worked"
            } catch { return "\(error)" }
        }
        let keys: JSON = ["qom-type": "tls-creds-psk", "id": "k", "dir": .string(folder), "endpoint": "server"]
        #expect(refusal("object-add", keys) == "it worked")
        #expect(refusal("object-add", keys).contains("there is an object 'k' already"))
        let cases: [(JSON, String)] = [
            (["qom-type": "rng-random", "id": "r"], "objects of type 'rng-random' do not exist here"),
            (["qom-type": "tls-creds-x509", "id": "x", "dir": "/nonexistent", "endpoint": "server"], "ca-cert.pem"),
            (["qom-type": "tls-creds-x509", "id": "x"], "dir is missing"),
            (
                ["qom-type": "tls-creds-psk", "id": "x", "dir": .string(folder), "username": "eve"],
                "no key of user 'eve'"
            ),
            (
                ["qom-type": "tls-creds-psk", "id": "x", "dir": .string(folder), "priority": "NORMAL:-VERS-ALL"],
                "leave it out"
            ),
            (["qom-type": "authz-simple", "id": "x"], "identity"),
            (["qom-type": "authz-simple", "id": "x", "identity": "a", "dir": "/"], "dir"),
        ]
        for (arguments, words) in cases { #expect(refusal("object-add", arguments).contains(words), "\(arguments)") }
        #expect(refusal("object-del", ["id": "nothing"]).contains("there is no object 'nothing'"))
        #expect(refusal("migrate-set-parameters", ["tls-creds": "nothing"]) == "it worked")
        #expect(refusal("migrate-incoming", ["uri": "tcp:127.0.0.1:0"]).contains("no credentials of that id"))
        #expect(refusal("migrate-set-parameters", ["tls-creds": "k", "tls-authz": "nobody"]) == "it worked")
        #expect(refusal("migrate-incoming", ["uri": "tcp:127.0.0.1:0"]).contains("no list of peers of that id"))
        let line = "object_add authz-simple,id=nobody,identity=CN=a,,O=b"
        #expect(try vm.client.execute("human-monitor-command", ["command-line": .string(line)]) == "")
        #expect(refusal("migrate-incoming", ["uri": "exec:cat"]).contains("TLS needs a socket"))
        #expect(refusal("migrate-incoming", ["uri": "tcp:127.0.0.1:0"]) == "it worked")
    }
}
