import Accelerator
import GuestMemory
import Host
import Machine
import Migration
import Synchronization
import Testing

@testable import QMP

@Suite(.timeLimit(.minutes(10))) struct DirtyRateCommandTests {
    @Test("wrong values of calc-dirty-rate are refused by name, and nothing is measured")
    func badValues() throws {
        let vm = try MonitoredMachine()
        func refused(_ arguments: [String: JSON], _ words: String) throws {
            let sentence = try vm.refusal("calc-dirty-rate", arguments)
            #expect(sentence.contains(words), "\(sentence)")
        }
        try refused([:], "Parameter 'calc-time' is missing")
        try refused(["calc-time": "1"], "Invalid parameter type for 'calc-time', expected: integer")
        for time in [0, -1, 61, Int64.min, Int64.max] as [Int64] {
            try refused(["calc-time": JSON(time)], "calc-time \(time) s is out of range: 1 to 60 s")
        }
        for time in [99, 60_001] as [Int64] {
            try refused(
                ["calc-time": JSON(time), "calc-time-unit": "millisecond"],
                "calc-time \(time) ms is out of range: 100 to 60000 ms")
        }
        try refused(["calc-time": 1, "calc-time-unit": "hour"], "'calc-time-unit' does not accept value 'hour'")
        try refused(["calc-time": 1, "mode": "guess"], "'mode' does not accept value 'guess'")
        for pages in [-1, 0, 127, 16_385, Int64.max] as [Int64] {
            try refused(
                ["calc-time": 1, "sample-pages": JSON(pages)], "sample-pages \(pages) is out of range: 128 to 16384")
        }
        try refused(["calc-time": 1, "sample-pages": 128, "mode": "dirty-bitmap"], "page-sampling mode only")
        try refused(["calc-time": 1, "mode": "dirty-bitmap"], "no vCPU whose writes could be tracked")
        try refused(["calc-time": 1, "mode": "dirty-ring"], "--accel kvm,dirty-ring-size=")
        #expect(
            try vm.run("query-dirty-rate") == [
                "status": "unstarted", "start-time": 0, "calc-time": 0, "calc-time-unit": "second", "sample-pages": 0,
                "mode": "page-sampling",
            ])
    }

    @Test("without rings limits are refused with what would help, and there are none")
    func noRing() throws {
        let vm = try MonitoredMachine()
        for (command, arguments) in [
            ("set-vcpu-dirty-limit", ["dirty-rate": 100]), ("cancel-vcpu-dirty-limit", [:]),
        ] as [(String, [String: JSON])] {
            let sentence = try vm.refusal(command, arguments)
            #expect(sentence.hasPrefix(command) && sentence.contains("--accel kvm,dirty-ring-size="), "\(sentence)")
        }
        #expect(try vm.refusal("set-vcpu-dirty-limit") == "Parameter 'dirty-rate' is missing")
        #expect(try vm.run("query-vcpu-dirty-limit") == [])
        #expect(try vm.human("info vcpu_dirty_limit") == "Dirty page limit not enabled!\r\n")
    }

    @Test("sampling finds the share of pages that were written, and looks into no hole")
    func sampling() throws {
        let vm = try MonitoredMachine(megabytes: 64)
        let block = vm.machine.memory.blocks[0]
        // The first quarter has something in it; the rest are holes.
        for page in 0..<UInt64(4096) { try vm.write([1], at: page * 4096) }
        let before = try block.allocatedRuns(in: block.pages)
        try vm.run("calc-dirty-rate", ["calc-time": 300, "calc-time-unit": "millisecond", "sample-pages": 4096])
        #expect(try vm.refusal("calc-dirty-rate", ["calc-time": 1]).contains("already being measured"))
        let measuring = try vm.run("query-dirty-rate")
        #expect(measuring["status"] == "measuring" && measuring["dirty-rate"] == nil)
        // The first look at 4,096 pages takes some milliseconds.
        Clock.sleep(nanoseconds: 100_000_000)
        for page in 0..<UInt64(2048) { try vm.write([2], at: page * 4096 + 4000) }
        let result = try vm.measured()
        #expect(result["calc-time"] == 0 && result["sample-pages"] == 4096 && result["mode"] == "page-sampling")
        #expect(try vm.run("query-dirty-rate", ["calc-time-unit": "millisecond"])["calc-time"] == 300)
        #expect((result["start-time"]?.integerValue(as: UInt64.self) ?? 0) > 1_700_000_000)
        // 8 MiB in 0.3 s; the machine may be slow, but not too fast.
        let rate = try #require(result["dirty-rate"]?.integerValue(as: Int.self))
        #expect((4...30).contains(rate), "\(rate) MiB/s")
        #expect(try block.allocatedRuns(in: block.pages) == before, "no hole was touched")
        let text = try vm.human("info dirty_rate")
        #expect(text.contains("Status: measured\r\n") && text.contains("Dirty rate: \(rate) (MB/s)\r\n"), "\(text)")
    }

    @Test("nothing is written, and that is what is measured")
    func idle() throws {
        let vm = try MonitoredMachine()
        try vm.write([1], at: 0)
        let text = try vm.human("calc_dirty_rate 1 128")
        #expect(text.hasPrefix("Starting dirty rate measurement with period 1 seconds\r\n"), "\(text)")
        #expect(try vm.human("info dirty_rate").contains("Dirty rate: (not ready)\r\n"))
        let result = try vm.measured()
        #expect(result["dirty-rate"] == 0 && result["sample-pages"] == 128)
    }

    @Test("rings tell each vCPU's rate, and take limits")
    func rings() throws {
        let rings = Rings(cpus: 3)
        let table = try rings.commands()
        try table.run("calc-dirty-rate", ["calc-time": 200, "calc-time-unit": "millisecond", "mode": "dirty-ring"])
        var result: JSON = [:]
        repeat {
            Clock.sleep(nanoseconds: 5_000_000)
            result = try table.run("query-dirty-rate")
        } while result["status"] == "measuring"
        #expect(result["status"] == "measured" && result["mode"] == "dirty-ring", "\(result)")
        // Each harvest finds 2,560, 5,120, 7,680 pages more: 10, 20, 30 MiB in a fifth of a second, or a bit more.
        let rates = (result["vcpu-dirty-rate"]?.arrayValue ?? []).compactMap {
            $0["dirty-rate"]?.integerValue(as: Int.self)
        }
        try #require(rates.count == 3, "\(result)")
        #expect((10...50).contains(rates[0]) && abs(rates[1] - 2 * rates[0]) <= 2 && abs(rates[2] - 3 * rates[0]) <= 3)
        let total = try #require(result["dirty-rate"]?.integerValue(as: Int.self))
        #expect(abs(total - rates.reduce(0, +)) <= 2)
        #expect(rings.log.withLock { $0 } == ["start", "collect", "willSend 0..<64", "harvest", "harvest", "stop"])
    }

    @Test("limits go to one vCPU or all, 0 ends them, and wrong ones are refused by name")
    func limits() throws {
        let rings = Rings(cpus: 2)
        let table = try rings.commands()
        try table.run("set-vcpu-dirty-limit", ["dirty-rate": 50])
        try table.run("set-vcpu-dirty-limit", ["dirty-rate": 200, "cpu-index": 1])
        #expect(
            try table.run("query-vcpu-dirty-limit") == [
                ["cpu-index": 0, "limit-rate": 50, "current-rate": 7],
                ["cpu-index": 1, "limit-rate": 200, "current-rate": 7],
            ])
        try table.run("set-vcpu-dirty-limit", ["dirty-rate": 0, "cpu-index": 0])
        try table.run("cancel-vcpu-dirty-limit", ["cpu-index": 1])
        #expect(try table.run("query-vcpu-dirty-limit") == [])
        try table.run("set-vcpu-dirty-limit", ["dirty-rate": 50])
        try table.run("cancel-vcpu-dirty-limit")
        #expect(try table.run("query-vcpu-dirty-limit") == [])
        func refused(_ command: String, _ arguments: [String: JSON], _ words: String) {
            let error = #expect(throws: QMPError.self) { try table.run(command, arguments) }
            #expect(error?.description.contains(words) == true, "\(error?.description ?? "")")
        }
        for index in [-1, 2, Int64.max] as [Int64] {
            refused("set-vcpu-dirty-limit", ["dirty-rate": 1, "cpu-index": JSON(index)], "0 to 1")
            refused("cancel-vcpu-dirty-limit", ["cpu-index": JSON(index)], "0 to 1")
        }
        refused("set-vcpu-dirty-limit", ["dirty-rate": -1], "'dirty-rate' expects uint64")
        refused("set-vcpu-dirty-limit", ["dirty-rate": JSON(UInt64.max)], "'dirty-rate' expects at most")
        #expect(rings.limits.isEmpty)
    }

    @Test("a tracker that fails ends the measurement with its sentence")
    func failure() throws {
        let rings = Rings(cpus: 1, fails: true)
        let table = try rings.commands()
        try table.run("calc-dirty-rate", ["calc-time": 1, "mode": "dirty-bitmap"])
        var result: JSON = [:]
        repeat { result = try table.run("query-dirty-rate") } while result["status"] == "measuring"
        #expect(result["status"] == "unstarted" && result["x-error"] == "calc-dirty-rate: the ring broke")
        #expect(rings.log.withLock { $0.last } == "stop")
    }

    @Test("the monitor for people names what it cannot take")
    func human() throws {
        let vm = try MonitoredMachine()
        #expect(try vm.human("calc_dirty_rate").contains("1 to 2 numbers are expected"))
        #expect(try vm.human("calc_dirty_rate x").contains("'x' is no number"))
        #expect(try vm.human("calc_dirty_rate -x 1").contains("unsupported option -x"))
        #expect(try vm.human("calc_dirty_rate -r -b 1").hasPrefix("Error: Either dirty-ring or dirty-bitmap"))
        #expect(try vm.human("calc_dirty_rate -r 1").contains("--accel kvm,dirty-ring-size="))
        #expect(try vm.human("calc_dirty_rate -b 1").contains("no vCPU"))
        #expect(try vm.human("calc_dirty_rate 61").hasPrefix("Error: calc-dirty-rate: calc-time 61 s"))
        #expect(try vm.human("set_vcpu_dirty_limit").contains("1 to 2 numbers"))
        #expect(try vm.human("set_vcpu_dirty_limit -1").contains("unsupported option -1"))
        #expect(try vm.human("set_vcpu_dirty_limit 100 0").contains("--accel kvm,dirty-ring-size="))
        #expect(try vm.human("cancel_vcpu_dirty_limit 0 1").contains("0 to 1 numbers"))
        #expect(try vm.human("help calc_dirty_rate").hasPrefix("calc_dirty_rate "))
        #expect(try vm.human("info").contains("info dirty_rate  -- "))
    }
}

extension MonitoredMachine {
    /// Waits for the end of a measurement.
    func measured() throws -> JSON {
        let deadline = Deadline.after(seconds: 20)
        while true {
            let result = try run("query-dirty-rate")
            if result["status"] != "measuring" { return result }
            try #require(!deadline.hasPassed)
            Clock.sleep(nanoseconds: 5_000_000)
        }
    }
}

extension CommandTable {
    @discardableResult
    fileprivate func run(_ command: String, _ arguments: [String: JSON] = [:]) throws -> JSON {
        var request = try QMPRequest(["execute": .string(command)], outOfBandEnabled: false)
        request.arguments = arguments
        return try run(request).get()
    }
}

/// Dirty rings that are not there: each harvest finds 2,560 pages of vCPU 0, twice as many of vCPU 1, and so on.
private final class Rings: DirtyTracker, DirtyRateControl {
    let log = Mutex<[String]>([])
    private let counts: Mutex<[UInt64]>
    private let limited: Mutex<[Int: UInt64]> = Mutex([:])
    private let fails: Bool

    init(cpus: Int, fails: Bool = false) {
        counts = Mutex(Array(repeating: 0, count: cpus))
        self.fails = fails
    }

    func commands() throws -> CommandTable {
        let memory = try MonitoredMachine(megabytes: 1).machine.memory
        let meter = DirtyRateMeter(memory: memory, tracker: { self }, control: { self })
        return CommandTable(commands: DirtyRateCommands(meter).all)
    }

    private func note(_ word: String) { log.withLock { $0.append(word) } }

    let client = DirtyClient.measurement
    let method = "ring"
    let cpuNanoseconds: UInt64 = 0
    func makePages() throws(AcceleratorError) -> sending [any DirtyPages] { [DirtySet(pageCount: 64)] }
    func start() throws(AcceleratorError) { note("start") }
    func collect(into pages: [any DirtyPages]) throws(AcceleratorError) {
        note("collect")
        if fails { throw AcceleratorError("the ring broke") }
        pages[0].set(PageIndex(3)..<PageIndex(5))
    }
    func willSend(_ pages: Range<PageIndex>, of block: Int, marked record: any DirtyPages) throws(AcceleratorError) {
        note("willSend \(pages.lowerBound.value)..<\(pages.upperBound.value)")
    }
    func stop() { note("stop") }

    var dirtiedPages: [UInt64] { counts.withLock { $0 } }
    func harvest() throws(AcceleratorError) {
        note("harvest")
        counts.withLock { counts in
            for cpu in counts.indices { counts[cpu] += 2560 * UInt64(cpu + 1) }
        }
    }
    func setLimit(_ bytesPerSecond: UInt64?, of cpu: Int?) throws(AcceleratorError) {
        let cpus = cpu.map { [$0] } ?? Array(dirtiedPages.indices)
        limited.withLock { set in
            for cpu in cpus { set[cpu] = bytesPerSecond }
        }
    }
    var limits: [DirtyLimit] {
        limited.withLock { $0 }.sorted { $0.key < $1.key }.map {
            DirtyLimit(cpu: $0.key, limitBytesPerSecond: $0.value, currentBytesPerSecond: 7 << 20 | 12345)
        }
    }
}
