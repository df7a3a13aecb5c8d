import Host
import QMP
import TestSupport
import Testing

@Suite("godwit migrate --resumable and --resume", .serialized, .timeLimit(.minutes(10)))
struct ResumeCommandTests {
    private let bench: Workbench

    init() throws { bench = try Workbench() }

    private static let needsKVM: Comment = "needs /dev/kvm"
    private let guest = ["--memory", "96M", "--guest", "dirty,working-set=4M,fill=72M,rate=8M"]

    @Test(
        "when the connection is lost it says so, with the command that goes on; that command completes it",
        .enabled(if: Workbench.hasKVM, needsKVM))
    func resumes() throws {
        let source = try bench.startVM("source", guest)
        try source.waitForGuest()
        let destination = try bench.startVM("destination", ["--memory", "96M", "--incoming", "tcp:127.0.0.1:0"])
        let proxy = try FaultyProxy(to: destination.port())
        defer { proxy.close() }
        let migration = try bench.start([
            "migrate", "source", proxy.uri, "--resumable", "--bandwidth", "20M", "--downtime", "2s",
        ])
        #expect(source.wait(seconds: 20) { proxy.passed.forward > 4 << 20 })
        proxy.cut()
        let outcome = bench.finish(migration)
        #expect(outcome.status == .exited(1), "\(outcome)")
        let command = "godwit migrate source --resume \(proxy.uri)"
        #expect(
            outcome.lastErrorLine.contains("is paused: ") && outcome.lastErrorLine.contains("the guest runs here")
                && outcome.lastErrorLine.contains("'\(command)'") && outcome.lastErrorLine.contains("--cancel"),
            "\(outcome)")
        #expect(try source.status() == "running")

        let wrong = try bench.run(["migrate", "source", "--resume", "tcp:127.0.0.1:1"])
        #expect(wrong.status == .exited(1) && wrong.lastErrorLine.contains("is paused: "), "\(wrong)")
        let again = try bench.run(["migrate", "source", proxy.uri])
        #expect(again.status == .exited(1) && again.lastErrorLine.contains("resume"), "\(again)")
        let words = command.split(separator: " ").dropFirst().map(String.init)
        let resumed = try bench.run(words + ["--bandwidth", "0"], seconds: 60)
        #expect(resumed.status == .exited(0), "\(resumed)")
        #expect(resumed.output.hasPrefix("Migration status: completed\n"))
        #expect(try destination.client.execute("x-check-guest")["verified"] == true)
        let late = try bench.run(words)
        #expect(late.status == .exited(1) && late.lastErrorLine.contains("no paused migration"), "\(late)")
    }

    @Test(
        "a hold is that migration's, over a lost connection too, and the VM's next one does not hold",
        .enabled(if: Workbench.hasKVM, needsKVM))
    func holds() throws {
        let source = try bench.startVM("source", guest)
        try source.waitForGuest()
        let destination = try bench.startVM("destination", ["--memory", "96M", "--incoming", "tcp:127.0.0.1:0"])
        let proxy = try FaultyProxy(to: destination.port())
        defer { proxy.close() }
        func isOn() throws -> JSON? {
            try source.client.execute("query-migrate-capabilities").arrayValue?
                .first { $0["capability"] == "pause-before-switchover" }?["state"]
        }
        let migration = try bench.start(["migrate", "source", proxy.uri, "--resumable", "--hold"])
        try source.waitForMigration("pre-switchover")
        proxy.cut()
        #expect(bench.finish(migration).status == .exited(1))
        #expect(try isOn() == false)
        let resumed = try bench.start(["migrate", "source", "--resume", proxy.uri])
        try source.waitForMigration("pre-switchover")
        #expect(try source.status() == "finish-migrate")
        #expect(try bench.run(["migrate", "source", "--cancel"]).status == .exited(0))
        #expect(bench.finish(resumed).status == .exited(1))
        #expect(try isOn() == false)
        let next = try bench.startVM("next", ["--memory", "96M", "--incoming", "tcp:127.0.0.1:0"])
        let outcome = try bench.run(["migrate", "source", "tcp:127.0.0.1:\(next.port())", "--downtime", "2s"])
        #expect(outcome.status == .exited(0), "\(outcome)")
    }

    @Test("what does not go together is refused before anything moves")
    func flags() throws {
        let source = try bench.startVM("source", ["--machine", "none", "--memory", "16M"])
        let none = try bench.run(["migrate", "source", "--resume", "tcp:127.0.0.1:1"])
        #expect(none.status == .exited(1) && none.lastErrorLine.contains("no paused migration"), "\(none)")
        for others in [
            [], ["tcp:127.0.0.1:1", "--resumable"], ["tcp:127.0.0.1:1", "--channels", "2"],
            ["tcp:127.0.0.1:1", "--tls", "x"],
            ["tcp:127.0.0.1:1", "--hold"], ["tcp:127.0.0.1:1", "--compress", "xbzrle"],
            ["tcp:127.0.0.1:1", "--dry-run"],
            ["tcp:127.0.0.1:1", "--auto-converge"], ["--cancel"],
        ] {
            let outcome = try bench.run(["migrate", "source", "--resume"] + others)
            #expect(outcome.status == .exited(64), "\(others): \(outcome)")
        }
        for uri in ["exec:cat >\(bench.folder)/out", "file:\(bench.folder)/file"] {
            let outcome = try bench.run(["migrate", "source", uri, "--resumable"])
            #expect(outcome.status == .exited(1) && outcome.lastErrorLine.contains("x-resumable"), "\(outcome)")
            #expect(outcome.lastErrorLine.contains("turn the capability off"), "\(outcome)")
        }
        #expect(try source.client.execute("query-migrate") == [:])
        // A saved file is written in one go, whatever is set.
        let path = "\(bench.folder)/saved"
        let saved = try bench.run(["save", "source", path, "--channels", "0"])
        #expect(saved.status == .exited(0), "\(saved)")
    }
}
