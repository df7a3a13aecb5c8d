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
