import CommandLineKit
import Host
import KVM
import QMP

/// Changes of the memory layout while all vCPUs spin inside and outside of what changes: what a PC's firmware does, in three ways.
struct MemslotsBenchmark: Benchmark {
    static let name = "memslots"
    static let abstract = "Changes of the memory layout under running vCPUs: naive, with all paused, and atomic."

    private static let cpuCounts = [1, 2, 4, 8, 16, 24, 32]
    private static let fewCPUCounts = [1, 4, 32]

    func run(_ options: BenchmarkOptions) throws -> BenchmarkResult {
        var session = MemslotsSession(options)
        try session.measure(options.isQuick ? Self.fewCPUCounts : Self.cpuCounts)
        return session.result
    }
}

/// One run of the benchmark: what was asked of workers, and what they answered.
private struct MemslotsSession {
    private let options: BenchmarkOptions
    private let runs: Int
    private var cells: [BenchmarkCell] = []
    private var notes: [String] = []
    private var ratios: [Double] = []
    /// Of the strategy `atomic`, over all cells.
    private var failures: UInt64 = 0
    private var lost: UInt64 = 0
    private var isComplete = true

    init(_ options: BenchmarkOptions) {
        self.options = options
        runs = options.runs ?? (options.isQuick ? 10 : 100)
    }

    mutating func measure(_ cpuCounts: [Int]) throws {
        let pairs = options.isQuick ? 2 : 5
        let progress = BenchmarkProgress(steps: cpuCounts.count * 3 + pairs * 2 + 1, options)
        for cpuCount in cpuCounts {
            for strategy in SlotStrategy.allCases { try measure(strategy, cpuCount, progress) }
        }
        try measureOutside(pairs, progress)
        try measureStress(progress)
    }

    private mutating func measure(_ strategy: SlotStrategy, _ cpuCount: Int, _ progress: BenchmarkProgress) throws {
        let parameters = Self.parameters(strategy, cpuCount, "firmware")
        guard options.wants(BenchmarkCell(parameters)) else { return isComplete = false }
        try progress.step("\(strategy.rawValue), \(cpuCount) vCPUs")
        let run = MemslotsRun(
            strategy: strategy, cpuCount: cpuCount, areAllOutside: false, timedRuns: runs,
            trackedRuns: max(1, runs / 10), timeLimitSeconds: options.isQuick ? 2 : 40)
        let answer = try MemslotsWorker.ask(run.arguments, options: options, deadline: .after(seconds: 300))
        cells.append(BenchmarkCell(parameters, Self.quantities(answer)))
        account(for: answer, strategy, "\(cpuCount) vCPUs")
    }

    /// One vCPU and 32, by turns: what the host does besides hits both.
    private mutating func measureOutside(_ pairs: Int, _ progress: BenchmarkProgress) throws {
        var samples: [Int: [Double]] = [:]
        for _ in 0..<pairs {
            var medians: [Double] = []
            for cpuCount in [1, 32] {
                guard options.wants(BenchmarkCell(Self.parameters(.atomic, cpuCount, "firmware, all outside"))) else {
                    isComplete = false
                    continue
                }
                try progress.step("atomic, \(cpuCount) vCPUs that stay outside")
                let run = MemslotsRun(
                    strategy: .atomic, cpuCount: cpuCount, areAllOutside: true, timedRuns: max(10, runs / pairs),
                    trackedRuns: 1, timeLimitSeconds: options.isQuick ? 3 : 20)
                let answer = try MemslotsWorker.ask(run.arguments, options: options, deadline: .after(seconds: 200))
                let times = Self.numbers(answer, "commit-ms")
                samples[cpuCount, default: []] += times
                medians += [times.median ?? .nan]
                account(for: answer, .atomic, "\(cpuCount) vCPUs outside")
            }
            if medians.count == 2 { ratios.append(medians[1] / medians[0]) }
        }
        for (cpuCount, times) in samples.sorted(by: { $0.key < $1.key }) {
            cells.append(
                BenchmarkCell(Self.parameters(.atomic, cpuCount, "firmware, all outside"), [("commit-ms", times)]))
        }
    }

    private mutating func measureStress(_ progress: BenchmarkProgress) throws {
        let changes = options.isQuick ? 1000 : 10_000
        let parameters = Self.parameters(.atomic, 4, "\(changes) random changes")
        guard options.wants(BenchmarkCell(parameters)) else { return isComplete = false }
        try progress.step("\(changes) random changes")
        let answer = try MemslotsStressWorker.ask(
            ["changes": JSON(changes), "cpus": 4, "seed": 1], options: options, deadline: .after(seconds: 600))
        cells.append(BenchmarkCell(parameters, Self.quantities(answer)))
        account(for: answer, .atomic, "random changes")
    }

    // MARK: What came of it

    private static func parameters(
        _ strategy: SlotStrategy, _ cpuCount: Int, _ sequence: String
    ) -> [(name: String, value: String)] {
        [("strategy", strategy.rawValue), ("vcpus", "\(cpuCount)"), ("sequence", sequence)]
    }

    private static func numbers(_ answer: JSON, _ name: String) -> [Double] {
        (answer[name]?.arrayValue ?? []).compactMap(\.doubleValue)
    }

    /// What was not told counts as a failure.
    private static func count(_ answer: JSON, _ name: String) -> UInt64 {
        answer[name]?.integerValue(as: UInt64.self) ?? 1
    }

    private static func quantities(_ answer: JSON) -> [(name: String, samples: [Double])] {
        let lists = ["sequence-ms", "commit-ms", "longest-commit-ms", "tracked-commit-ms", "outside-gap-ms"].map {
            (name: $0, samples: numbers(answer, $0))
        }
        let single = [
            ("rounds-inside", "rounds"), ("guest-failures", "failures"), ("pauses", "pauses"),
            ("lost-pages", "lost-pages"), ("lost-writes", "lost-writes"),
        ].map { (name: $0.0, samples: [answer[$0.1]?.doubleValue ?? .nan]) }
        return (lists + single).filter { !$0.samples.isEmpty }
    }

    private mutating func account(for answer: JSON, _ strategy: SlotStrategy, _ what: String) {
        let isTimed = answer["sequence-ms"]?.arrayValue?.isEmpty == false
        if isTimed, answer["first"] == false, !notes.contains(Self.priorityNote) { notes.append(Self.priorityNote) }
        guard strategy == .atomic else { return }
        failures += Self.count(answer, "failures")
        lost += Self.count(answer, "lost-pages") + Self.count(answer, "lost-writes")
        for name in ["first-failure", "first-lost-page"] {
            if let text = answer[name]?.stringValue { notes.append("\(what), \(name): \(text)") }
        }
    }

    private static let priorityNote =
        "The committing thread could not be put before the vCPUs (SCHED_FIFO needs root): with more vCPUs than processors "
        + "times tell more of the host's scheduler than of commits."

    var result: BenchmarkResult {
        var promises: [BenchmarkPromise] = []
        if let ratio = ratios.median { promises.append(.init("commit-32-vs-1", ratio, limit: 2, better: .lower)) }
        if !cells.isEmpty {
            promises.append(.init("guest-failures", Double(failures), limit: 0, better: .lower))
            promises.append(.init("lost-pages", Double(lost), limit: 0, better: .lower))
        }
        var notes = notes
        notes += [
            "Published figures of the thread of 2022 for the boot of a PC, at 1, 2, 4, 8, 16, 24 vCPUs: ioctl 2.1, 2.5, 2.2, 2.4, 3.6, "
                + "12.5 ms; pause and resume 2.2, 3.0, 3.1, 3.4, 12, 20 ms. Another machine, with a processor for each vCPU.",
            "A sequence is 37 commits. Every second vCPU spins inside of what changes, in rounds over all its places; its failures are wrong data, wrong "
                + "code, faults and failed entries. Gaps of vCPUs outside hold the time in which others had their processor.",
        ]
        if !isComplete { notes.append("Not all cells were measured.") }
        return BenchmarkResult(
            bench: MemslotsBenchmark.name, runs: runs, cells: cells, promises: promises, notes: notes)
    }
}
