import Benchmarks
import Testing

@Suite("transport benchmark")
struct TransportBenchmarkTests {
    @Test("both channels are measured beside what they are held against")
    func cells() throws {
        let result = try TransportBenchmark().run(BenchmarkOptions(isQuick: true, runs: 1))
        #expect(result.bench == "transport" && result.cells.count == 9)
        #expect(result.cells.allSatisfy { ($0.median("gb-per-s") ?? 0) > 0.01 })
        #expect(
            result.promises.map(\.name) == [
                "channel-vs-iperf3", "tls-vs-openssl", "verify-overhead", "channel-64m-vs-iperf3", "tls-64m-vs-openssl",
            ])
        #expect(result.promises.allSatisfy { ($0.value > 0 || $0.name == "verify-overhead") && $0.value.isFinite })
    }
}
