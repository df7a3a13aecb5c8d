import Testing

@testable import Benchmarks

@Suite("transport benchmark")
struct TransportBenchmarkTests {
    @Test(
        "both channels are measured beside what they are held against, digests beside none, and limits beside what was sent"
    )
    func cells() throws {
        let result = try TransportBenchmark().run(BenchmarkOptions(isQuick: true, runs: 1))
        #expect(result.bench == "transport" && result.cells.count == 12)
        for cell in result.cells {
            let isPaced = cell.name.hasPrefix("pacing")
            #expect((cell.median(isPaced ? "most-in-10-ms" : "gb-per-s") ?? 0) > 0.01, "\(cell.name)")
        }
        #expect(
            result.promises.map(\.name) == [
                "channel-vs-iperf3", "tls-vs-openssl", "verify-overhead", "pacing-error", "channel-64m-vs-iperf3",
                "tls-64m-vs-openssl", "verify-cpu-overhead", "pacing-excess", "pacing-burst-ms",
            ])
        // What digests cost may be less than what the machine's other work does to a single run.
        #expect(
            result.promises.allSatisfy {
                ($0.value > 0 || ["verify-overhead", "verify-cpu-overhead", "pacing-excess"].contains($0.name))
                    && $0.value.isFinite
            })
    }

    private static let second: UInt64 = 1_000_000_000

    /// A write of a millisecond's worth every millisecond, for four seconds; `change` may do otherwise.
    private func writes(_ change: (UInt64) -> (delay: UInt64, bytes: UInt64)? = { _ in (0, 1000) }) -> PacedWrites {
        var writes = PacedWrites(bytesPerSecond: 1_000_000)
        for number in 0..<4000 as Range<UInt64> {
            if let write = change(number) {
                writes.list.append((at: Self.second + number * 1_000_000 + write.delay, bytes: write.bytes))
            }
        }
        return writes
    }

    @Test("the worst second is found wherever it begins, too fast or too slow, but not in the first")
    func worstSecond() {
        func error(_ writes: PacedWrites) -> Double { writes.worstError(window: Self.second, after: Self.second) }
        #expect(error(writes()) < 0.002)
        // A tenth of a second in which nothing goes out, and one in which twice as much does.
        let gap = error(writes { (2450..<2550).contains($0) ? nil : (0, 1000) })
        #expect(abs(gap - 0.1) < 0.003, "\(gap)")
        let burst = error(writes { (0, (1700..<1800).contains($0) ? 2000 : 1000) })
        #expect(abs(burst - 0.1) < 0.003, "\(burst)")
        let gapExcess = writes { (2450..<2550).contains($0) ? nil : (0, 1000) }
            .worstExcess(window: Self.second, after: Self.second)
        #expect(abs(gapExcess) < 0.002, "\(gapExcess)")
        #expect(error(writes { (0, $0 < 990 ? 5000 : 1000) }) < 0.002)
        #expect(error(PacedWrites(bytesPerSecond: 1)).isNaN)
    }

    @Test("a burst is told as time at the rate")
    func bursts() {
        let even = writes().mostMilliseconds(in: 10_000_000, after: Self.second)
        #expect(abs(even - 10) < 1.1, "\(even)")
        let burst = writes { (0, $0 == 2000 ? 20_000 : 1000) }.mostMilliseconds(in: 10_000_000, after: Self.second)
        #expect(abs(burst - 29) < 1.1, "\(burst)")
    }
}
