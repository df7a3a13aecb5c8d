import Host
import QMP
import TestSupport
import Testing

@testable import CommandLineKit

@Suite(
    "Dirty rates of VMs that run", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: Workbench.hasKVM, "needs /dev/kvm"))
struct DirtyRateTests {
    private let bench: Workbench
    private static let log = "kvm,dirty-tracking=log"
    private static let ring = "kvm,dirty-ring-size=4096"

    init() throws { bench = try Workbench() }

    /// 128 MiB, of which the guest writes 64 MiB anew every two seconds.
    private func startVM(_ accelerator: String) throws -> VM {
        let vm = try bench.startVM(
            "web", ["--memory", "128M", "--guest", "dirty,working-set=64M,rate=32M", "--accel", accelerator])
        try vm.waitForGuest()
        return vm
    }

    private func measure(_ vm: VM, _ arguments: [String: JSON]) throws -> JSON {
        try vm.client.execute("calc-dirty-rate", .object(arguments))
        var result: JSON = [:]
        let isDone = try vm.wait(seconds: 20) {
            result = try vm.client.execute("query-dirty-rate")
            return result["status"] != "measuring"
        }
        #expect(isDone && result["status"] == "measured", "\(result)")
        return result
    }

    @Test(
        "a guest's rate is measured by sampling and by tracking, while it runs on",

        arguments: ["page-sampling", "dirty-bitmap"], [DirtyRateTests.log, DirtyRateTests.ring])
    func measured(mode: String, accelerator: String) throws {
        let vm = try startVM(accelerator)
        let result = try measure(vm, ["calc-time": 1, "mode": .string(mode)])
        #expect(result["mode"] == .string(mode) && result["calc-time"] == 1)
        // The guest may not get all the processor it would need; more than it wants it does not write.
        let rate = try #require(result["dirty-rate"]?.integerValue(as: Int.self))
        #expect((10...45).contains(rate), "\(rate) MiB/s")
        #expect(try vm.status() == "running")
        let text =
            try vm.client.execute(
                "human-monitor-command", ["command-line": "info dirty_rate"]
            ).stringValue ?? ""
        #expect(text.contains("Dirty rate: \(rate) (MB/s)"), "\(text)")

        try vm.client.execute("stop")
        let idle = try measure(
            vm, ["calc-time": 200, "calc-time-unit": "millisecond", "mode": .string(mode)])
        #expect(idle["dirty-rate"] == 0, "a guest that stands still writes nothing: \(idle)")
    }

    @Test("godwit info NAME dirty-rate measures and prints a table, or the VM's answer")
    func command() throws {
        _ = try startVM(Self.log)
        let outcome = try bench.run(["info", "web", "dirty-rate"])
        #expect(outcome.status == .exited(0), "\(outcome)")
        let lines = outcome.output.split(separator: "\n").map { $0.split(separator: " ").map(String.init) }
        #expect(lines[0] == ["VCPU", "DIRTY", "RATE", "PERIOD", "MODE"])
        #expect(
            lines[1].count == 6 && lines[1][0] == "all" && Array(lines[1][2...4]) == ["MiB/s", "1", "s"], "\(outcome)")
        #expect((10...60).contains(Int(lines[1][1]) ?? 0), "\(outcome)")
        let json = try JSON(parsing: bench.run(["info", "web", "dirty-rate", "--json"]).output.utf8)
        #expect(json["status"] == "measured" && json["dirty-rate"] != nil, "\(json)")
    }

    @Test("with rings each vCPU's rate is told, and a limit is set, shown and ended")
    func rings() throws {
        let vm = try startVM(Self.ring)
        let result = try measure(vm, ["calc-time": 1, "mode": "dirty-ring"])
        // Entries of the ring: the kernel may repeat pages, and adds those it changes itself.
        let rate = try #require(result["dirty-rate"]?.integerValue(as: Int.self))
        #expect((10...320).contains(rate), "\(rate) MiB/s")
        #expect(result["vcpu-dirty-rate"] == [["id": 0, "dirty-rate": JSON(rate)]], "\(result)")
        try vm.client.execute("set-vcpu-dirty-limit", ["dirty-rate": 4])
        #expect(try vm.client.execute("query-vcpu-dirty-limit")[0]?["limit-rate"] == 4)
        Clock.sleep(nanoseconds: 1_000_000_000)
        let limited = try measure(vm, ["calc-time": 1, "mode": "dirty-bitmap"])
        #expect((limited["dirty-rate"]?.integerValue(as: Int.self) ?? .max) <= 8, "\(limited)")
        try vm.client.execute("cancel-vcpu-dirty-limit")
        #expect(try vm.client.execute("query-vcpu-dirty-limit") == [])
        let table = try bench.run(["info", "web", "dirty-rate"]).output.split(separator: "\n")
        #expect(table.count == 3 && table[2].hasPrefix("0 ") && table[2].hasSuffix("dirty-ring"), "\(table)")
    }

    @Test("a reading is a row for the VM and one for each vCPU")
    func text() {
        let reading = DirtyRateReading([
            "status": "measured", "dirty-rate": 120, "calc-time": 1, "mode": "dirty-ring",
            "vcpu-dirty-rate": [["id": 0, "dirty-rate": 20], ["id": 1, "dirty-rate": 100]],
        ])
        #expect(
            reading.text == """
                VCPU  DIRTY RATE  PERIOD  MODE
                all    120 MiB/s     1 s  dirty-ring
                0       20 MiB/s     1 s  dirty-ring
                1      100 MiB/s     1 s  dirty-ring

                """)
    }
}
