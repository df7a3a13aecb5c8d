import QMP
import Testing

@testable import CommandLineKit

@Suite("A migration is shown while it goes on")
struct MigrationDisplayTests {
    /// An answer to `query-migrate` in the middle of a migration.
    static func reading(
        _ status: String = "active", round: Int = 1, transferred: Int, remaining: Int, dirtyPages: Int = 0,
        expectedDowntime: Int? = nil
    ) -> MigrationReading {
        var json: [String: JSON] = [
            "status": .string(status),
            "ram": [
                "total": 1_073_741_824, "remaining": JSON(remaining), "transferred": JSON(transferred),
                "dirty-sync-count": JSON(round), "dirty-pages-rate": JSON(dirtyPages), "page-size": 4096,
            ],
        ]
        if let expectedDowntime { json["expected-downtime"] = JSON(expectedDowntime) }
        return MigrationReading(.object(json))
    }

    @Test("rate, dirty rate, percent and time left follow from two readings")
    func figures() {
        var progress = MigrationProgress()
        _ = progress.take(Self.reading(transferred: 0, remaining: 1_000_000_000), at: 0)
        let figures = progress.take(
            Self.reading(round: 2, transferred: 250_000_000, remaining: 750_000_000, dirtyPages: 61035), at: 250_000_000
        )
        #expect(figures.round == 2)
        #expect(figures.percent == 25)
        #expect(figures.bytesPerSecond == 1e9)
        #expect(figures.dirtyBytesPerSecond == 61035 * 4096)
        // 750 MB at 1 GB/s less 250 MB/s.
        #expect((999_000_000...1_001_000_000).contains(figures.nanosecondsLeft ?? 0))
    }

    @Test("the rate is that of the last half second, not of all")
    func window() {
        var progress = MigrationProgress()
        var figures = progress.take(Self.reading(transferred: 0, remaining: 1), at: 0)
        for step in 1...20 {
            // 100 MB in each tenth of a second, then nothing more.
            let sent = min(step, 10) * 100_000_000
            figures = progress.take(Self.reading(transferred: sent, remaining: 1), at: UInt64(step) * 100_000_000)
            if step == 10 { #expect(figures.bytesPerSecond == 1e9) }
        }
        #expect(figures.bytesPerSecond == 0)
        #expect(figures.nanosecondsLeft == nil)
    }

    @Test("a guest that writes faster than is sent does not converge, and the line says so")
    func divergence() {
        var progress = MigrationProgress()
        _ = progress.take(Self.reading(transferred: 0, remaining: 1000), at: 0)
        let figures = progress.take(
            Self.reading(transferred: 1_000_000, remaining: 1000, dirtyPages: 1000), at: 1_000_000_000)
        #expect(figures.nanosecondsLeft == nil)
        #expect(LiveLine().text(figures).hasSuffix("not converging"))
    }

    private let example = MigrationProgress.Figures(
        status: "active", round: 3, percent: 97.24, bytesPerSecond: 1.84e9, dirtyBytesPerSecond: 4.12e8,
        expectedDowntimeNanoseconds: 12_000_000, nanosecondsLeft: 800_000_000)

    @Test("the line has round, percent, rate, dirty rate, downtime and time left")
    func line() {
        #expect(
            LiveLine().text(example) == "round 3   97.2%   1.84 GB/s   dirty 412 MB/s   downtime ~12 ms   left ~800 ms")
    }

    @Test("a narrow terminal gets whole fields, never more columns than it has", arguments: 1...90)
    func narrow(width: Int) {
        let whole = LiveLine().text(example)
        let text = LiveLine().text(example, width: width)
        #expect(text.count <= max(width, "round 3".count))
        #expect(whole.hasPrefix(text))
        #expect(text == whole || whole.dropFirst(text.count).hasPrefix("   "))
    }

    @Test("colours do not change the words")
    func colors() {
        let colored = LiveLine(showsColors: true).text(example)
        #expect(colored != LiveLine().text(example))
        #expect(
            colored.replacing("\u{1B}[1m", with: "").replacing("\u{1B}[0m", with: "") == LiveLine().text(example))
    }

    @Test("before the first round the line is the status")
    func beforeFirstRound() {
        var progress = MigrationProgress()
        let figures = progress.take(MigrationReading(["status": "setup"]), at: 5)
        #expect(LiveLine().text(figures) == "setup")
    }

    private func verdict(_ state: String, _ sentence: String, left: Int? = nil) -> VerdictReading? {
        var json: [String: JSON] = ["state": .string(state), "sentence": .string(sentence)]
        if let left { json["expected-end-ms"] = JSON(left) }
        return VerdictReading(.object(json))
    }

    @Test("the line ends in the VM's own verdict: time left, or why there is no end; short where there is no room")
    func verdicts() {
        var figures = example
        figures.verdict = verdict("converging", "converging: ...", left: 3200)
        figures.throttlePercentage = 30
        #expect(LiveLine().text(figures).hasSuffix("throttled 30%   left ~3.2 s"))
        figures.verdict = verdict("not-converging", "not converging: the guest dirties 612 MB/s; raise the limit")
        #expect(LiveLine().text(figures).hasSuffix("   not converging: the guest dirties 612 MB/s; raise the limit"))
        #expect(LiveLine().text(figures, width: 100).hasSuffix("throttled 30%   not converging"))
        figures.verdict = verdict("observing", "observing how the guest writes")
        figures.nanosecondsLeft = nil
        #expect(LiveLine().text(figures).hasSuffix("observing"))
        #expect(VerdictReading(["state": "nonsense", "sentence": ""]) == nil)
    }

    @Test("a dry run is told in words, with what was assumed")
    func dryRun() {
        let reading = DryRunReading([
            "state": "converging", "converging": true,
            "sentence": "converging: about 8.2 s to go, downtime about 24 ms",
            "expected-total-ms": 8200, "expected-downtime-ms": 24, "rounds": 6, "observed-ms": 2050, "collects": 56,
            "allocated-bytes": JSON(1 << 30), "zero-bytes": JSON(1 << 28), "observed-dirty-rate": 212_000_000,
            "link-rate": 500_000_000, "link-source": "max-bandwidth", "pages-found": 41_200, "cpu-us": 12_000,
            "downtime-limit-ms": 300,
        ])
        let text = reading.text(of: "web")
        #expect(reading.converges)
        for line in [
            "dry run of web: watched for 2.05 s, nothing was moved", "memory to send: 1 GiB, 256 MiB of it zeroes",
            "guest dirties: 212 MB/s of distinct pages", "link: 500 MB/s, taken from the parameter max-bandwidth",
            "verdict: converging: about 8.2 s to go, downtime about 24 ms", "total time: about 8.2 s in 6 rounds",
            "downtime: about 24 ms, the limit is 300 ms",
            "cost: 41200 pages were watched afresh in 56 collects, 12 ms of CPU time",
        ] {
            #expect(text.contains(line + "\n"), "\(line) is not in \(text)")
        }
        #expect(!DryRunReading(["state": "not-converging", "sentence": "no"]).converges)
    }

    private final class Lines {
        var written: [String] = []
    }

    @Test("away from a terminal there is a line each second and for each status, without escape codes")
    func plainLines() {
        let lines = Lines()
        var display = MigrationDisplay(
            isLive: false, line: LiveLine(), width: { 79 }, write: { lines.written.append($0) })
        for step in 0...50 {
            let status = step == 50 ? "completed" : "active"
            display.show(
                Self.reading(status, transferred: step * 1000, remaining: 100_000 - step * 2000),
                at: 7_000_000_000 + UInt64(step) * 50_000_000)
        }
        display.finish()
        // At 0, 1 and 2 s, and when the status changed.
        #expect(lines.written.count == 4)
        #expect(lines.written.allSatisfy { $0.hasSuffix("\n") && !$0.contains("\u{1B}") && !$0.contains("\r") })
        #expect(lines.written.last?.contains("completed") == true)
    }

    @Test("on a terminal each reading replaces the line, and nothing of it stays")
    func liveLine() {
        let lines = Lines()
        var display = MigrationDisplay(
            isLive: true, line: LiveLine(), width: { 40 }, write: { lines.written.append($0) })
        for step in 0..<5 {
            display.show(Self.reading(transferred: step, remaining: 10 - step), at: UInt64(step) * 50_000_000)
        }
        #expect(lines.written.count == 5)
        #expect(lines.written.allSatisfy { $0.hasPrefix(LiveLine.removal) && !$0.contains("\n") })
        display.note("cancelling")
        #expect(lines.written.last == LiveLine.removal + "cancelling\n")
        display.finish()
        #expect(lines.written.last == LiveLine.removal)
    }
}
