import Host
import QMP
import TestSupport
import Testing

@Suite(
    "QEMU's Python client drives Godwit", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: Workbench.hasKVM, "needs /dev/kvm"))
struct PythonClientTests {
    private let bench: Workbench

    init() throws { bench = try Workbench() }

    @Test("a whole live migration with events, through the package qemu.qmp")
    func migration() throws {
        guard let python = try pythonWithClient() else { return }
        let source = try bench.startVM(
            "source", ["--memory", "48M", "--cpus", "2", "--guest", "dirty,working-set=4M,rate=8M"])
        let destination = try bench.startVM(
            "destination", ["--memory", "48M", "--cpus", "2", "--incoming", "defer"])
        try source.waitForGuest()
        let child = try bench.start(
            command: python + [script, "\(bench.runtime)/source.qmp", "\(bench.runtime)/destination.qmp"])
        let outcome = bench.finish(child, seconds: 60)
        try #require(outcome.status == .exited(0), "\(outcome)")
        let answer = try JSON(parsing: outcome.output.utf8)

        #expect(answer["greeting-has-oob"] == true)
        #expect(answer["commands"]?.arrayValue?.contains("migrate") == true)
        #expect(answer["source"]?["status"]?["status"] == "postmigrate")
        #expect(answer["source"]?["migration"]?["status"] == "completed")
        #expect(answer["source"]?["text"]?.stringValue?.hasPrefix("Migration status: completed") == true)
        #expect(answer["destination"]?["status"]?["status"] == "running")
        #expect(answer["destination"]?["cpus"]?.arrayValue?.count == 2)
        #expect(answer["destination"]?["check"]?["verified"] == true)
        #expect(answer["refusal"]?[0] == "ExecuteError", "\(outcome)")

        // QEMU's order; how many passes there are depends on the guest.
        let atSource = words(answer["source"]?["events"]).filter { !$0.hasPrefix("MIGRATION_PASS") }
        #expect(
            atSource == ["MIGRATION setup", "MIGRATION active", "STOP", "MIGRATION device", "MIGRATION completed"])
        let passes = answer["source"]?["events"]?.arrayValue?.filter { $0["event"] == "MIGRATION_PASS" } ?? []
        let numbers = passes.compactMap { $0["data"]?["pass"]?.integerValue(as: Int.self) }
        #expect(numbers.count >= 2 && numbers == Array(1...max(1, numbers.count)))
        #expect(
            words(answer["destination"]?["events"])
                == ["MIGRATION setup", "MIGRATION active", "RESUME", "MIGRATION completed"])
        for vm in [source, destination] { #expect(vm.process.wait(deadline: .after(seconds: 5)) == .exited(0)) }
    }

    private func words(_ events: JSON?) -> [String] {
        (events?.arrayValue ?? []).map { event in
            let name = event["event"]?.stringValue ?? "?"
            return event["data"]?["status"]?.stringValue.map { "\(name) \($0)" } ?? name
        }
    }

    private var script: String {
        #filePath.split(separator: "/").dropLast().reduce("") { $0 + "/" + $1 } + "/drive_migration.py"
    }

    /// A Python that has the client: the system's, or with the package in a folder of its own. `nil`, and a line why, where
    /// there is none to be had.
    private func pythonWithClient() throws -> [String]? {
        let find = ["python3", "-c", "import qemu.qmp"]
        guard let there = try? bench.start(command: find), bench.finish(there).status == .exited(0) else {
            let folder = "\(bench.folder)/python"
            let install = try bench.start(command: [
                "python3", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--retries",
                "0", "--timeout", "10", "--target", folder, "qemu.qmp",
            ])
            guard bench.finish(install, seconds: 60).status == .exited(0) else {
                print("conformance: the Python client is skipped, the package qemu.qmp is not to be had")
                return nil
            }
            return ["env", "PYTHONPATH=\(folder)", "python3"]
        }
        return ["python3"]
    }
}
