import CommandLineKit
import Host
import QMP

/// `godwit bench tracking`: the dirty ring against the dirty log, in live migrations of a guest that writes.
///
/// Every run is a migration between two processes over loopback, verified page by page at the destination. The methods are measured
/// side by side: each repetition goes through all of them, in an order that rotates. Beside the migrations: the last collection at
/// 1 GiB and 512 GiB (`CollectWorker`), the start of tracking (`StartGapWorker`), and limits to the dirty rate (`DirtyLimitRun`).
public struct TrackingBenchmark: Benchmark {
    public static let name = "tracking"
    public static let abstract = "live migrations with the dirty ring and the dirty log, Godwit's and QEMU's"

    public init() {}

    public func run(_ options: BenchmarkOptions) throws -> BenchmarkResult {
        let qemu = options.isQuick ? nil : QEMUVM.version()
        let scale =
            options.isQuick
            ? TrackingScale.quick(runs: options.runs) : .full(runs: options.runs, hasQEMU: qemu != nil)
        var session = TrackingSession(scale: scale, options: options)
        try session.measureMigrations()
        try session.measureCollect()
        try session.measureStart()
        try session.measureLimits()
        var notes = session.notes
        if options.only != nil { notes.append("with --only, promises whose cells were left out are not shown") }
        if options.isQuick {
            notes.append("QEMU and the ring of 4,096 entries are measured without --quick")
        } else {
            notes.append(
                qemu.map { "qemu is QEMU \($0)" } ?? "QEMU is not installed (\(QEMUVM.program)): its cells are left out"
            )
        }
        return BenchmarkResult(
            bench: Self.name, runs: scale.runs, cells: session.cells, promises: session.promises, notes: notes)
    }
}

/// One run of the benchmark: what was measured so far.
struct TrackingSession {
    let scale: TrackingScale
    let options: BenchmarkOptions
    private let progress: BenchmarkProgress
    private(set) var notes: [String] = []
    /// Migrations of Godwit that failed, or whose memory did not verify. What happens to QEMU is noted.
    private(set) var failures = 0
    /// Samples of the migrations by cell and quantity.
    var migrations: [TrackingCell: [String: [Double]]] = [:]
    /// Milliseconds of the last collection, and pages it found.
    var collections: [(cell: CollectCell, milliseconds: [Double], pages: [Double])] = []
    var starts: [(gibibytes: UInt64, method: TrackingMethod, before: [Double], gap: [Double], took: [Double])] = []
    var limits: [(limit: UInt64, rates: [Double])] = []
    /// What `auto` took: how often, by load and method.
    private var picks: [TrackingLoad: [String: Int]] = [:]

    static let quantities = [
        "total-ms", "downtime-ms", "rounds", "sent-mb", "tracking-cpu-ms", "source-cpu-ms", "source-vmm-cpu-ms",
        "rate-before-mbs", "rate-during-mbs",
    ]
    /// Guests of both sizes take turns.
    private static let collectTurns = 3
    private static let startMethods: [TrackingMethod] = [.log, .ring65536]

    init(scale: TrackingScale, options: BenchmarkOptions) {
        self.scale = scale
        self.options = options
        let migrations = scale.cells.filter { options.wants(named: $0.name) }.reduce(0) { $0 + scale.runs(of: $1) }
        let limits = DirtyLimitRun.limitsMegabytesPerSecond.count { options.wants(named: DirtyLimitRun.name($0)) }
        let starts = scale.gapMemoryGiB.flatMap { size in Self.startMethods.map { Self.startName(size, $0) } }
            .count { options.wants(named: $0) }
        let collections = scale.collectCells.count { options.wants(named: $0.name) } * Self.collectTurns
        progress = BenchmarkProgress(
            steps: migrations + (migrations > 0 ? 1 : 0) + limits + starts + collections, options)
    }

    static func startName(_ gibibytes: UInt64, _ method: TrackingMethod) -> String {
        "start-gap \(gibibytes) GiB \(method.rawValue)"
    }

    // MARK: Migrations

    mutating func measureMigrations() throws {
        let wanted = scale.cells.filter { options.wants(named: $0.name) }
        guard let first = wanted.first else { return }
        // Memory that was never used by anybody is slow at its first touch: the first migration does not count.
        try progress.step("warm-up")
        _ = try TrackedMigration(cell: first, scale: scale, options: options).measure()
        var loads: [TrackingLoad] = []
        for cell in wanted where !loads.contains(cell.load) { loads.append(cell.load) }
        for run in 0..<scale.runs {
            for (place, load) in loads.enumerated() {
                let cells = wanted.filter { $0.load == load && run < scale.runs(of: $0) }
                for index in cells.indices { try measure(cells[(index + run + place) % cells.count], run: run) }
            }
        }
        for (load, methods) in picks.sorted(by: {
            TrackingLoad.all.firstIndex(of: $0.key)! < TrackingLoad.all.firstIndex(of: $1.key)!
        }) {
            let words = methods.sorted { $0.key < $1.key }.map { "\($0.key) \($0.value) times" }
            notes.append("auto at \(load.rate) \(load.order) took: \(words.joined(separator: ", "))")
        }
    }

    private mutating func measure(_ cell: TrackingCell, run: Int) throws {
        try progress.step("\(cell.name), run \(run + 1) of \(scale.runs(of: cell))")
        do {
            let (sample, method) = try TrackedMigration(cell: cell, scale: scale, options: options).measure()
            for (name, value) in sample { migrations[cell, default: [:]][name, default: []].append(value) }
            if cell.method == .auto, let method { picks[cell.load, default: [:]][method, default: 0] += 1 }
        } catch let error as MigrationTookTooLong where cell.vmm == .qemu {
            notes.append(error.description)
        } catch {
            // What was measured before, and what is still to come, is worth something without this run.
            try options.checkInterruption()
            if cell.vmm == .godwit { failures += 1 }
            notes.append("\(cell.name), run \(run + 1) failed: \(error)")
        }
    }

    // MARK: Tracking itself

    mutating func measureCollect() throws {
        let cells = scale.collectCells.filter { options.wants(named: $0.name) }
        collections = cells.map { ($0, [], []) }
        for _ in 0..<Self.collectTurns {
            for (index, cell) in cells.enumerated() {
                try progress.step(cell.name)
                let samples = (scale.collectSamples + Self.collectTurns - 1) / Self.collectTurns
                let answer = try CollectWorker.ask(
                    [
                        "memory": JSON(cell.gibibytes << 30), "guest": "dirty,working-set=64M,fill=none,random",
                        "ring": JSON(cell.method == .log ? 0 : 65536), "samples": JSON(samples),
                    ], options: options)
                try Self.requireVerified(answer, cell.name)
                collections[index].milliseconds += Self.numbers(answer["nanoseconds"]).map { $0 / 1e6 }
                collections[index].pages += Self.numbers(answer["pages"])
            }
        }
    }

    mutating func measureStart() throws {
        for size in scale.gapMemoryGiB {
            for method in Self.startMethods where options.wants(named: Self.startName(size, method)) {
                try progress.step(Self.startName(size, method))
                // A guest of 1 GiB cannot touch all that the larger ones touch.
                let touched = min(scale.gapTouchedMegabytes, (size << 10) - 64)
                let answer = try StartGapWorker.ask(
                    [
                        "memory": JSON(size << 30),
                        "guest": .string("dirty,fill=none,working-set=\(touched)M,heartbeat=1ms"),
                        "ring": method == .log ? 0 : 65536, "rounds": JSON(scale.gapRounds),
                        "stretch-ms": JSON(scale.gapStretchMilliseconds),
                    ], options: options)
                try Self.requireVerified(answer, Self.startName(size, method))
                starts.append(
                    (
                        size, method, Self.numbers(answer["before-ms"]), Self.numbers(answer["gap-ms"]),
                        Self.numbers(answer["start-ms"])
                    ))
            }
        }
    }

    mutating func measureLimits() throws {
        do {
            limits = try DirtyLimitRun(scale: scale, options: options, progress: progress).measure()
        } catch let error as DirtyLimitRun.Unavailable {
            notes.append(error.description)
            limits = DirtyLimitRun.limitsMegabytesPerSecond.map { ($0, []) }
        }
    }

    private static func requireVerified(_ answer: JSON, _ name: String) throws(CommandFailure) {
        guard answer["verified"] == true else { throw CommandFailure("\(name): the guest's memory does not verify") }
    }

    private static func numbers(_ json: JSON?) -> [Double] { (json?.arrayValue ?? []).compactMap(\.doubleValue) }
}
