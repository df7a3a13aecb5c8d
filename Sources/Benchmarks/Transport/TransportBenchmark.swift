import CommandLineKit
import Host
import Transport

/// What one channel carries over loopback, in plaintext and through TLS, beside programs that do nothing else.
///
/// Each run measures all four, one after the other: a plain channel, `iperf3` with one stream and writes of 1 MiB, a TLS channel, and a
/// bare loop of SSL_write and SSL_read with records of 16 KiB from one buffer. The channels send pages of 64 MiB of memory, in vectors
/// of 256 that are not joined, and receive the same way, straight into pages.
public struct TransportBenchmark: Benchmark {
    public static let name = "transport"
    public static let abstract = "one channel beside iperf3, and through TLS beside bare OpenSSL: GB/s"

    public init() {}

    public func run(_ options: BenchmarkOptions) throws -> BenchmarkResult {
        let runs = max(1, options.runs ?? (options.isQuick ? 5 : 11))
        let byteCount = options.isQuick ? 1 << 30 : 4 << 30
        let folder = try PrivateFolder("bench")
        defer { folder.remove() }
        let pages = try GuestPages()
        let stream = Iperf.isInstalled ? Iperf(folder: folder.path) : nil
        let tls = try ChannelStream.keys(in: folder.path)
        var plain = Pair("plain", of: "channel", beside: stream == nil ? "write-read" : "iperf3")
        var secure = Pair("TLS", of: "channel", beside: "openssl")
        for number in 0..<runs {
            options.progress("run \(number + 1) of \(runs)")
            if plain.isWanted(options) {
                try options.checkInterruption()
                let own = try ChannelStream.measure(pages, byteCount: byteCount, tls: nil)
                try options.checkInterruption()
                let other = try stream?.measure(byteCount: byteCount) ?? BareStream.measure(byteCount: byteCount)
                plain.note(own, other)
            }
            if secure.isWanted(options) {
                try options.checkInterruption()
                let own = try ChannelStream.measure(pages, byteCount: byteCount / 2, tls: tls)
                try options.checkInterruption()
                secure.note(own, try RecordStream.measure(byteCount: byteCount / 2))
            }
        }
        var notes = ["Ratios are those of each run, side by side; promises are their medians."]
        if stream == nil {
            notes.append("iperf3 is not installed: its place has a loop of write(2) and read(2) with 1 MiB.")
        }
        #if DEBUG
            notes.append("This is a debug build: its figures mean nothing.")
        #endif
        return BenchmarkResult(
            bench: Self.name, runs: runs, cells: [plain, secure].filter { $0.isWanted(options) }.flatMap(\.cells),
            promises: [
                BenchmarkPromise("channel-vs-iperf3", plain.ratios.median ?? .nan, limit: 0.9, better: .higher),
                BenchmarkPromise("tls-vs-openssl", secure.ratios.median ?? .nan, limit: 0.9, better: .higher),
            ], notes: notes)
    }

    /// A channel, and what it is held against.
    private struct Pair {
        let name: String
        let own: String
        let other: String
        private var samples: (own: [StreamRate], other: [StreamRate]) = ([], [])

        init(_ name: String, of own: String, beside other: String) {
            self.name = name
            self.own = own
            self.other = other
        }

        func isWanted(_ options: BenchmarkOptions) -> Bool { options.only.map { name.contains($0) } ?? true }

        mutating func note(_ own: StreamRate, _ other: StreamRate) {
            samples.own.append(own)
            samples.other.append(other)
        }

        var ratios: [Double] { zip(samples.own, samples.other).map { $0.gigabytesPerSecond / $1.gigabytesPerSecond } }

        var cells: [BenchmarkCell] {
            [(own, samples.own), (other, samples.other)].map { name, rates in
                var quantities = [(name: "gb-per-s", samples: rates.map(\.gigabytesPerSecond))]
                let processor = rates.compactMap(\.cpuSecondsPerGigabyte)
                if processor.count == rates.count { quantities.append((name: "cpu-s-per-gb", samples: processor)) }
                return BenchmarkCell([("stream", self.name), ("by", name)], quantities)
            }
        }
    }
}

/// How fast bytes went from one thread or process to another.
struct StreamRate: Sendable {
    var gigabytesPerSecond: Double
    /// Of both ends; `nil` where it was not measured.
    var cpuSecondsPerGigabyte: Double?

    /// Times a transfer by two threads of this process.
    static func measuring(_ byteCount: Int, _ body: () throws -> Void) rethrows -> StreamRate {
        let processor = Clock.processCPUNanoseconds
        let start = Clock.monotonicNanoseconds
        try body()
        let bytes = Double(byteCount)
        return StreamRate(
            gigabytesPerSecond: bytes / Double(Clock.monotonicNanoseconds - start),
            cpuSecondsPerGigabyte: Double(Clock.processCPUNanoseconds - processor) / bytes)
    }
}
