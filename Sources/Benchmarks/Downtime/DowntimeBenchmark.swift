import CommandLineKit
import Host

/// `godwit bench downtime`: is the downtime limit kept by every switchover that was committed?
///
/// A guest that writes moves from process to process, through a proxy that stalls at random in both directions. The guest's own clock
/// measures how long it stood still. Told beside it, and excusing nothing: how late the host woke a control thread and a control guest,
/// and how long the vCPU at the destination was ready to run and had no processor.
public struct DowntimeBenchmark: Benchmark {
    public static let name = "downtime"
    public static let abstract = "switchovers through a network that stalls: is the downtime limit kept?"

    private static let limitsMilliseconds: [UInt64] = [5, 20, 100]
    private static let fullRuns = 334
    private static let quickRuns = 20
    /// Pages are checked that often, in switchovers.
    private static let checkEvery = 50

    public init() {}

    public func run(_ options: BenchmarkOptions) throws -> BenchmarkResult {
        let runs = options.runs ?? (options.isQuick ? Self.quickRuns : Self.fullRuns)
        let limits = Self.limitsMilliseconds.filter { options.wants(named: Self.name(ofLimit: $0)) }
        let progress = BenchmarkProgress(steps: max(1, runs * limits.count), options)
        let seed = UInt64.random(in: 0...UInt64.max)
        let chain = try SwitchoverChain(options: options, seed: seed)
        defer { chain.end() }
        var samples: [UInt64: [SwitchoverSample]] = [:]
        var unfinished = 0
        measuring: for run in 0..<runs {
            for limit in limits {
                do {
                    try progress.step("\(Self.name(ofLimit: limit)), switchover \(run + 1) of \(runs)")
                    if let sample = try chain.measure(limitMilliseconds: limit) {
                        samples[limit, default: []].append(sample)
                    } else {
                        unfinished += 1
                    }
                } catch {
                    // What was measured until the user asked for the end is worth telling.
                    guard options.isInterrupted(), !samples.isEmpty else { throw error }
                    break measuring
                }
            }
            if run % Self.checkEvery == Self.checkEvery - 1 { try chain.verify() }
        }
        try chain.verify()
        return Self.result(samples, of: limits, runs: runs, unfinished: unfinished, seed: seed)
    }

    private static func name(ofLimit milliseconds: UInt64) -> String { "limit \(milliseconds) ms" }

    static func result(
        _ samples: [UInt64: [SwitchoverSample]], of limits: [UInt64], runs: Int, unfinished: Int, seed: UInt64
    ) -> BenchmarkResult {
        // A limit at which nothing was committed is no limit that was kept.
        let isMeasured = limits.allSatisfy { samples[$0]?.isEmpty == false }
        let all = samples.values.flatMap { $0 }
        let broken = all.reduce(0) { $0 + $1.broken }
        let cells = samples.sorted { $0.key < $1.key }.map { limit, samples in
            BenchmarkCell(
                [("what", name(ofLimit: limit))],
                [
                    ("gap-ms", samples.filter { !$0.isUndecided }.map(\.gap)),
                    ("reported-ms", samples.map(\.reported)),
                    ("unseen-before-ms", samples.compactMap(\.unseen?.before)),
                    ("unseen-after-ms", samples.compactMap(\.unseen?.after)),
                    ("control-ms", samples.map(\.control)), ("control-guest-ms", samples.map(\.controlGuest)),
                    ("vcpu-waited-ms", samples.map(\.waited)),
                    ("later-gap-ms", samples.map(\.standstill.laterMilliseconds)),
                    ("broken-off", samples.map { Double($0.broken) }),
                    ("longest-broken-ms", samples.filter { $0.broken > 0 }.map(\.longestBroken)),
                    ("stolen-ms", samples.compactMap(\.stolen)),
                    ("total-ms", samples.map(\.total)), ("stalls", samples.map { Double($0.stalls) }),
                ])
        }
        let calm = all.map(\.controlGuest).min() ?? 0
        let promises = [
            BenchmarkPromise(
                "contract-violations", isMeasured ? Double(all.count(where: \.isViolation)) : .nan, limit: 0,
                better: .lower),
            BenchmarkPromise(
                "switchovers-undecided", Double(all.count(where: \.isUndecided)), limit: nil, better: .lower),
            BenchmarkPromise(
                "violations-beyond-the-host", Double(all.count { $0.isBeyondHost(calm: calm) }), limit: nil,
                better: .lower),
            BenchmarkPromise("switchovers-committed", Double(all.count), limit: nil, better: .higher),
            BenchmarkPromise("switchovers-broken-off", Double(broken), limit: nil, better: .lower),
        ]
        var notes = [
            "\(all.count) switchovers were committed, \(broken) broken off and resumed; the seed of the stalls was \(seed)",
            "a violation is a gap of more than the limit and 5 ms; those beyond the host are so by more than it kept the control thread, "
                + "the control guest or the vCPU waiting meanwhile",
        ]
        if all.contains(where: \.isUndecided) {
            notes.append(
                "an undecided switchover may have been a violation: so many gaps came behind it that the guest no longer told it from "
                    + "them")
        }
        for sample in all.filter({ $0.isViolation || $0.isUndecided }).sorted(by: {
            $0.gap - $0.limit > $1.gap - $1.limit
        }).prefix(10) {
            notes.append(sample.account)
        }
        if unfinished > 0 { notes.append("\(unfinished) migrations were not completed within 60 s and cancelled") }
        return BenchmarkResult(bench: name, runs: runs, cells: cells, promises: promises, notes: notes)
    }
}
