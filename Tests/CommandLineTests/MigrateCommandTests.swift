import Glibc
import Host
import QMP
import TestSupport
import Testing

@Suite(
    "godwit migrate moves a VM, and says what happened", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: Workbench.hasKVM, "needs /dev/kvm"))
struct MigrateCommandTests {
    private let bench: Workbench

    init() throws { bench = try Workbench() }

    private let guest = ["--memory", "32M", "--guest", "dirty,working-set=4M,rate=4M"]

    @Test("a completed migration is reported, the guest runs there and no longer here")
    func completes() throws {
        let source = try bench.startVM("source", guest)
        let destination = try bench.startVM("destination", ["--memory", "32M", "--incoming", "tcp:127.0.0.1:0"])
        try source.waitForGuest()
        let outcome = try bench.run([
            "migrate", "source", "tcp:127.0.0.1:\(destination.port())", "--downtime", "100ms", "--bandwidth", "1G",
        ])
        #expect(outcome.status == .exited(0), "\(outcome)")
        #expect(outcome.output.hasPrefix("Migration status: completed\n"))
        #expect(outcome.output.contains("\ndowntime ") && outcome.output.contains("  stop "))
        #expect(!outcome.output.contains("\u{1B}") && !outcome.errors.contains("\u{1B}"))
        #expect(try source.status() == "postmigrate")
        #expect(try destination.status() == "running")
        #expect(try destination.client.execute("x-check-guest")["verified"] == true)
        let parameters = try source.client.execute("query-migrate-parameters")
        #expect(parameters["downtime-limit"] == 100 && parameters["max-bandwidth"] == JSON(1 << 30))

        let again = try bench.run(["migrate", "source", "tcp:127.0.0.1:1"])
        #expect(again.status == .exited(1) && again.lastErrorLine.contains("already handed over"), "\(again)")
        #expect(try bench.run(["cont", "source"]).lastErrorLine.contains("must not run twice"))
    }

    @Test("--json prints the last answer, and --quit-source ends the source")
    func jsonAndQuit() throws {
        let source = try bench.startVM("source", guest)
        let path = "\(bench.folder)/migration"
        _ = try bench.startVM("destination", ["--memory", "32M", "--incoming", "unix:\(path)"])
        let outcome = try bench.run(["migrate", "source", "unix:\(path)", "--json", "--quit-source"])
        #expect(outcome.status == .exited(0), "\(outcome)")
        let answer = try JSON(parsing: outcome.output.utf8)
        #expect(answer["status"] == "completed")
        let parts = answer["x-downtime-parts"]?.arrayValue ?? []
        let sum = parts.reduce(0) { $0 + ($1["nanoseconds"]?.integerValue(as: UInt64.self) ?? 0) }
        #expect(sum > 0 && answer["x-downtime-ns"] == JSON(sum))
        #expect(source.process.wait(deadline: .after(seconds: 5)) == .exited(0))
    }

    @Test("a dry run predicts, moves nothing, and its status says whether the guest would converge")
    func dryRun() throws {
        let source = try bench.startVM("source", guest)
        try source.waitForGuest()
        let unknown = try bench.run(["migrate", "source", "--dry-run"])
        #expect(unknown.status == .exited(1) && unknown.lastErrorLine.contains("--bandwidth"), "\(unknown)")
        let good = try bench.run(["migrate", "source", "tcp:127.0.0.1:1", "--dry-run", "--bandwidth", "100M"])
        #expect(good.status == .exited(0), "\(good)")
        #expect(good.output.contains("nothing was moved\n") && good.output.contains("verdict: converging: "), "\(good)")
        let bad = try bench.run([
            "migrate", "source", "--dry-run", "--bandwidth", "1M", "--downtime", "20ms", "--json",
        ])
        #expect(bad.status == .exited(3), "\(bad)")
        let answer = try JSON(parsing: bad.output.utf8)
        #expect(answer["state"] == "not-converging" && answer["remedies"]?[0]?["name"] != nil, "\(answer)")
        #expect(try source.status() == "running")
        #expect(try source.client.execute("query-migrate") == [:])
        #expect(try source.client.execute("query-migrate-parameters")["downtime-limit"] == 300)
        let mixed = try bench.run(["migrate", "source", "--dry-run", "--cancel"])
        #expect(mixed.status == .exited(64), "\(mixed)")
    }

    @Test("--channels sends pages over so many channels, to a destination that was told nothing, and 0 turns that off")
    func channels() throws {
        let source = try bench.startVM("source", guest)
        let destination = try bench.startVM("destination", ["--memory", "32M", "--incoming", "tcp:127.0.0.1:0"])
        try source.waitForGuest()
        let there = "tcp:127.0.0.1:\(try destination.port())"
        let tooMany = try bench.run(["migrate", "source", there, "--channels", "65"])
        #expect(tooMany.status == .exited(64) && tooMany.errors.contains("from 0 to 64"), "\(tooMany)")
        let outcome = try bench.run(["migrate", "source", there, "--channels", "3", "--json"])
        #expect(outcome.status == .exited(0), "\(outcome)")
        let ram = try JSON(parsing: outcome.output.utf8)["ram"]
        let normal = try #require(ram?["normal"]?.integerValue(as: UInt64.self))
        #expect((ram?["multifd-bytes"]?.integerValue(as: UInt64.self) ?? 0) > normal * 4096)
        #expect(try destination.client.execute("x-check-guest")["verified"] == true)

        let last = try bench.startVM("last", ["--memory", "32M", "--incoming", "tcp:127.0.0.1:0"])
        try destination.client.execute(
            "migrate-set-capabilities", ["capabilities": [["capability": "multifd", "state": true]]])
        let plain = try bench.run(
            ["migrate", "destination", "tcp:127.0.0.1:\(last.port())", "--channels", "0", "--json"])
        #expect(plain.status == .exited(0), "\(plain)")
        #expect(try JSON(parsing: plain.output.utf8)["ram"]?["multifd-bytes"] == 0)
    }

    @Test("a refused connection fails the migration, and the guest runs on")
    func connectionRefused() throws {
        let source = try bench.startVM("source", guest)
        // Taken and given back: nobody listens there.
        let port = try #require(Socket.localPort(of: try Socket.listen(host: "127.0.0.1", port: "0")))
        let outcome = try bench.run(["migrate", "source", "tcp:127.0.0.1:\(port)"])
        #expect(outcome.status == .exited(1))
        #expect(
            outcome.lastErrorLine.contains("127.0.0.1:\(port)") && outcome.lastErrorLine.contains("connection refused"),
            "\(outcome)")
        #expect(try source.status() == "running")
    }

    @Test("a destination with another memory size refuses, and both say so")
    func otherMemorySize() throws {
        let source = try bench.startVM("source", guest)
        let destination = try bench.startVM("destination", ["--memory", "64M", "--incoming", "tcp:127.0.0.1:0"])
        let outcome = try bench.run(["migrate", "source", "tcp:127.0.0.1:\(destination.port())"])
        #expect(outcome.status == .exited(1))
        #expect(outcome.lastErrorLine.contains("same memory size"), "\(outcome)")
        #expect(destination.waitForLog("same memory size"))
        #expect(try source.status() == "running")
    }

    @Test("Ctrl-C cancels the migration, says so, and the guest runs on", arguments: [SIGINT, SIGTERM])
    func interrupt(signal: CInt) throws {
        let source = try bench.startVM("source", ["--memory", "128M", "--guest", "idle"])
        let destination = try bench.startVM("destination", ["--memory", "128M", "--incoming", "tcp:127.0.0.1:0"])
        try source.waitForGuest()
        let migration = try bench.start([
            "migrate", "source", "tcp:127.0.0.1:\(destination.port())", "--bandwidth", "4M",
        ])
        let deadline = Deadline.after(seconds: 10)
        while try source.client.execute("query-migrate")["status"] != "active" {
            try #require(!deadline.hasPassed)
            Clock.sleep(nanoseconds: 5_000_000)
        }
        migration.process.signal(signal)
        let outcome = bench.finish(migration)
        #expect(outcome.status == .exited(1))
        #expect(outcome.errors.contains("cancelling the migration\n"))
        #expect(outcome.lastErrorLine.hasSuffix("was cancelled; the guest is here as before"), "\(outcome)")
        #expect(try source.status() == "running")
    }

    /// Runs the rest of the command line on a terminal.
    private static let onTerminal = ["sh", "-c", "exec script -qec \"$*\" /dev/null", "-"]
    private static let hasScript = unsafe access("/usr/bin/script", X_OK) == 0

    @Test(
        "on a terminal one line moves, in colours unless NO_COLOR is set",
        .enabled(if: hasScript, "needs script(1) for a terminal"), arguments: [false, true])
    func terminal(noColor: Bool) throws {
        _ = try bench.startVM("source", guest)
        let destination = try bench.startVM("destination", ["--memory", "32M", "--incoming", "tcp:127.0.0.1:0"])
        let environment = ["env", "TERM=xterm", "NO_COLOR=\(noColor ? "1" : "")"]
        let outcome = try bench.run(
            ["migrate", "source", "tcp:127.0.0.1:\(destination.port())"], through: environment + Self.onTerminal)
        #expect(outcome.status == .exited(0), "\(outcome)")
        #expect(outcome.output.contains("\r\u{1B}[2K"))
        #expect(outcome.output.contains("\u{1B}[32mcompleted\u{1B}[0m") == !noColor)
        // The line is taken away before the report.
        #expect(outcome.output.contains("\r\u{1B}[2KMigration status: "))
    }

    @Test("--hold waits before the switchover until --proceed")
    func hold() throws {
        let source = try bench.startVM("source", guest)
        let destination = try bench.startVM("destination", ["--memory", "32M", "--incoming", "tcp:127.0.0.1:0"])
        let migration = try bench.start(["migrate", "source", "tcp:127.0.0.1:\(destination.port())", "--hold"])
        let deadline = Deadline.after(seconds: 10)
        while try source.client.execute("query-migrate")["status"] != "pre-switchover" {
            try #require(!deadline.hasPassed)
            Clock.sleep(nanoseconds: 5_000_000)
        }
        #expect(migration.process.poll() == nil)
        #expect(try bench.run(["migrate", "source", "--proceed"]).status == .exited(0))
        let outcome = bench.finish(migration)
        #expect(outcome.status == .exited(0) && outcome.errors.contains("--proceed"), "\(outcome)")
        #expect(try destination.status() == "running")
    }

    @Test("a migration into a file is a stream that godwit stream reads, whole or cut off")
    func stream() throws {
        let source = try bench.startVM("source", guest)
        try source.waitForGuest()
        let path = "\(bench.folder)/vm.stream"
        #expect(try bench.run(["migrate", "source", "file:\(path)"]).status == .exited(0))
        let text = try bench.run(["stream", path])
        #expect(text.status == .exited(0))
        #expect(text.output.contains(", complete\n") && text.output.contains("godwit/vcpu"), "\(text)")
        let json = try JSON(parsing: bench.run(["stream", path, "--json"]).output.utf8)
        #expect(json["blocks"]?[0]?["length"] == 33_554_432 && json["complete"] == true)
        #expect((json["blocks"]?[0]?["data-pages"]?.integerValue() ?? 0) > 7000)

        let file = try Descriptor.open(path, O_RDWR)
        try file.truncate(to: 1_000_000)
        let cut = try bench.run(["stream", path])
        #expect(cut.status == .exited(1))
        #expect(cut.output.contains("cut off") && cut.lastErrorLine.contains("byte 1000000"), "\(cut)")
    }
}
