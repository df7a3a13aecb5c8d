import Host
import QMP
import TestSupport
import Testing

@Suite(
    "A migration whose connection is cut again and again goes on where it was", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: Workbench.hasKVM, "needs /dev/kvm"))
struct ResumptionTests {
    /// How pages travel.
    enum Kind: String, CaseIterable, Sendable {
        case plain, channels, xbzrle, zstd, tls, verified
        case verifiedChannels = "verified channels"
        case everything = "channels with zstd, TLS and digests"

        var channels: Int { [.channels, .zstd, .verifiedChannels, .everything].contains(self) ? 2 : 0 }
        var isPacked: Bool { [.zstd, .everything].contains(self) }
        var isEncrypted: Bool { [.tls, .everything].contains(self) }
        var isVerified: Bool { [.verified, .verifiedChannels, .everything].contains(self) }
        /// Where pages shrink, the wire must be slow, or nothing is left to cut.
        var bytesPerSecond: Int { isPacked ? 8 << 20 : 150 << 20 }
    }

    /// Two processes, a network between them that can be cut, and random moments for it.
    private final class Scene {
        let bench: Workbench
        let source: VM
        let destination: VM
        let proxy: FaultyProxy
        let kind: Kind
        var random: SeededRandom
        private(set) var cuts: UInt64 = 0

        init(_ kind: Kind, _ guest: String, memory: String = "256M", seed: UInt64) throws {
            self.kind = kind
            random = SeededRandom(seed: seed)
            bench = try Workbench()
            let keys = "\(bench.folder)/keys"
            try CertificateAuthority.writeKeys(["qemu": "00112233445566778899"], to: keys)
            func object(_ endpoint: String) -> [String] {
                kind.isEncrypted ? ["--object", "tls-creds-psk,id=tls0,dir=\(keys),endpoint=\(endpoint)"] : []
            }
            source = try bench.startVM("here", ["--memory", memory, "--guest", guest] + object("client"))
            try source.waitForGuest()
            destination = try bench.startVM(
                "there",
                ["--memory", memory, "--incoming", "tcp:127.0.0.1:0"] + object("server")
                    + (kind.isEncrypted ? ["--tls-creds", "tls0"] : []))
            proxy = try FaultyProxy(to: destination.port())
            try prepare()
        }

        deinit { proxy.close() }

        private func prepare() throws {
            var capabilities = ["x-resumable"]
            var parameters: [String: JSON] = ["max-bandwidth": JSON(kind.bytesPerSecond)]
            if kind.channels > 0 {
                capabilities.append("multifd")
                parameters["multifd-channels"] = JSON(kind.channels)
            }
            if kind.isPacked { parameters["multifd-compression"] = "zstd" }
            if kind.isEncrypted { parameters["tls-creds"] = "tls0" }
            if kind.isVerified { capabilities.append("x-verify") }
            if kind == .xbzrle { capabilities.append("xbzrle") }
            try source.client.execute("migrate-set-parameters", .object(parameters))
            let states = capabilities.map { ["capability": .string($0), "state": true] as JSON }
            try source.client.execute("migrate-set-capabilities", ["capabilities": .array(states)])
        }

        var pages: UInt64 {
            let ram = (try? source.migration())?["ram"]
            return number(ram?["normal"]) + number(ram?["duplicate"])
        }

        /// Cuts at random moments, some of them while the migration is just being taken up again, up to so many times.
        func migrate(cuts most: UInt64) throws {
            try source.migrate(to: proxy.uri)
            while cuts < most {
                let next = pages + UInt64.random(in: (4 << 8)...(60 << 8), using: &random)
                let isDue = source.wait(seconds: 30) {
                    if pages >= next { return true }
                    return ["completed", "failed", "device"].contains(try? source.migrationStatus())
                }
                guard isDue, try source.migrationStatus() == "active", try cut() else { break }
                while cuts < most, Int.random(in: 0..<10, using: &random) < 4 {
                    try resume()
                    Clock.sleep(nanoseconds: UInt64.random(in: 0...8_000_000, using: &random))
                    guard try cut() else { return }
                }
                try resume()
            }
        }

        func resume() throws {
            try source.client.execute("migrate", ["uri": .string(proxy.uri), "resume": true])
        }

        /// - Returns: whether the migration is paused now; false where it was over.
        func cut() throws -> Bool {
            proxy.cut()
            let answer = try source.waitForMigration("x-paused", "completed", "x-unsettled")
            guard answer["status"] == "x-paused" else { return false }
            cuts += 1
            #expect(answer["error-desc"]?.stringValue?.isEmpty == false, "paused, and nobody says why")
            #expect(try source.status() == "running", "the guest stands still while the migration is paused")
            return true
        }

        func finish() throws {
            try source.client.execute("migrate-set-parameters", ["max-bandwidth": 0, "downtime-limit": 3000])
            try source.waitForMigration("completed", seconds: 90)
            let check = try destination.client.execute("x-check-guest", deadline: .after(seconds: 60))
            #expect(check["verified"] == true, "\(kind), after \(cuts) cuts: \(check["summary"] ?? .null)")
            #expect(try source.status() == "postmigrate")
        }
    }

    private static let memoryPages: UInt64 = 256 << 8
    /// What a cut may have sent twice, in pages.
    private static let repetitionLimit: UInt64 = 64 << 8

    @Test(
        "cut at random moments it completes and verifies; what was sent twice is at most 64 MiB for each cut",
        arguments: Kind.allCases)
    func repetition(kind: Kind) throws {
        // A guest that writes next to nothing: what goes out more than once was lost with a connection.
        let scene = try Scene(kind, "idle,fill=200M", seed: 20_261_121)
        try scene.migrate(cuts: 5)
        try scene.finish()
        let answer = try scene.source.migration()
        let ram = answer["ram"]
        let sent = number(ram?["normal"]) + number(ram?["duplicate"])
        let once = Self.memoryPages - number(ram?["x-hole"])
        // A few pages of the kernel's and the guest's own are written in each round.
        let dirtied: UInt64 = 64 * number(ram?["dirty-sync-count"])
        let repeated = sent - min(sent, once)
        print("resumption: \(kind.rawValue), \(scene.cuts) cuts: \(once) pages of the guest, \(repeated) sent again")
        #expect(scene.cuts >= 3, "only \(scene.cuts) cuts")
        #expect(
            repeated <= scene.cuts * Self.repetitionLimit + dirtied,
            "\(repeated) pages went twice after \(scene.cuts) cuts")
        let told = answer["x-resumed"]
        #expect((1...scene.cuts).contains(number(told?["count"])))
        #expect(number(told?["repeated-bytes"]) <= number(told?["count"]) * Self.repetitionLimit * 4096)
    }

    @Test("a guest that writes all the time arrives complete", arguments: Kind.allCases)
    func dirtying(kind: Kind) throws {
        let scene = try Scene(kind, "dirty,working-set=16M,fill=160M,random,rate=40M", seed: 5)
        try scene.migrate(cuts: 5)
        try scene.finish()
        #expect(scene.cuts >= 2, "only \(scene.cuts) cuts")
    }

    /// Paused after some MiB.
    private func paused(_ kind: Kind = .plain) throws -> Scene {
        let scene = try Scene(kind, "dirty,working-set=4M,fill=96M,rate=10M", memory: "128M", seed: 1)
        try scene.source.client.execute("migrate-set-parameters", ["max-bandwidth": JSON(40 << 20)])
        try scene.source.migrate(to: scene.proxy.uri)
        #expect(scene.source.wait(seconds: 20) { scene.proxy.passed.forward > 8 << 20 })
        #expect(try scene.cut())
        #expect(scene.destination.wait(seconds: 10) { (try? scene.destination.migrationStatus()) == "x-paused" })
        return scene
    }

    @Test("cancelled while it is paused, the guest runs here, and the destination gives up what it kept")
    func cancelled() throws {
        let scene = try paused()
        let source = scene.source
        #expect(throws: (any Error).self, "a second migration began") { try source.migrate(to: scene.proxy.uri) }
        try source.client.execute("migrate_cancel")
        try source.waitForMigration("cancelled")
        #expect(try source.client.execute("x-check-guest")["verified"] == true)
        #expect(scene.destination.process.wait(deadline: .after(seconds: 10)) != nil, "the destination waits on")
        #expect(throws: (any Error).self, "there is nothing to resume") { try scene.resume() }
    }

    @Test("a source whose process ends while it is paused tells the destination, which gives up")
    func quit() throws {
        let scene = try paused()
        try scene.source.client.execute("quit")
        #expect(scene.source.process.wait(deadline: .after(seconds: 10)) == .exited(0))
        #expect(scene.destination.process.wait(deadline: .after(seconds: 10)) == .exited(1), "the destination waits on")
    }

    @Test("a destination says how long it keeps what it has, and its operator can give it up")
    func discarded() throws {
        let scene = try paused()
        let kept = try scene.destination.migration()
        #expect((86_000...86_400).contains(number(kept["x-kept-seconds"])), "\(kept)")
        #expect(kept["error-desc"]?.stringValue?.contains("is kept") == true)
        #expect(try scene.destination.status() == "inmigrate")
        try scene.destination.client.execute("migrate_cancel")
        #expect(scene.destination.process.wait(deadline: .after(seconds: 10)) == .exited(1))
        #expect(scene.destination.log.contains("the operator gave up"), "\(scene.destination.log)")
        // Nobody is there any more: it stays paused, and the guest runs.
        try scene.resume()
        #expect(scene.source.wait(seconds: 10) { (try? scene.source.migrationStatus()) == "x-paused" })
        #expect(try scene.source.status() == "running")
        try scene.source.client.execute("migrate_cancel")
        try scene.source.waitForMigration("cancelled")
    }

    @Test("resumed to a wrong address it stays paused and says why; a stranger there is not disturbed; then it goes on")
    func wrongAddress() throws {
        let scene = try paused()
        let source = scene.source
        let stranger = try scene.bench.startVM("stranger", ["--memory", "128M", "--incoming", "tcp:127.0.0.1:0"])
        let closed = try Socket.localPort(of: Socket.listen(host: "127.0.0.1", port: "0")) ?? 1
        for (port, why) in [("\(try stranger.port())", "is not the process"), ("\(closed)", "refused")] {
            try source.client.execute("migrate", ["uri": .string("tcp:127.0.0.1:\(port)"), "resume": true])
            let answer = try source.waitForMigration("x-paused")
            #expect(answer["error-desc"]?.stringValue?.contains(why) == true, "\(answer)")
        }
        for uri in ["exec:cat", "nonsense"] {
            #expect(throws: (any Error).self, "\(uri)") {
                try source.client.execute("migrate", ["uri": .string(uri), "resume": true])
            }
        }
        #expect(try source.migrationStatus() == "x-paused")
        let itsStatus = try stranger.migrationStatus()
        #expect(stranger.process.poll() == nil && itsStatus == "none", "\(stranger.log)")
        try scene.resume()
        #expect(throws: (any Error).self, "it was resumed twice") { try scene.resume() }
        try scene.finish()
        #expect(try scene.destination.migration()["x-resumed"]?["count"] == 1)
    }

    @Test(
        "a process that took the destination's address is not mistaken for it; cancelled, the guest can go there anew")
    func restarted() throws {
        let bench = try Workbench()
        let path = "unix:\(bench.folder)/migration"
        let source = try bench.startVM(
            "here", ["--memory", "128M", "--guest", "dirty,working-set=4M,fill=96M,rate=10M"])
        try source.waitForGuest()
        let destination = try bench.startVM("there", ["--memory", "128M", "--incoming", path])
        try source.client.execute(
            "migrate-set-capabilities", ["capabilities": [["capability": "x-resumable", "state": true]]])
        try source.client.execute("migrate-set-parameters", ["max-bandwidth": JSON(20 << 20)])
        try source.migrate(to: path)
        #expect(source.wait(seconds: 20) { number((try? source.migration())?["ram"]?["normal"]) > 1000 })
        destination.process.signal(9)
        try source.waitForMigration("x-paused")
        _ = destination.process.wait(deadline: .after(seconds: 10))
        // A process that was killed leaves its socket.
        Descriptor.remove("\(bench.folder)/migration")
        let other = try bench.startVM("other", ["--memory", "128M", "--incoming", path])
        #expect(other.wait(seconds: 10) { (try? other.migration())?["socket-address"] != nil })
        try source.client.execute("migrate", ["uri": .string(path), "resume": true])
        let answer = try source.waitForMigration("x-paused")
        #expect(answer["error-desc"]?.stringValue?.contains("is not the process") == true, "\(answer)")
        try source.client.execute("migrate_cancel")
        try source.waitForMigration("cancelled")
        try source.client.execute("migrate-set-parameters", ["max-bandwidth": 0])
        try source.migrate(to: path)
        try source.waitForMigration("completed")
        #expect(try other.client.execute("x-check-guest")["verified"] == true)
    }
}

private func number(_ json: JSON?) -> UInt64 { json?.integerValue(as: UInt64.self) ?? 0 }
