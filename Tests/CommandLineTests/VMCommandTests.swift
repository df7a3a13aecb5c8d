import Glibc
import Host
import QMP
import TestSupport
import Testing

@testable import CommandLineKit

@Suite(
    "Commands drive VMs that run", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: Workbench.hasKVM, "needs /dev/kvm"))
struct VMCommandTests {
    private let bench: Workbench

    init() throws { bench = try Workbench() }

    private let guest = ["--memory", "32M", "--guest", "dirty,working-set=4M,rate=4M"]

    @Test("a VM is listed, looked at, stopped, continued, reset and ended by name")
    func roundTrip() throws {
        let vm = try bench.startVM("web", guest + ["--cpus", "2"])
        let list = try bench.run(["ps"])
        let row = try #require(list.output.split(separator: "\n").last).split(separator: " ").map(String.init)
        #expect(row == ["web", "\(vm.process.identifier)", "running", "32", "MiB", "2", "none"])
        let overview = try JSON(parsing: bench.run(["ps", "--json"]).output.utf8)[0]
        #expect(overview?["memory"] == 33_554_432 && overview?["pid"] == JSON(vm.process.identifier))

        #expect(try bench.run(["info", "web", "status"]).output == "VM status: running\n")
        #expect(try bench.run(["info", "web", "memory"]).output == "memory: 32 MiB (33554432 bytes)\n")
        #expect(try bench.run(["info", "web", "vcpus"]).output.split(separator: "\n").count == 3)
        #expect(try bench.run(["info", "web", "migrate"]).output == "Migration status: none\n")

        #expect(try bench.run(["stop", "web"]).status == .exited(0))
        #expect(try bench.run(["info", "web", "status"]).output == "VM status: paused\n")
        #expect(try bench.run(["cont", "web"]).status == .exited(0))
        #expect(try vm.status() == "running")
        #expect(try bench.run(["reset", "unix:\(bench.runtime)/web.qmp"]).status == .exited(0))
        #expect(try vm.status() == "running")

        #expect(try bench.run(["quit", "web"]).status == .exited(0))
        // Its socket is gone as soon as the command has returned, and the process soon after.
        #expect(try FileSystem.names(inFolder: bench.runtime) == [])
        #expect(vm.process.wait(deadline: .after(seconds: 5)) == .exited(0))
        #expect(try bench.run(["ps"]).output.split(separator: "\n").count == 1)
    }

    @Test("signals end a VM cleanly", arguments: [SIGTERM, SIGINT, SIGHUP])
    func signals(number: CInt) throws {
        let vm = try bench.startVM("web", guest)
        vm.process.signal(number)
        #expect(vm.process.wait(deadline: .after(seconds: 5)) == .exited(0))
        #expect(try FileSystem.names(inFolder: bench.runtime) == [])
        #expect(vm.log.contains("ended by \(SignalWatch.names[number] ?? "?")"))
    }

    @Test("a guest that writes the debug-exit port ends its VM with the status of the port")
    func guestShutdown() throws {
        // mov al, 3; out 0xf4, al; hlt
        let path = "\(bench.folder)/exit.img"
        try Descriptor.create(path).writeAll([0xb0, 0x03, 0xe6, 0xf4, 0xf4])
        let outcome = try bench.run(["run", "--memory", "2M", "--boot-sector", path, "--serial", "none"])
        guard case .exited(let status) = outcome.status else {
            Issue.record("\(outcome)")
            return
        }
        #expect(outcome.errors.contains("the guest shut down with status \(status)"), "\(outcome)")
        #expect(status != 0)
        #expect(try FileSystem.names(inFolder: bench.runtime) == [])
    }

    @Test("a name that is taken is refused, and the VM that has it runs on")
    func nameTaken() throws {
        let vm = try bench.startVM("web", guest)
        let outcome = try bench.run(["run", "--name", "web", "--memory", "16M", "--guest", "idle", "--serial", "none"])
        #expect(outcome.status == .exited(1))
        #expect(outcome.lastErrorLine.contains("a VM named web is running; choose another --name"), "\(outcome)")
        #expect(try vm.status() == "running")
    }

    @Test("an address in use is refused, for QMP, serial line and migration")
    func addressInUse() throws {
        let listener = try Socket.listen(host: "127.0.0.1", port: "0")
        let port = try #require(Socket.localPort(of: listener))
        let path = "\(bench.folder)/taken"
        let socket = try Socket.listen(unix: path)
        defer { withExtendedLifetime(socket) {} }
        for (options, object) in [
            (["--incoming", "tcp:127.0.0.1:\(port)"], "127.0.0.1:\(port)"), (["--qmp", "unix:\(path)"], path),
            (["--serial", "unix:\(path)"], path),
        ] {
            let outcome = try bench.run(["run", "--memory", "16M"] + options)
            #expect(outcome.status == .exited(1), "\(outcome)")
            #expect(outcome.lastErrorLine.contains(object) && outcome.lastErrorLine.contains("in use"), "\(outcome)")
        }
        #expect(try FileSystem.names(inFolder: bench.runtime) == [])
    }

    @Test("qmp takes words and JSON, and lines from its input")
    func qmp() throws {
        _ = try bench.startVM("web", guest)
        let answer = try bench.run(["qmp", "web", "query-status"])
        #expect(try JSON(parsing: answer.output.utf8)["status"] == "running")
        #expect(try bench.run(["qmp", "web", #"{"execute": "stop"}"#]).status == .exited(0))
        let refused = try bench.run(["qmp", "web", "fly", "high=1"])
        #expect(refused.status == .exited(1))
        #expect(refused.lastErrorLine.contains("CommandNotFound") && refused.lastErrorLine.contains("fly"))

        let lines = "query-status\n\n{\"execute\": \"cont\"}\n{ broken\nmigrate uri=rdma:x:1\n"
        let outcome = try bench.run(["qmp", "web"], input: lines)
        let answers = try outcome.output.split(separator: "\n").map { try JSON(parsing: $0.utf8) }
        #expect(outcome.status == .exited(0))
        #expect(answers.contains { $0["event"] == "RESUME" })
        let replies = answers.filter { $0["event"] == nil }
        #expect(replies.count == 4)
        #expect(replies[0]["return"]?["status"] == "paused")
        #expect(replies[1]["return"] == [:])
        #expect(replies[2]["error"]?["desc"]?.stringValue?.contains("not JSON") == true)
        #expect(replies[3]["error"]?["desc"]?.stringValue?.contains("rdma") == true)
    }

    @Test("commands in the wrong state are refused, each with its reason")
    func wrongState() throws {
        let vm = try bench.startVM("web", ["--memory", "16M", "--incoming", "defer"])
        for (command, words) in [
            (["cont", "web"], "waits for an incoming migration"), (["stop", "web"], "waits for an incoming migration"),
            (["reset", "web"], "inmigrate"),
            (["migrate", "web", "tcp:127.0.0.1:1"], "waiting for an incoming migration"),
            (["migrate", "web", "--proceed"], "pre-switchover"),
            (["migrate", "web", "--settle", "resume-here"], "unsettled"),
            (["qmp", "web", "x-query-guest"], "guest"),
        ] {
            let outcome = try bench.run(command)
            #expect(outcome.status == .exited(1), "\(command) \(outcome)")
            #expect(outcome.errorLines.count == 1 && outcome.lastErrorLine.contains(words), "\(command) \(outcome)")
        }
        #expect(try vm.status() == "inmigrate")
    }

    @Test("malformed and huge QMP lines get errors, and the VM serves on")
    func hostileLines() throws {
        let vm = try bench.startVM("web", guest)
        let path = "\(bench.runtime)/web.qmp"
        let noise = (0..<4096).map { UInt8(truncatingIfNeeded: $0 &* 167 &+ ($0 >> 3)) }
        let huge = [UInt8](repeating: UInt8(ascii: "["), count: 80 << 20)
        for bytes in [Array("}{ nonsense\n".utf8), noise, huge] {
            let socket = try Socket.connect(unix: path)
            try socket.setNonBlocking(true)
            // It may close on us in the middle.
            _ = try? socket.writeAll(bytes + [0x0A], deadline: .after(seconds: 10))
            try? socket.wait(for: .readable, deadline: .after(seconds: 10), operation: "receive")
            let greeting = try socket.read(upTo: 1 << 16) ?? []
            #expect(String(decoding: greeting, as: UTF8.self).contains("QMP"))
        }
        #expect(try vm.status() == "running")
        #expect(try bench.run(["qmp", "web", "query-status"]).status == .exited(0))
    }
}
