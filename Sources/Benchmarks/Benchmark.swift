//! The Benchmarks room: the project's own benchmarks, each of which ends in promises that hold or do not.
//!
//! `godwit bench NAME` runs one. A `Benchmark` measures cells and returns a `BenchmarkResult`: every cell with its parameters, and the
//! promises of SPECIFICATION.md by name. One folder or file per benchmark; `BenchmarkReport+JSON` and `+Text` print,
//! `Plot/` draws. What must be measured in a process of its own is a `BenchmarkWorker`.

/// One benchmark of `godwit bench`.
public protocol Benchmark: Sendable {
    /// As on the command line: `bitmap`.
    static var name: String { get }
    /// One line for `godwit bench --list`.
    static var abstract: String { get }
    init()
    /// The charts of `--plot`; `nil`: bars of the first quantity.
    static func figure(of result: BenchmarkResult) -> Figure?
    /// Measures. - Throws: what kept it from measuring, as a sentence; a promise that does not hold is a result.
    func run(_ options: BenchmarkOptions) throws -> BenchmarkResult
}

extension Benchmark {
    public static func figure(of result: BenchmarkResult) -> Figure? { nil }
}

/// What the command line asks for.
public struct BenchmarkOptions: Sendable {
    /// Under a minute: fewer cells, the same promises.
    public var isQuick: Bool
    /// Runs of each cell; `nil`: what the benchmark finds right. Medians are over these.
    public var runs: Int?
    /// Only cells whose name contains this.
    public var only: String?
    /// Told what is measured now, for people who wait.
    public var progress: @Sendable (String) -> Void
    /// Whether the user asked for the end: to be looked at between runs, at least once a second.
    public var isInterrupted: @Sendable () -> Bool

    public init(
        isQuick: Bool = false, runs: Int? = nil, only: String? = nil,
        progress: @escaping @Sendable (String) -> Void = { _ in },
        isInterrupted: @escaping @Sendable () -> Bool = { false }
    ) {
        self.isQuick = isQuick
        self.runs = runs
        self.only = only
        self.progress = progress
        self.isInterrupted = isInterrupted
    }
}

/// What a benchmark found.
public struct BenchmarkResult: Sendable {
    public var bench: String
    public var runs: Int
    public var cells: [BenchmarkCell]
    public var promises: [BenchmarkPromise]
    /// Sentences for the reader: what was not measured, and why.
    public var notes: [String]

    public init(
        bench: String, runs: Int, cells: [BenchmarkCell], promises: [BenchmarkPromise], notes: [String] = []
    ) {
        self.bench = bench
        self.runs = runs
        self.cells = cells
        self.promises = promises
        self.notes = notes
    }

    public var holds: Bool { promises.allSatisfy(\.holds) }
}

/// One measured cell: its parameters, and for each quantity the samples of all runs.
public struct BenchmarkCell: Sendable {
    /// In the order in which tables show them: ("size", "1 GiB").
    public var parameters: [(name: String, value: String)]
    /// Quantities by name with unit: ("total-ms", [512.0, 498.1]).
    public var quantities: [(name: String, samples: [Double])]

    public init(
        _ parameters: [(name: String, value: String)], _ quantities: [(name: String, samples: [Double])] = []
    ) {
        self.parameters = parameters
        self.quantities = quantities
    }

    /// The median of a quantity; `nil` where it was not measured.
    public func median(_ name: String) -> Double? {
        quantities.first { $0.name == name }.flatMap { $0.samples.median }
    }
}

/// A promise of SPECIFICATION.md, and whether it holds.
public struct BenchmarkPromise: Sendable {
    public enum Better: String, Sendable { case lower, higher }
    public var name: String
    public var value: Double
    /// `nil`: a figure that is told and promises nothing.
    public var limit: Double?
    public var better: Better

    public init(_ name: String, _ value: Double, limit: Double?, better: Better) {
        self.name = name
        self.value = value
        self.limit = limit
        self.better = better
    }

    public var holds: Bool {
        guard let limit else { return true }
        guard !value.isNaN else { return false }
        return better == .lower ? value <= limit : value >= limit
    }
}

extension [Double] {
    /// The middle one; of an even number the mean of the two in the middle. `nil` of none.
    public var median: Double? {
        guard !isEmpty else { return nil }
        let sorted = sorted()
        let half = count / 2
        return count % 2 == 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2
    }
}
