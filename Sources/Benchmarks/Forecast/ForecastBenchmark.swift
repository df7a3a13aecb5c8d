import CommandLineKit
import Migration

/// Whether a dry run is right: its verdict and its times against a migration that then takes place.
///
/// First of forty made-up guests, page by page on a clock of their own (`SimulatedMigration`), and of twice forty more whose seeds nothing was tuned
/// with; then of a few real guests over a paced link.
public struct ForecastBenchmark: Benchmark {
    public static let name = "forecast"
    public static let abstract = "dry runs: verdict and total time against the migration that follows"

    public init() {}

    private static let sets = [
        ("judged", UInt64(1000)), ("checking", UInt64(770_000)), ("further", UInt64(31_400_000)),
    ]

    public func run(_ options: BenchmarkOptions) throws -> BenchmarkResult {
        var sets: [ForecastSet] = []
        var cells: [BenchmarkCell] = []
        for (name, seed) in Self.sets where options.wants(named: "simulated \(name)") {
            var set = ForecastSet(name, firstSeed: seed)
            for kind in SimulatedLoad.Kind.allCases {
                try options.checkInterruption()
                options.progress("\(name) seeds: \(kind.rawValue) guests, simulated")
                set.add(kind)
            }
            sets.append(set)
            cells += set.cells.map { cell in
                BenchmarkCell([("guests", "simulated \(name)")] + cell.parameters, cell.quantities)
            }
        }
        cells += try RealForecast.cells(options)
        return BenchmarkResult(
            bench: Self.name, runs: options.runs ?? 1, cells: cells, promises: Self.promises(sets),
            notes: Self.notes(sets))
    }

    private static func promises(_ sets: [ForecastSet]) -> [BenchmarkPromise] {
        var promises: [BenchmarkPromise] = []
        for (index, set) in sets.enumerated() {
            let isJudged = index == 0 && set.name == Self.sets[0].0
            let suffix = isJudged ? "" : "-\(set.name)"
            promises.append(
                BenchmarkPromise(
                    "verdict-right\(suffix)", Double(set.right), limit: isJudged ? 38 : nil, better: .higher))
            promises.append(
                BenchmarkPromise(
                    "total-error\(suffix)", set.worst, limit: isJudged ? 0.25 : nil, better: .lower))
            promises.append(
                BenchmarkPromise(
                    "total-within-25-percent\(suffix)",
                    Double(set.errors.count { $0 <= 0.25 }) / Double(max(1, set.errors.count)), limit: nil,
                    better: .higher))
        }
        return promises
    }

    private static func notes(_ sets: [ForecastSet]) -> [String] {
        var notes = [
            "right counts verdicts as the migration bore them out; total-error is the part by which the total time was off, of those "
                + "guests that converged as predicted, and its promise is the worst of them.",
            "A simulated migration that takes longer than \(Int(SimulatedMigration.horizonSeconds)) s does not converge.",
            "Phases of simulated guests last 0.15 to 0.7 s and saw teeth 0.2 to 1 s: what is slower than the 2 s of watching, no dry "
                + "run can see.",
        ]
        for set in sets {
            for trial in set.trials where !trial.isRight || (trial.totalError ?? 0) > 0.25 {
                notes.append(
                    "\(set.name), \(trial.kind.rawValue), seed \(trial.seed): predicted "
                        + "\(word(trial.predicted.converges, trial.predicted.seconds)), truly "
                        + "\(word(trial.truth.converges, trial.truth.seconds))")
            }
        }
        return notes
    }

    private static func word(_ converges: Bool, _ seconds: Double) -> String {
        converges ? "\(Amount.decimal(seconds, digits: 2)) s" : "no end"
    }
}
