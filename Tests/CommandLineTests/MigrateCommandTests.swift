import Glibc
import Host
import MigrationStream
import QMP
import Testing

@Suite(
    "godwit migrate moves a VM, and says what happened", .serialized, .timeLimit(.minutes(2)),
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

@Suite("A waiting destination stands what strangers send", .serialized, .timeLimit(.minutes(2)))
struct HostileStreamTests {
    private let bench: Workbench

    init() throws { bench = try Workbench() }

    /// What is sent, and what the destination says. `isFatal`: memory was touched, so nothing can come any more.
    struct Case: Sendable, CustomTestStringConvertible {
        let testDescription: String
        let bytes: [UInt8]
        let words: String
        let isFatal: Bool
    }

    private static let memoryBytes: UInt64 = 16 << 20

    private static func stream(
        machine: String = "none", block: String = "ram", byteCount: UInt64 = memoryBytes, page: UInt64? = nil,
        pageBytes: Int = 4096
    ) -> [UInt8] {
        var writer = StreamWriter()
        writer.header()
        writer.configuration(machine: machine)
        let blocks = [RAMBlockDescription(name: block, length: byteCount)]
        writer.ramSetup(id: 2, blocks: blocks)
        guard let page else { return writer.bytes }
        writer.ramRound(final: false, id: 2)
        var records = RAMRecordEncoder(blocks: blocks)
        var bytes = writer.bytes
        records.page(block: 0, offset: page, into: &bytes)
        return bytes + [UInt8](repeating: 0x5a, count: pageBytes)
    }

    private static let cases = [
        Case(
            testDescription: "random bytes", bytes: (0..<5000).map { UInt8(truncatingIfNeeded: $0 &* 73 &+ 5) },
            words: "no migration stream", isFatal: false),
        Case(testDescription: "half a header", bytes: Array("QEVM".utf8), words: "inside its header", isFatal: false),
        Case(
            testDescription: "another machine", bytes: stream(machine: "pc-i440fx-7.2"),
            words: "the source is a 'pc-i440fx-7.2' machine", isFatal: false),
        Case(
            testDescription: "an unknown RAM block", bytes: stream(block: "pc.ram"),
            words: "RAM block 'pc.ram' does not exist", isFatal: false),
        Case(
            testDescription: "another memory size", bytes: stream(byteCount: memoryBytes * 2),
            words: "start both with the same memory size", isFatal: false),
        Case(
            testDescription: "a page cut off", bytes: stream(page: 8192, pageBytes: 1000),
            words: "the stream ended after",
            isFatal: true),
    ]

    @Test("what is wrong is said in one sentence, and the process does not trap", arguments: cases)
    func hostileStream(hostile: Case) throws {
        let vm = try bench.startVM(
            "waiting", ["--machine", "none", "--memory", "\(Self.memoryBytes)", "--incoming", "tcp:127.0.0.1:0"])
        try send(hostile.bytes, to: vm.port())
        #expect(vm.waitForLog(hostile.words), "\(vm.log)")
        guard hostile.isFatal else {
            // A stranger does no harm: the destination waits on, and ends well.
            #expect(try vm.status() == "inmigrate")
            #expect(try bench.run(["quit", "waiting"]).status == .exited(0))
            #expect(vm.process.wait(deadline: .after(seconds: 5)) == .exited(0))
            return
        }
        #expect(vm.process.wait(deadline: .after(seconds: 5)) == .exited(1))
        let last = vm.log.split(separator: "\n").last
        #expect(last?.hasPrefix("godwit: ") == true && last?.contains(hostile.words) == true, "\(vm.log)")
        #expect(try FileSystem.names(inFolder: bench.runtime) == [])
    }

    @Test("with --incoming defer a destination that failed stays, to be asked why")
    func deferred() throws {
        let vm = try bench.startVM(
            "waiting", ["--machine", "none", "--memory", "\(Self.memoryBytes)", "--incoming", "defer"])
        try vm.client.execute("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
        try send(Self.stream(page: 8192, pageBytes: 1000), to: vm.port())
        #expect(vm.waitForLog("the stream ended after"))
        Clock.sleep(nanoseconds: 200_000_000)
        #expect(vm.process.poll() == nil)
        let answer = try vm.client.execute("query-migrate")
        #expect(answer["status"] == "failed")
        #expect(answer["error-desc"]?.stringValue?.contains("the stream ended after") == true)
    }

    private func send(_ bytes: [UInt8], to port: String) throws {
        let socket = try Socket.connect(host: "127.0.0.1", port: port, deadline: .after(seconds: 5))
        try socket.writeAll(bytes, deadline: .after(seconds: 5))
        try Socket.finishSending(socket)
        // Until the destination has seen the end.
        _ = try? socket.wait(for: .readable, deadline: .after(seconds: 2), operation: "receive")
    }
}

@Suite(
    "godwit demo shows a migration, verified", .serialized, .timeLimit(.minutes(2)),
    .enabled(if: Workbench.hasKVM, "needs /dev/kvm"))
struct DemoTests {
    private let bench: Workbench

    init() throws { bench = try Workbench() }

    @Test("it exits 0, prints the report and 'verified', and leaves nothing behind")
    func demo() throws {
        let outcome = try bench.run(["demo", "--memory", "64M"], seconds: 60)
        #expect(outcome.status == .exited(0), "\(outcome)")
        #expect(outcome.output.contains("Migration status: completed"))
        #expect(outcome.output.split(separator: "\n").last?.hasPrefix("verified: ") == true, "\(outcome)")
        try checkLeftovers()
    }

    @Test("it takes any guest", arguments: ["idle", "probe,working-set=4M"])
    func guests(spec: String) throws {
        let outcome = try bench.run(["demo", "--memory", "32M", "--cpus", "1", "--guest", spec], seconds: 60)
        #expect(outcome.status == .exited(0) && outcome.output.contains("\nverified: "), "\(outcome)")
    }

    @Test("interrupted it fails, and leaves nothing behind either")
    func interrupted() throws {
        let demo = try bench.start(["demo", "--memory", "64M"])
        Clock.sleep(nanoseconds: 300_000_000)
        demo.process.signal(SIGINT)
        let outcome = bench.finish(demo)
        #expect(outcome.status == .exited(1), "\(outcome)")
        try checkLeftovers()
    }

    @Test("a guest that does not fit fails with the child's sentence")
    func misfit() throws {
        let outcome = try bench.run(["demo", "--memory", "32M", "--guest", "dirty,working-set=1G"])
        #expect(outcome.status == .exited(1))
        #expect(outcome.lastErrorLine.hasPrefix("godwit: source VM: guest dirty does not fit"), "\(outcome)")
        try checkLeftovers()
    }

    private func checkLeftovers() throws {
        #expect(try FileSystem.names(inFolder: bench.folder).filter { $0.hasPrefix("godwit-demo") } == [])
        // No process has our folder on its command line any more.
        for entry in try FileSystem.names(inFolder: "/proc") where entry.allSatisfy(\.isNumber) {
            guard let bytes = try? Descriptor.contents(of: "/proc/\(entry)/cmdline") else { continue }
            #expect(!String(decoding: bytes, as: UTF8.self).contains("\(bench.folder)/godwit-demo"))
        }
    }
}
