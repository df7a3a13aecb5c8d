import QMP
import Testing

@testable import CommandLineKit

@Suite("what pages took that a moved guest asked for is shown")
struct LatencyReadingTests {
    private static let dist: JSON = [0, 0, 0, 0, 2, 900, 97, 0, 1]
    private static let told: JSON = ["count": 1000, "p50": 41_000, "p90": 63_000, "p99": 130_000, "max": 300_500]

    private static func reading(_ members: [String: JSON]) -> MigrationReading {
        var all: [String: JSON] = [
            "status": "postcopy-active",
            "ram": ["total": 8_192_000, "remaining": 4_096_000, "dirty-sync-count": 2, "postcopy-requests": 1000],
        ]
        all.merge(members) { $1 }
        return MigrationReading(.object(all))
    }

    @Test("the destination's figures count, the source's where it is all there is, and none before the first page")
    func places() throws {
        let there = ["x-postcopy-latency-ns": Self.told, "postcopy-latency-dist": Self.dist]
        let here: [String: JSON] = ["x-postcopy-service-ns": ["count": 1, "p50": 1, "p90": 1, "p99": 1, "max": 2]]
        let both = try #require(Self.reading(there.merging(here) { $1 }).pageLatency)
        #expect(both.place == .destination && both.count == 1000 && both.octaves.count == 9)
        #expect(Self.reading(here).pageLatency?.place == .source)
        #expect(Self.reading([:]).pageLatency == nil)
        #expect(Self.reading(["x-postcopy-latency-ns": ["count": 0]]).pageLatency == nil)
        // What is missing is not nothing.
        #expect(Self.reading(["x-postcopy-latency-ns": ["count": 3, "p50": 1, "p90": 1, "max": 1]]).pageLatency == nil)
    }

    @Test("the live line of a guest that moved tells pages left, requests and what they take")
    func line() {
        var progress = MigrationProgress()
        let figures = progress.take(Self.reading(["x-postcopy-latency-ns": Self.told]), at: 0)
        #expect(
            LiveLine().text(figures).hasSuffix(
                "   1000 pages left   1000 requested   p50 41 us, p99 130 us, max 301 us"))
    }

    @Test("the report draws the histogram from the first octave that has something to the last, to scale")
    func histogram() {
        let reading = Self.reading(["x-postcopy-latency-ns": Self.told, "postcopy-latency-dist": Self.dist])
        let lines = MigrationReport(reading).latencyText.split(separator: "\n")
        #expect(lines.first == "page latency: 1000 pages, p50 41 us, p90 63 us, p99 130 us, max 301 us")
        #expect(lines.count == 6)
        #expect(lines[2].contains("32 us to  64 us  900  ") && lines[2].count { $0 == "█" } == MigrationReport.barWidth)
        #expect(lines[1].contains("16 us to  32 us    2") && !lines[1].contains("█"))
        #expect(lines[4].hasSuffix("128 us to 256 us    0"))
        #expect(lines[5].contains("256 us to 512 us    1"))
        #expect(MigrationReport(reading).text.hasSuffix(MigrationReport(reading).latencyText))
        #expect(MigrationReport(Self.reading([:])).latencyText.isEmpty)
    }
}
