import Glibc
import Host
import TestSupport
import Testing

@Suite(
    "godwit demo shows a migration, verified", .serialized, .timeLimit(.minutes(10)),
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

    @Test("when it is killed its VMs die with it")
    func killed() throws {
        let demo = try bench.start(["demo", "--memory", "64M"])
        let deadline = Deadline.after(seconds: 20)
        // Both children run, and their sockets are there.
        while try children().count < 2 || sockets().count < 2 {
            try #require(!deadline.hasPassed)
            Clock.sleep(nanoseconds: 5_000_000)
        }
        demo.process.signal(SIGKILL)
        while try !children().isEmpty {
            try #require(!deadline.hasPassed, "VMs of a killed demonstration run on")
            Clock.sleep(nanoseconds: 5_000_000)
        }
    }

    /// The processes which have a demonstration's folder on their command line.
    private func children() throws -> [String] {
        try FileSystem.names(inFolder: "/proc").filter { entry in
            guard entry.allSatisfy(\.isNumber), let bytes = try? Descriptor.contents(of: "/proc/\(entry)/cmdline")
            else {
                return false
            }
            return String(decoding: bytes, as: UTF8.self).contains("\(bench.folder)/godwit-demo")
        }
    }

    private func sockets() throws -> [String] {
        try FileSystem.names(inFolder: bench.folder).filter { $0.hasPrefix("godwit-demo") }
            .flatMap { try FileSystem.names(inFolder: "\(bench.folder)/\($0)") }.filter { $0.hasSuffix(".qmp") }
    }

    private func checkLeftovers() throws {
        #expect(try FileSystem.names(inFolder: bench.folder).filter { $0.hasPrefix("godwit-demo") } == [])
        #expect(try children() == [])
    }
}
