import CommandLineKit
import Host
import QMP

/// What `godwit demo` does: read `run`.
struct Demonstration {
    private let source: ChildVM
    private let destination: ChildVM
    private let title: String
    private let interruption: SignalWatch.Flag
    private let progress = Terminal.error

    /// How long the guest writes before it is moved, so that it is found at work.
    private static let warmUpNanoseconds: UInt64 = 1_000_000_000

    init(
        folder: String, memoryBytes: UInt64, cpuCount: Int, accelerator: String, guest: String,
        interruption: SignalWatch.Flag
    ) throws {
        self.interruption = interruption
        title = "\(Amount.memory(memoryBytes)), \(cpuCount) \(cpuCount == 1 ? "vCPU" : "vCPUs"), guest \(guest)"
        let machine = ["--memory", "\(memoryBytes)", "--cpus", "\(cpuCount)", "--accel", accelerator]
        func serial(_ role: String) -> [String] { ["--serial", "file:\(folder)/\(role).serial"] }
        source = try ChildVM("source", in: folder, options: machine + serial("source") + ["--guest", guest])
        do {
            destination = try ChildVM(
                "destination", in: folder,
                options: machine + serial("destination") + ["--incoming", "tcp:127.0.0.1:0"])
        } catch {
            source.end()
            throw error
        }
    }

    /// - Throws: `CommandFailure` at the first step that did not go as it must; the VMs are gone in any case.
    func run() throws {
        defer { [source, destination].forEach { $0.end() } }
        do {
            say("source and destination: \(title)")
            let uri = try addressOfDestination()
            try waitForGuest()
            let answer = try migrate(to: uri)
            let moved = try waitForProgress()
            try checkThatSourceStands(at: moved.before)
            let summary = try check()
            let report = MigrationReport(MigrationReading(answer), showsColors: Terminal.output.showsColors)
            Terminal.output.write(report.text)
            Terminal.output.write("the guest wrote \(moved.after - moved.before) pages at the destination since\n")
            Terminal.output.write(Terminal.output.showsColors ? Style.green(summary) + "\n" : summary + "\n")
        } catch {
            showLogs()
            throw error
        }
    }

    // MARK: The steps

    private func addressOfDestination() throws -> String {
        _ = try source.client()
        return try destination.listeningAddress()
    }

    private func waitForGuest() throws {
        say("the guest fills its memory and begins to write")
        try wait(seconds: 60, for: "the guest to fill its memory") {
            try source.execute("x-query-guest")["ready"] == true
        }
        let end = Deadline.after(nanoseconds: Self.warmUpNanoseconds)
        try wait(seconds: 60, for: "the guest to write") { end.hasPassed }
    }

    private func migrate(to uri: String) throws -> JSON {
        say("migrating it to \(uri)")
        let display = MigrationDisplay(on: progress)
        var session = MigrationSession(client: try source.client(), display: display) { interruption.isRaised }
        let answer = try session.run(to: uri)
        try MigrationReading(answer).requireCompletion(of: "the guest", to: uri)
        return answer
    }

    /// The guest has written at the destination, beyond where it was when it left the source.
    private func waitForProgress() throws -> (before: UInt64, after: UInt64) {
        let before = try touches(of: source)
        var after = before
        try wait(seconds: 10, for: "the guest to go on at the destination") {
            after = try touches(of: destination)
            return after > before
        }
        return (before, after)
    }

    private func checkThatSourceStands(at before: UInt64) throws {
        let status = try source.execute("query-status")
        guard status["running"] == false, status["status"] == "postmigrate", try touches(of: source) == before else {
            throw CommandFailure("source VM: the guest still runs here after it was handed over (\(status))")
        }
    }

    private func check() throws -> String {
        say("checking every page")
        let result = try destination.execute("x-check-guest")
        let summary = result["summary"]?.stringValue ?? "\(result)"
        guard result["verified"] == true else { throw CommandFailure("destination VM: \(summary)") }
        return summary
    }

    // MARK: Pieces

    /// Pages the guest wrote or read since its start; heartbeats for a guest that only sleeps.
    private func touches(of vm: ChildVM) throws -> UInt64 {
        let status = try vm.execute("x-query-guest")
        let name = status["kind"] == "idle" ? "heartbeats" : "touches"
        return status[name]?.integerValue(as: UInt64.self) ?? 0
    }

    private func wait(seconds: UInt64, for what: String, until isDone: () throws -> Bool) throws {
        let deadline = Deadline.after(seconds: seconds)
        while try !isDone() {
            if interruption.isRaised { throw CommandFailure("interrupted while waiting for \(what)") }
            guard !deadline.hasPassed else { throw CommandFailure("waited \(seconds) s in vain for \(what)") }
            Clock.sleep(nanoseconds: 10_000_000)
        }
    }

    private func say(_ step: String) { progress.write("\(step)\n") }

    private func showLogs() {
        for vm in [source, destination] {
            for line in vm.logTail() { progress.write("  [\(vm.role)] \(line)\n") }
        }
    }
}
