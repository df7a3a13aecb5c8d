import CommandLineKit
import Host
import Transport

/// What one channel carries over loopback, in plaintext and through TLS, beside programs that do nothing else; what digests cost it; and how
/// well it keeps to a limit.
///
/// Each run measures all of them, one after the other: a plain channel and `iperf3` with one stream and writes of 1 MiB; a TLS channel
/// and a bare loop of SSL_write and SSL_read with records of 16 KiB. The channels send pages in vectors of 256 that are not joined, and
/// receive the same way, straight into pages. What they are held against sends one buffer that stays in the processor's cache; so
/// for the promises the channels' pages are few enough for that, too. A cell of its own has more than fits there.
///
/// Digests and pacing are measured over what a migration does with pages (`RoundTrial`): 64 MiB of them, round after round.
public struct TransportBenchmark: Benchmark {
    public static let name = "transport"
    public static let abstract = "one channel beside iperf3, and through TLS beside bare OpenSSL: GB/s"

    public init() {}

    private static let cachedMebibytes = 2
    private static let coldMebibytes = 64

    public func run(_ options: BenchmarkOptions) throws -> BenchmarkResult {
        let runs = max(1, options.runs ?? (options.isQuick ? 5 : 11))
        let byteCount = options.isQuick ? 1 << 30 : 4 << 30
        let folder = try PrivateFolder("bench")
        defer { folder.remove() }
        let pages = try [Self.cachedMebibytes, Self.coldMebibytes].map { try GuestPages(mebibytes: $0) }
        let iperf = Iperf.isInstalled ? Iperf(folder: folder.path) : nil
        let tls = try ChannelStream.keys(in: folder.path)
        var plain = Comparison("plain", beside: iperf == nil ? "write-read" : "iperf3")
        var secure = Comparison("TLS", beside: "openssl")
        var verified = VerifiedRounds()
        var pacing = PacedRounds()
        let trial = try TrialMemory(pages[1])
        for number in 0..<runs {
            options.progress("run \(number + 1) of \(runs)")
            try plain.measure(
                options, pages, channel: { try ChannelStream.measure($0, byteCount: byteCount, tls: nil) },
                other: { try iperf?.measure(byteCount: byteCount) ?? BareStream.measure(byteCount: byteCount) })
            try secure.measure(
                options, pages, channel: { try ChannelStream.measure($0, byteCount: byteCount / 2, tls: tls) },
                other: { try RecordStream.measure(byteCount: byteCount / 2) })
            try verified.measure(options, trial, byteCount: byteCount)
            if number < PacedRounds.runs(options) { try pacing.measure(options, trial) }
        }
        var notes = ["Ratios are those of each run, side by side; promises are their medians."]
        if iperf == nil {
            notes.append("iperf3 is not installed: its place has a loop of write(2) and read(2) with 1 MiB.")
        }
        #if DEBUG
            notes.append("This is a debug build: its figures mean nothing.")
        #endif
        return BenchmarkResult(
            bench: Self.name, runs: runs, cells: plain.cells + secure.cells + verified.cells + pacing.cells,
            promises: [
                BenchmarkPromise("channel-vs-iperf3", plain.ratio(of: 0), limit: 0.9, better: .higher),
                BenchmarkPromise("tls-vs-openssl", secure.ratio(of: 0), limit: 0.9, better: .higher),
                BenchmarkPromise("verify-overhead", verified.overhead, limit: 0.1, better: .lower),
                BenchmarkPromise("pacing-error", pacing.error, limit: 0.05, better: .lower),
                BenchmarkPromise("channel-64m-vs-iperf3", plain.ratio(of: 1), limit: nil, better: .higher),
                BenchmarkPromise("tls-64m-vs-openssl", secure.ratio(of: 1), limit: nil, better: .higher),
                BenchmarkPromise("verify-cpu-overhead", verified.processorOverhead, limit: nil, better: .lower),
                BenchmarkPromise("pacing-excess", pacing.excess, limit: nil, better: .lower),
                BenchmarkPromise("pacing-burst-ms", pacing.burstMilliseconds, limit: nil, better: .lower),
            ], notes: notes)
    }

    /// A channel over little memory and over much, and what it is held against.
    private struct Comparison {
        let name: String
        let other: String
        private var channels: [[StreamRate]] = [[], []]
        private var others: [StreamRate] = []

        init(_ name: String, beside other: String) {
            self.name = name
            self.other = other
        }

        mutating func measure(
            _ options: BenchmarkOptions, _ pages: [GuestPages], channel: (GuestPages) throws -> StreamRate,
            other: () throws -> StreamRate
        ) throws {
            if let only = options.only, !name.contains(only) { return }
            for index in channels.indices {
                try options.checkInterruption()
                channels[index].append(try channel(pages[index]))
            }
            try options.checkInterruption()
            others.append(try other())
        }

        func ratio(of index: Int) -> Double {
            zip(channels[index], others).map { $0.gigabytesPerSecond / $1.gigabytesPerSecond }.median ?? .nan
        }

        var cells: [BenchmarkCell] {
            guard !others.isEmpty else { return [] }
            let names = ["channel, \(cachedMebibytes) MiB", "channel, \(coldMebibytes) MiB", other]
            return zip(names, channels + [others]).map { name, rates in
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
