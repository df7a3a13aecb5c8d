import Migration

/// A guest and its migration, page by page, on a clock of their own: the truth that a forecast is compared with.
///
/// Each write and each page sent is carried out. A page is watched afresh just before its chunk of 64 MiB is sent; the rounds are decided on
/// by the same `SwitchoverPolicy` that a real migration asks. It shares nothing else with the model.
struct SimulatedMigration {
    private var load: SimulatedLoad
    private var clock = 0.0
    /// Written since it was last watched.
    private var written: [Bool]

    static let bytesPerPage = 4096.0 + 8
    static let bytesPerZeroPage = 9.0
    static let overheadSeconds = 0.005
    static let drainSeconds = 0.001
    static let collectSeconds = 0.0005
    static let horizonSeconds = 120.0
    static let chunkPages = 1 << 14
    private static let batchPages = 16

    init(_ load: SimulatedLoad) {
        self.load = load
        written = [Bool](repeating: false, count: load.pages)
    }

    struct Result {
        var converges: Bool
        var seconds: Double
        var downtimeSeconds: Double
        var rounds: Int
    }

    private mutating func run(seconds: Double) {
        var left = seconds
        while left > 0 {
            let step = min(left, 0.001)
            load.run(from: clock, seconds: step) { written[$0] = true }
            clock += step
            left -= step
        }
    }

    /// What a dry run sees: its intervals, one after the other.
    mutating func observe(_ intervals: [Double]) -> DirtyObservation {
        var observation = DirtyObservation(allocatedPages: Double(load.pages))
        var marks = [UInt8](repeating: 0, count: load.pages)
        for index in written.indices { written[index] = false }
        for seconds in intervals {
            run(seconds: seconds)
            observation.beginInterval(seconds: seconds)
            for page in written.indices where written[page] {
                observation.count(&marks[page])
                observation.count(pages: 1, inChunk: page / Self.chunkPages)
                written[page] = false
            }
        }
        return observation
    }

    /// Migrates until the guest is stopped, or the horizon is reached.
    mutating func migrate() -> Result {
        let began = clock
        var policy = SwitchoverPolicy(downtimeLimitNanoseconds: load.downtimeLimitMilliseconds * 1_000_000)
        var marked = [Bool](repeating: true, count: load.pages)
        var rounds = 0
        _ = policy.decide(remainingPages: UInt64(load.pages))
        while clock - began < Self.horizonSeconds {
            policy.sent(send(&marked, isFirst: rounds == 0))
            rounds += 1
            run(seconds: Self.collectSeconds)
            var remaining = collect(&marked)
            guard policy.decide(remainingPages: remaining) == .switchOver else { continue }
            run(seconds: Self.drainSeconds)
            remaining = collect(&marked)
            guard policy.decide(remainingPages: remaining) == .switchOver else { continue }
            let downtime =
                Double(remaining) * Self.bytesPerPage / linkBytesPerSecond + Self.overheadSeconds
            return Result(
                converges: true, seconds: clock - began + downtime, downtimeSeconds: downtime, rounds: rounds)
        }
        return Result(converges: false, seconds: clock - began, downtimeSeconds: 0, rounds: rounds)
    }

    var linkBytesPerSecond: Double { load.linkPagesPerSecond * Self.bytesPerPage }

    private mutating func collect(_ marked: inout [Bool]) -> UInt64 {
        var count: UInt64 = 0
        for page in written.indices {
            if written[page] { marked[page] = true }
            if marked[page] { count += 1 }
        }
        return count
    }

    private mutating func send(_ marked: inout [Bool], isFirst: Bool) -> RoundReport {
        let before = clock
        var (pages, bytes, pending) = (UInt64(0), 0.0, 0.0)
        var batch = 0
        for page in marked.indices {
            if page % Self.chunkPages == 0 { watch(page, marked) }
            guard marked[page] else { continue }
            marked[page] = false
            pages += 1
            pending += isFirst && page >= load.pages - load.zeroPages ? Self.bytesPerZeroPage : Self.bytesPerPage
            batch += 1
            if batch == Self.batchPages {
                bytes += pending
                run(seconds: pending / linkBytesPerSecond)
                (pending, batch) = (0, 0)
            }
        }
        bytes += pending
        run(seconds: pending / linkBytesPerSecond)
        return RoundReport(
            pages: pages, bytes: UInt64(bytes), nanoseconds: UInt64(max(1, (clock - before) * 1e9)))
    }

    /// From here on writes to what is about to be sent count again.
    private mutating func watch(_ first: Int, _ marked: [Bool]) {
        for page in first..<min(first + Self.chunkPages, marked.count) where marked[page] { written[page] = false }
    }
}
