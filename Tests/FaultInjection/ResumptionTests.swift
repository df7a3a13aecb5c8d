import Host
import QMP
import TestSupport
import Testing

@Suite(
    "A migration whose connection is cut again and again goes on where it was", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: Workbench.hasKVM, "needs /dev/kvm"))
struct ResumptionTests {
    private static let memoryPages: UInt64 = 256 << 8
    /// What a cut may have sent twice, in pages.
    private static let repetitionLimit: UInt64 = 64 << 8

    @Test(
        "cut at random places it completes and verifies; what was sent twice is at most 64 MiB for each cut",
        arguments: [0, 3], [20_261_121, 77] as [UInt64])
    func repetition(channels: Int, seed: UInt64) throws {
        // A guest that writes next to nothing: what goes out more than once was lost with a connection.
        let bench = try Workbench()
        let (source, cuts) = try migrate(on: bench, "idle,fill=200M", channels: channels, seed: seed)
        let ram = try source.migration()["ram"]
        let sent = Self.number(ram?["normal"]) + Self.number(ram?["duplicate"])
        let once = Self.memoryPages - Self.number(ram?["x-hole"])
        // A few pages of the kernel's and the guest's own are written in each round.
        let dirtied: UInt64 = 64 * Self.number(ram?["dirty-sync-count"])
        let repeated = sent - min(sent, once)
        print("resumption: \(channels) channels, \(cuts) cuts: \(once) pages of the guest, \(repeated) sent again")
        #expect(cuts >= 3, "only \(cuts) cuts")
        #expect(repeated <= cuts * Self.repetitionLimit + dirtied, "\(repeated) pages went twice after \(cuts) cuts")
        let told = try source.migration()["x-resumed"]
        #expect(told?["count"] == JSON(cuts))
        #expect(Self.number(told?["repeated-bytes"]) <= cuts * Self.repetitionLimit * 4096)
    }

    @Test("a guest that writes all the time arrives complete", arguments: [0, 3])
    func dirtying(channels: Int) throws {
        let bench = try Workbench()
        _ = try migrate(on: bench, "dirty,working-set=16M,fill=160M,random,rate=40M", channels: channels, seed: 5)
    }

    @Test("cancelled while it is paused, the guest runs here, and the destination gives up what it kept")
    func cancelled() throws {
        let bench = try Workbench()
        let source = try bench.startVM(
            "here", ["--memory", "128M", "--guest", "dirty,working-set=4M,fill=96M,rate=10M"])
        try source.waitForGuest()
        let destination = try bench.startVM("there", ["--memory", "128M", "--incoming", "tcp:127.0.0.1:0"])
        let proxy = try FaultyProxy(to: destination.port())
        defer { proxy.close() }
        try prepare(source, channels: 0)
        try source.migrate(to: proxy.uri)
        #expect(source.wait(seconds: 20) { proxy.passed.forward > 8 << 20 })
        proxy.cut()
        let paused = try source.waitForMigration("x-paused")
        #expect(paused["error-desc"]?.stringValue?.isEmpty == false)
        #expect(throws: (any Error).self, "a second migration began") { try source.migrate(to: proxy.uri) }
        #expect(try source.status() == "running")
        #expect(destination.wait(seconds: 10) { (try? destination.migrationStatus()) == "x-paused" })
        try source.client.execute("migrate_cancel")
        try source.waitForMigration("cancelled")
        #expect(try source.client.execute("x-check-guest")["verified"] == true)
        #expect(destination.process.wait(deadline: .after(seconds: 10)) != nil, "the destination waits on")
    }

    // MARK: -

    /// Migrates with cuts about every 40 MB, and checks what arrived.
    private func migrate(
        on bench: Workbench, _ guest: String, channels: Int, seed: UInt64
    ) throws -> (source: VM, cuts: UInt64) {
        let source = try bench.startVM("here", ["--memory", "256M", "--guest", guest])
        try source.waitForGuest()
        let destination = try bench.startVM("there", ["--memory", "256M", "--incoming", "tcp:127.0.0.1:0"])
        let proxy = try FaultyProxy(to: destination.port())
        defer { proxy.close() }
        try prepare(source, channels: channels)
        try source.migrate(to: proxy.uri)
        var random = SeededRandom(seed: seed)
        var cuts: UInt64 = 0
        while cuts < 5 {
            let next = proxy.passed.forward + Int.random(in: (10 << 20)...(70 << 20), using: &random)
            let isDue = source.wait(seconds: 30) {
                if proxy.passed.forward >= next { return true }
                return ["completed", "failed", "device"].contains(try? source.migrationStatus())
            }
            guard isDue, try source.migrationStatus() == "active" else { break }
            proxy.cut()
            try source.waitForMigration("x-paused")
            cuts += 1
            #expect(try source.status() == "running", "the guest stands still while the migration is paused")
            try source.client.execute("migrate", ["uri": .string(proxy.uri), "resume": true])
        }
        try source.client.execute("migrate-set-parameters", ["max-bandwidth": 0, "downtime-limit": 3000])
        try source.waitForMigration("completed", seconds: 60)
        let check = try destination.client.execute("x-check-guest", deadline: .after(seconds: 60))
        #expect(check["verified"] == true, "after \(cuts) cuts: \(check["summary"] ?? .null)")
        #expect(try source.status() == "postmigrate")
        return (source, cuts)
    }

    private func prepare(_ source: VM, channels: Int) throws {
        var capabilities: [JSON] = [["capability": "x-resumable", "state": true]]
        if channels > 0 {
            capabilities.append(["capability": "multifd", "state": true])
            try source.client.execute("migrate-set-parameters", ["multifd-channels": JSON(channels)])
        }
        try source.client.execute("migrate-set-capabilities", ["capabilities": .array(capabilities)])
        try source.client.execute("migrate-set-parameters", ["max-bandwidth": JSON(150 << 20)])
    }

    private static func number(_ json: JSON?) -> UInt64 { json?.integerValue(as: UInt64.self) ?? 0 }
}
