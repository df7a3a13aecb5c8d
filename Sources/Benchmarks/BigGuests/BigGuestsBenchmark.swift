import CommandLineKit
import Host

/// `godwit bench big-guests`: the guests with which the size of memory was a problem once, 256 GiB with 20 vCPUs and 512 GiB with 40, of
/// which 5.1 GB are not zero.
///
/// Every run is a migration between two processes over loopback, verified page by page at the destination. Beside Godwit's stand QEMU's
/// on this machine and what was published. That the cost follows what a guest touched and not what it has is a ratio: the
/// same bytes in 4 and in 512 GiB.
public struct BigGuestsBenchmark: Benchmark {
    public static let name = "big-guests"
    public static let abstract = "guests of 256 and 512 GiB with 20 and 40 vCPUs, beside QEMU's and published figures"

    public init() {}

    public func run(_ options: BenchmarkOptions) throws -> BenchmarkResult {
        let qemu = options.isQuick ? nil : QEMUVM.version()
        let scale =
            options.isQuick
            ? BigGuestScale.quick(runs: options.runs) : .full(runs: options.runs, hasQEMU: qemu != nil)
        var session = BigGuestSession(scale: scale, options: options)
        try session.measure()
        var notes = session.notes
        notes.append(
            "published: with the patches of that thread, on machines with a processor for each vCPU and a network")
        if options.isQuick {
            notes.append("QEMU, 256 GiB and 5.1 GB that are not zero are measured without --quick")
        } else {
            notes.append(qemu.map { "qemu is QEMU \($0)" } ?? "QEMU is not installed (\(QEMUVM.program)): no row of it")
        }
        return BenchmarkResult(
            bench: Self.name, runs: scale.runs, cells: session.resultCells, promises: session.promises, notes: notes)
    }
}

/// One run of the benchmark: what was measured so far.
struct BigGuestSession {
    let scale: BigGuestScale
    let options: BenchmarkOptions
    private let wanted: [BigGuestCell]
    private let progress: BenchmarkProgress
    private(set) var notes: [String] = []
    /// Godwit's runs that failed, or whose memory did not verify.
    private(set) var failures = 0
    var samples: [BigGuestCell: [BigGuestMigration.Sample]] = [:]

    /// How long Godwit may take for one migration.
    private static let godwitSeconds: UInt64 = 120

    init(scale: BigGuestScale, options: BenchmarkOptions) {
        self.scale = scale
        self.options = options
        wanted = scale.cells.filter { options.wants(named: $0.name) }
        progress = BenchmarkProgress(steps: wanted.reduce(1) { $0 + scale.runs(of: $1) }, options)
    }

    mutating func measure() throws {
        let available = HostMemory.availableByteCount
        for cell in wanted where cell.neededBytes > available {
            notes.append(
                "\(cell.name) is not measured: both ends take \(Amount.memory(cell.neededBytes)) of this host, and "
                    + "\(Amount.memory(available)) are free")
        }
        let wanted = wanted.filter { $0.neededBytes <= available }
        let warmMemory = try WarmMemory(byteCount: 2 * (wanted.map(\.filledBytes).max() ?? 0))
        defer { warmMemory.end() }
        // The first migration does not count: until then nothing was ever used.
        let own = wanted.filter { $0.vmm == .godwit }
        if let largest = own.max(by: { $0.filledBytes < $1.filledBytes }) {
            try progress.step("warm-up")
            _ = try migration(of: largest, warmMemory).measure()
        }
        var hopeless: Set<BigGuestCell> = []
        for run in 0..<max(scale.runs, scale.qemuRuns) {
            let cells = wanted.filter { run < scale.runs(of: $0) && !hopeless.contains($0) }
            for index in cells.indices {
                let cell = cells[(index + run) % cells.count]
                if try !measure(cell, run: run, warmMemory) { hopeless.insert(cell) }
            }
        }
    }

    private func migration(of cell: BigGuestCell, _ warmMemory: WarmMemory) -> BigGuestMigration {
        BigGuestMigration(
            cell: cell, options: options, warmMemory: warmMemory,
            seconds: cell.vmm == .qemu ? scale.qemuSeconds : Self.godwitSeconds)
    }

    /// - Returns: whether it is worth trying again.
    private mutating func measure(_ cell: BigGuestCell, run: Int, _ warmMemory: WarmMemory) throws -> Bool {
        try progress.step("\(cell.name), run \(run + 1) of \(scale.runs(of: cell))")
        do {
            samples[cell, default: []].append(try migration(of: cell, warmMemory).measure())
            return true
        } catch let error as MigrationTookTooLong where cell.vmm == .qemu {
            notes.append("\(cell.name): total > \(error.seconds) s, given up")
            return false
        } catch {
            // What was measured before, and what is still to come, is worth something without this run.
            try options.checkInterruption()
            if cell.vmm == .godwit { failures += 1 }
            notes.append("\(cell.name), run \(run + 1) failed: \(error)")
            return cell.vmm == .godwit
        }
    }
}
