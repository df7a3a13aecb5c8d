import CommandLineKit
import Host

/// `godwit bench postcopy`: how long a guest waits for a page when its memory follows it, beside the least that this host allows.
///
/// A guest touches pages of its memory, in no order and now and then, and times each itself, while all the rest comes at full speed. Each run
/// first measures the floor on the quiet host (`PageFloor`). Every run is a migration between two processes over loopback, verified page
/// by page. Then an idle guest is moved by postcopy and by precopy in turns.
public struct PostcopyBenchmark: Benchmark {
    public static let name = "postcopy"
    public static let abstract = "how long a guest waits for a page whose memory follows it, beside the least possible"

    public init() {}

    public func run(_ options: BenchmarkOptions) throws -> BenchmarkResult {
        do throws(SystemError) { _ = try UserFault.supportedFeatures() } catch {
            throw CommandFailure("postcopy cannot be measured here: \(error)")
        }
        let scale = options.isQuick ? PostcopyScale.quick(runs: options.runs) : .full(runs: options.runs)
        var session = PostcopySession(scale: scale, options: options)
        try session.measure()
        var notes = session.notes
        notes += [
            "guest: what the guest timed itself, of the slowest accesses as many as pages were fetched for somebody who waited; page: at the "
                + "destination, from the fault read to the page placed",
            "floor: 16 bytes there and 4 KiB back, and a fault that a page at hand ends, each alone on the quiet host and in the middle; "
                + "the ratios are the guest's",
            "published: the mean page request in the founding thread, before and with its series; other machines, a network, whole huge pages",
        ]
        #if DEBUG
            notes.append("This is a debug build: its figures mean nothing.")
        #endif
        return BenchmarkResult(
            bench: Self.name, runs: scale.runs, cells: session.resultCells, promises: session.promises, notes: notes)
    }
}

/// One run of the benchmark: what was measured so far.
struct PostcopySession {
    let scale: PostcopyScale
    let options: BenchmarkOptions
    private let progress: BenchmarkProgress
    private(set) var notes: [String] = []
    /// Runs that failed, told too little, or whose memory did not verify.
    var failures = 0
    /// In order of the repetitions; `nil`: that one failed.
    var samples: [PostcopyCell: [PostcopyMigration.Sample?]] = [:]
    /// Milliseconds of pairs that were both measured.
    var totals: [(postcopy: Double, precopy: Double)] = []

    static let idleName = "idle"

    init(scale: PostcopyScale, options: BenchmarkOptions) {
        self.scale = scale
        self.options = options
        let cells = scale.cells.count { options.wants(named: $0.name) }
        let isIdleWanted = options.wants(named: Self.idleName)
        progress = BenchmarkProgress(steps: scale.runs * (cells + (isIdleWanted ? 2 : 0)) + 1, options)
    }

    mutating func measure() throws {
        let folder = try PrivateFolder("bench")
        defer { folder.remove() }
        var cells = scale.cells.filter { options.wants(named: $0.name) }
        let pools = HugePagePools()
        defer { pools.giveBack() }
        cells.removeAll { cell in
            guard let obstacle = pools.obstacle(to: cell) else { return false }
            notes.append("\(cell.name) is not measured: \(obstacle)")
            return true
        }
        let isIdleWanted = options.wants(named: Self.idleName)
        let largest = max(cells.map(\.memoryMegabytes).max() ?? 0, isIdleWanted ? scale.idleMegabytes : 0)
        guard largest > 0 else { return }
        let warmMemory = try WarmMemory(byteCount: 2 * largest << 20)
        defer { warmMemory.end() }
        let migration = PostcopyMigration(
            options: options, warmMemory: warmMemory, keys: try PostcopyKeys(in: folder.path))
        // The first migration does not count: until then nothing was ever used.
        try progress.step("warm-up")
        _ = try? migration.totalTime(megabytes: min(largest, 1024), isPostcopy: false)
        for run in 0..<scale.runs {
            for index in cells.indices {
                let cell = cells[(index + run) % cells.count]
                try measure(cell, run: run, by: migration)
            }
            if isIdleWanted { try measureTotals(run: run, by: migration) }
        }
    }

    private mutating func measure(_ cell: PostcopyCell, run: Int, by migration: PostcopyMigration) throws {
        try progress.step("\(cell.name), run \(run + 1) of \(scale.runs)")
        do {
            samples[cell, default: []].append(try migration.measure(cell))
        } catch {
            // What was measured before, and what is still to come, is worth something without this run.
            try options.checkInterruption()
            samples[cell, default: []].append(nil)
            failures += 1
            notes.append("\(cell.name), run \(run + 1) failed: \(error)")
        }
    }

    /// Which of the two is first changes from run to run.
    private mutating func measureTotals(run: Int, by migration: PostcopyMigration) throws {
        var milliseconds: [Bool: Double] = [:]
        for isPostcopy in run % 2 == 0 ? [true, false] : [false, true] {
            let what = isPostcopy ? "postcopy" : "precopy"
            try progress.step("\(Self.idleName) by \(what), run \(run + 1) of \(scale.runs)")
            do {
                milliseconds[isPostcopy] = try migration.totalTime(
                    megabytes: scale.idleMegabytes, isPostcopy: isPostcopy)
            } catch {
                try options.checkInterruption()
                failures += 1
                notes.append("\(Self.idleName) by \(what), run \(run + 1) failed: \(error)")
            }
        }
        if let postcopy = milliseconds[true], let precopy = milliseconds[false] { totals.append((postcopy, precopy)) }
    }
}
