import GuestMemory
import Host

/// What it costs to merge a memory slot's dirty log into a client's record, from a guest of 1 GiB to one of 8 TiB.
///
/// Each run of a cell measures all loops side by side on the same words, the best of three passes of each: the merge with log and block aligned alike, the merge with both
/// at alignments of their own, a loop that tests and sets bit by bit, and, as the floor, a plain OR of one array into another.
/// Records have been merged into before, as in all rounds of a migration but the first; `fresh-ms` is the first, page faults and all.
public struct BitmapBenchmark: Benchmark {
    public static let name = "bitmap"
    public static let abstract = "merging dirty logs into records: GiB of guest per second, at any alignment"

    public init() {}

    /// A merge whose result is not what the bits say.
    public struct WrongResult: Error, CustomStringConvertible {
        public let description: String
    }

    /// How the log's bits are dirty.
    enum Density: String, CaseIterable {
        case half = "50 %"
        case hundredth = "1 %"
        case empty = "0 %"
    }

    private static let sizes: [(name: String, gibibytes: UInt64)] = [
        ("1 GiB", 1), ("256 GiB", 256), ("512 GiB", 512), ("8 TiB", 8192),
    ]

    public func run(_ options: BenchmarkOptions) throws -> BenchmarkResult {
        let runs = max(1, options.runs ?? (options.isQuick ? 5 : 11))
        var cells: [BenchmarkCell] = []
        for size in Self.sizes {
            for density in Density.allCases {
                let name = "\(size.name) \(density.rawValue)"
                if let only = options.only, !name.contains(only) { continue }
                if options.isQuick && !Self.isInQuick(size.gibibytes, density) { continue }
                options.progress("merging the log of \(size.name), \(density.rawValue) dirty")
                var trial = try BitmapTrial(gibibytes: size.gibibytes, density: density)
                for _ in 0..<runs { trial.run() }
                try trial.verify()
                cells += trial.cells(size: size.name, density: density.rawValue)
            }
        }
        var notes = [
            "Ratios of promises are those of the worst cell: the median of its runs, loops side by side.",
            "The bit-by-bit loops go over at most 16 GiB of guest; their time is multiplied up to the cell's size.",
            "scan-ms is a cleverer such loop, which skips words of zeros and goes from one set bit to the next.",
            "count-ms is what the first question for the number of dirty pages costs after a merge.",
        ]
        #if DEBUG
            notes.append("This is a debug build: its figures mean nothing.")
        #endif
        return BenchmarkResult(
            bench: Self.name, runs: runs, cells: cells, promises: Self.promises(cells), notes: notes)
    }

    private static func isInQuick(_ gibibytes: UInt64, _ density: Density) -> Bool {
        gibibytes == 1 || gibibytes == 512 || gibibytes == 8192 && density == .half
    }

    private static func promises(_ cells: [BenchmarkCell]) -> [BenchmarkPromise] {
        func worst(_ quantity: String, _ alignment: String) -> Double {
            let found = cells.filter { $0.parameters.contains { $0.name == "alignment" && $0.value == alignment } }
            return found.compactMap { $0.median(quantity) }.min() ?? .nan
        }
        return [
            BenchmarkPromise("merge-vs-bitwise", worst("vs-bitwise", "aligned"), limit: 30, better: .higher),
            BenchmarkPromise("unaligned-vs-bitwise", worst("vs-bitwise", "unaligned"), limit: 20, better: .higher),
            BenchmarkPromise("merge-vs-bandwidth", worst("vs-bandwidth", "aligned"), limit: 0.5, better: .higher),
            BenchmarkPromise("unaligned-vs-bandwidth", worst("vs-bandwidth", "unaligned"), limit: nil, better: .higher),
        ]
    }
}
