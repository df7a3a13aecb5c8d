/// All benchmarks, in the order of `godwit bench --list`.
public enum BenchmarkList {
    public static let all: [any Benchmark.Type] = [
        BitmapBenchmark.self,
        TrackingBenchmark.self,
        MemslotsBenchmark.self,
        DowntimeBenchmark.self,
        TransportBenchmark.self,
        ForecastBenchmark.self,
        BigGuestsBenchmark.self,
        PostcopyBenchmark.self,
    ]
}
