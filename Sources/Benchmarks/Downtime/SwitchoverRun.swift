import CommandLineKit
import Host
import QMP

/// What one switchover was like, in milliseconds.
struct SwitchoverSample {
    var limit: Double
    /// The standstill that was committed, by the guest's own clock.
    var standstill: SwitchoverGap
    /// What the source says of it, and its parts.
    var reported: Double
    var parts: [MigrationReading.DowntimePart]
    /// What the source does not know of: how long the guest had not looked at its clock when it was told to stop, and did not yet when the
    /// source had heard that it runs. `nil` where that was not found out.
    var unseen: (before: Double, after: Double)?
    var total: Double
    /// Standstills that were broken off, and the longest of them.
    var broken: Int
    var longestBroken: Double
    /// How much too late the control thread woke at most meanwhile, and the longest gap of the control guest.
    var control: Double
    var controlGuest: Double
    /// How long the host kept the vCPU at the destination waiting for a processor while it was ready to run.
    var waited: Double
    /// What an outer host took of this one's processors in the whole migration, in steps of 10 ms; `nil` where that is not known.
    var stolen: Double?
    var stalls: Int

    /// What is allowed above the limit.
    static let tolerance = 5.0

    var gap: Double { standstill.milliseconds }
    var isViolation: Bool { standstill.isCertain && gap > limit + Self.tolerance }
    /// It may have been one: the guest's record does not tell.
    var isUndecided: Bool { !standstill.isCertain && gap > limit + Self.tolerance }
    /// Above by more than the host kept the control thread, the control guest or the vCPU waiting.
    func isBeyondHost(calm: Double) -> Bool {
        isViolation && gap > limit + Self.tolerance + max(control, waited, controlGuest - calm)
    }

    private var unseenWords: String {
        guard let unseen else { return "" }
        let (before, after) = (Amount.decimal(unseen.before, digits: 2), Amount.decimal(unseen.after, digits: 2))
        return "\(before) ms before it told the guest to stop and \(after) ms behind; "
    }

    /// For a note: where the time went.
    var account: String {
        func amount(_ milliseconds: Double) -> String { Amount.decimal(milliseconds, digits: 2) }
        let told = parts.map { "\($0.name) \(amount(Double($0.nanoseconds) / 1e6))" }.joined(separator: ", ")
        return
            "limit \(Amount.decimal(limit, digits: 0)) ms: gap \(isUndecided ? "at most " : "")\(amount(gap)) ms; by the source's clock \(amount(reported)) ms "
            + "(\(told)), \(unseenWords)the host kept the control thread waiting for \(amount(control)) ms, the vCPU at the destination for "
            + "\(amount(waited)) ms, the control guest's longest gap was \(amount(controlGuest)) ms"
            + (stolen.map { ", an outer host took \(Amount.decimal($0, digits: 0)) ms" } ?? "")
    }
}

/// A chain of switchovers: each destination is the source of the next. All VMs are processes of their own.
final class SwitchoverChain {
    private let folder: PrivateFolder
    private let options: BenchmarkOptions
    private let control: SchedulingControl
    private var source: ChildVM?
    private let controlGuest: ChildVM
    private var count = 0
    private(set) var seed: UInt64

    private static let memory = "64M"
    /// It never sleeps: one that does finds gaps of its own on a busy host, when its timer is late.
    private static let guest = "dirty,working-set=512K,fill=16M,random,heartbeat=0ms"
    /// It sleeps and wakes by its timer all the time, beside the others.
    private static let controlled = "dirty,working-set=64K,fill=none,rate=4M,heartbeat=0ms"
    private static let migrationSeconds: UInt64 = 60
    /// The network: a stall every so often, from a fraction of a millisecond to three times the limit.
    private static let meanGapMilliseconds = 30.0
    /// Of the guest at its clock, at the destination.
    private static let looksWanted = 4

    init(options: BenchmarkOptions, seed: UInt64) throws {
        folder = try PrivateFolder("bench")
        self.options = options
        self.seed = seed
        control = try SchedulingControl()
        controlGuest = try ChildVM(
            "control", in: folder.path,
            options: ["--memory", Self.memory, "--serial", "none", "--guest", Self.controlled])
    }

    func end() {
        controlGuest.end()
        source?.end()
        control.end()
        folder.remove()
    }

    private func start(_ arguments: [String]) throws -> ChildVM {
        count += 1
        return try ChildVM(
            "vm\(count)", in: folder.path, options: ["--memory", Self.memory, "--serial", "none"] + arguments)
    }

    private func readySource() throws -> ChildVM {
        if let source { return source }
        let vm = try start(["--guest", Self.guest])
        source = vm
        try options.waitUntilReady("downtime", lookEveryMilliseconds: 5) {
            try vm.execute("x-query-guest")["ready"] == true
        }
        return vm
    }

    /// - Returns: `nil` for a migration that did not complete in time: the limit was never kept, and so never broken.
    func measure(limitMilliseconds limit: UInt64) throws -> SwitchoverSample? {
        let source = try readySource()
        let destination = try start(["--incoming", "tcp:127.0.0.1:0"])
        seed &+= 2
        let now = Clock.monotonicNanoseconds
        func schedule(_ seed: UInt64) -> StallSchedule {
            StallSchedule(
                meanGapNanoseconds: Self.meanGapMilliseconds * 1e6, shortest: 2e5, longest: Double(limit) * 3e6,
                seed: seed,
                from: now)
        }
        let proxy = try StallingProxy(
            to: try destination.listeningAddress(), forward: schedule(seed), backward: schedule(seed &+ 1))
        defer { proxy.close() }
        try source.execute("migrate-set-parameters", ["downtime-limit": JSON(limit)])
        try source.execute("x-reset-guest-gap")
        let threads = (try destination.execute("query-cpus-fast").arrayValue ?? []).compactMap {
            $0["thread-id"]?.integerValue()
        }
        func waited() -> Double {
            Self.runQueueMilliseconds(process: destination.process.identifier, threads: threads)
        }
        let before = waited()
        let stolenBefore = SchedulingControl.stolenMilliseconds
        try controlGuest.execute("x-reset-guest-gap")
        _ = control.takeLongestNanoseconds()
        try source.execute("migrate", ["uri": .string(proxy.uri)])
        guard let answer = try awaitEnd(of: source) else {
            destination.end()
            return nil
        }
        let waitedAfter = waited()
        let here = try source.execute("x-query-guest")
        var clock = GuestClock()
        let there = try lookAgain(destination, after: here, &clock)
        guard there["tsc-backwards"] == 0 else { throw CommandFailure("the guest's clock went back over a migration") }
        let reading = MigrationReading(answer)
        let figures = try MigrationFigures(reading, of: "switchover \(count)")
        let standstill = try SwitchoverGap(from: here, to: there)
        let stop = try source.client().takeEvents().last { $0.name == "STOP" }
        let unseen = Self.unseen(standstill, clock, stop, reading.downtimeParts, figures)
        let sample = SwitchoverSample(
            limit: Double(limit), standstill: standstill, reported: figures.downtimeMilliseconds,
            parts: reading.downtimeParts, unseen: unseen,
            total: figures.totalMilliseconds, broken: Int(reading.brokenSwitchovers),
            longestBroken: Double(reading.longestBrokenNanoseconds) / 1e6,
            control: Double(control.takeLongestNanoseconds()) / 1e6, controlGuest: try longestControlGap(),
            waited: waitedAfter - before,
            stolen: stolenBefore.flatMap { before in SchedulingControl.stolenMilliseconds.map { $0 - before } },
            stalls: proxy.held.stalls)
        source.end()
        self.source = destination
        return sample
    }

    /// Lays what the guest saw beside what the source says, whose event STOP has the moment at which the guest stood.
    private static func unseen(
        _ standstill: SwitchoverGap, _ clock: GuestClock, _ stop: QMPEvent?, _ parts: [MigrationReading.DowntimePart],
        _ figures: MigrationFigures
    ) -> (before: Double, after: Double)? {
        guard let span = standstill.span, let start = clock.onHost(span.lowerBound),
            let end = clock.onHost(span.upperBound), let stop, let stopping = parts.first(where: { $0.name == "stop" })
        else { return nil }
        let toMonotonic = Double(Clock.monotonicNanoseconds) / 1e6 - Double(Clock.realtimeNanoseconds) / 1e6
        let told = Double(stop.microseconds) / 1e3 + toMonotonic - Double(stopping.nanoseconds) / 1e6
        return (told - start, end - (told + figures.downtimeMilliseconds))
    }

    /// How long threads were ready to run, and did not: the second field of schedstat (Documentation/scheduler/sched-stats.rst of the
    /// kernel). Where the kernel does not tell, none of it: that excuses nothing.
    private static func runQueueMilliseconds(process: Int32, threads: [Int]) -> Double {
        threads.reduce(0) { sum, thread in
            let bytes = (try? Descriptor.contents(of: "/proc/\(process)/task/\(thread)/schedstat", limit: 4096)) ?? []
            let fields = String(decoding: bytes, as: UTF8.self).split(separator: " ")
            return sum + (fields.count > 1 ? Double(fields[1]) ?? 0 : 0) / 1e6
        }
    }

    private func longestControlGap() throws -> Double {
        let guest = try controlGuest.execute("x-query-guest")
        guard let kilohertz = guest["tsc-kilohertz"]?.doubleValue, let gap = guest["longest-gap-ticks"]?.doubleValue,
            kilohertz > 0
        else { throw CommandFailure("the control guest does not tell its longest gap") }
        return gap / kilohertz
    }

    /// The guest must have looked at its clock since it was started there: twice, as it keeps a gap just behind the look that ends it, and
    /// some more for what is known of its clock.
    private func lookAgain(_ destination: ChildVM, after here: JSON, _ clock: inout GuestClock) throws -> JSON {
        guard let last = SwitchoverGap.lastLook(here) else {
            throw CommandFailure("the guest does not tell when it looked at its clock")
        }
        let deadline = Deadline.after(seconds: 20)
        var looks: Set<UInt64> = []
        var found: JSON?
        while true {
            let there = try destination.execute("x-query-guest")
            if let look = SwitchoverGap.lastLook(there), look != last {
                clock.look(there, answered: Clock.monotonicNanoseconds)
                looks.insert(look)
                // The first that is sure: later ones may have lost what it keeps.
                if looks.count > 1, found == nil { found = there }
                if let found, looks.count == Self.looksWanted { return found }
            }
            guard !deadline.hasPassed else { throw CommandFailure("the guest does not run on at its destination") }
            Clock.sleep(nanoseconds: 1_000_000)
        }
    }

    private func awaitEnd(of vm: ChildVM) throws -> JSON? {
        let client = try vm.client()
        let deadline = Deadline.after(seconds: Self.migrationSeconds)
        var broken: UInt64 = 0
        while !deadline.hasPassed {
            let answer = try vm.execute("query-migrate")
            // What a switchover that was broken off cost is told by the source: the guest measures afresh, for the next one.
            let count = MigrationReading(answer).brokenSwitchovers
            if count > broken, answer["status"] == "active" { try vm.execute("x-reset-guest-gap") }
            broken = count
            switch answer["status"]?.stringValue {
            case "completed": return answer
            case "failed", "cancelled", "x-unsettled":
                throw CommandFailure("a migration failed: \(answer["error-desc"]?.stringValue ?? "no reason is told")")
            default: break
            }
            try options.checkInterruption()
            do throws(QMPClientError) {
                try client.waitForEvent("MIGRATION", deadline: .after(milliseconds: 200))
            } catch {
                guard case .timedOut = error else { throw error }
            }
        }
        try vm.execute("migrate_cancel")
        let cancelled = Deadline.after(seconds: 10)
        while try vm.execute("query-migrate")["status"] != "cancelled", !cancelled.hasPassed {
            Clock.sleep(nanoseconds: 10_000_000)
        }
        return nil
    }

    /// Checks every page of the guest where it is now.
    func verify() throws {
        let result = try readySource().execute("x-check-guest", deadline: .after(seconds: 120))
        guard result["verified"] == true else {
            throw CommandFailure("after \(count) switchovers: \(result["summary"]?.stringValue ?? "\(result)")")
        }
    }
}
