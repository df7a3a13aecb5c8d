import Host
import QMP
import TestSupport
import Testing

@Suite(
    "A network that stalls while the guest stands still does not keep it waiting", .serialized,
    .timeLimit(.minutes(10)),
    .enabled(if: Workbench.hasKVM, "needs /dev/kvm"))
struct StallTests {
    /// With a small rest the stall keeps READY away; with a large one the thread that sends hangs in the middle of a page.
    @Test(
        "stalled in the final round, the guest runs on within the limit; later the migration completes and verifies",
        arguments: [("rate=50M,working-set=8M", 60), ("working-set=96M", 250)])
    func stalledFinalRound(guest: String, limit: UInt64) throws {
        let bench = try Workbench()
        let source = try bench.startVM("stalled", ["--memory", "160M", "--guest", "dirty,random,\(guest)"])
        try source.waitForGuest()
        let destination = try bench.startVM("there", ["--memory", "160M", "--incoming", "tcp:127.0.0.1:0"])
        let proxy = try FaultyProxy(to: destination.port())
        defer { proxy.close() }
        try source.client.execute("migrate-set-parameters", ["downtime-limit": JSON(limit)])
        try hold(source, true)
        try source.migrate(to: proxy.uri)
        try source.waitForMigration("pre-switchover")
        proxy.hold()
        _ = source.client.takeEvents()
        let proceeded = Clock.realtimeNanoseconds
        try source.client.execute("migrate-continue", ["state": "pre-switchover"])
        let resumed = try source.client.waitForEvent("RESUME", deadline: .after(seconds: 20))
        let standstill = Double(resumed.microseconds) / 1e3 - Double(proceeded) / 1e6
        // The machine may be busy: the figure for a quiet one is in `godwit bench downtime`.
        #expect(standstill < Double(limit) + 50, "the guest stood still for \(standstill) ms of \(limit) ms")
        let touches = try source.client.execute("x-query-guest")["touches"]?.integerValue() ?? 0
        #expect(
            source.wait(seconds: 10) {
                ((try? source.client.execute("x-query-guest"))?["touches"]?.integerValue() ?? 0) > touches
            }, "the guest does not run on")
        let broken = try source.migration()["x-broken-switchovers"]
        #expect(broken?["count"] == 1)
        let attempt = broken?["attempts"]?[0]
        #expect(attempt?["limit-ns"] == JSON(limit * 1_000_000))
        let parts = attempt?["parts"]?.arrayValue ?? []
        let sum = parts.reduce(UInt64(0)) { $0 + ($1["nanoseconds"]?.integerValue(as: UInt64.self) ?? 0) }
        #expect(attempt?["nanoseconds"] == JSON(sum) && sum > 0, "the parts do not add up: \(broken ?? .null)")
        #expect(source.waitForLog("was broken off after", seconds: 5))

        // From here on nobody is asked, and the limit can be kept even on a busy machine.
        try source.client.execute("migrate-set-parameters", ["downtime-limit": 3000])
        proxy.release()
        let done = source.wait(seconds: 60) {
            guard let status = try? source.migrationStatus() else { return false }
            if status == "pre-switchover" {
                _ = try? source.client.execute("migrate-continue", ["state": "pre-switchover"])
            }
            return status == "completed" || status == "failed"
        }
        let ending = try source.migration()
        #expect(done && ending["status"] == "completed", "\(ending)")
        #expect((ending["x-broken-switchovers"]?["count"]?.integerValue() ?? 0) >= 1)
        let check = try destination.client.execute("x-check-guest", deadline: .after(seconds: 60))
        #expect(check["verified"] == true, "\(check["summary"] ?? .null)")
    }

    private func hold(_ vm: VM, _ on: Bool) throws {
        try vm.client.execute(
            "migrate-set-capabilities",
            ["capabilities": [["capability": "pause-before-switchover", "state": .bool(on)]]])
    }
}
