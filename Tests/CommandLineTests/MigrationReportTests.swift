import QMP
import Testing

@testable import CommandLineKit

@Suite("A migration is reported as QEMU does, and its downtime part by part")
struct MigrationReportTests {
    private let completed: JSON = [
        "status": "completed", "total-time": 1234, "downtime": 12, "setup-time": 3, "x-handover": "two-phase",
        "x-downtime-ns": 12_000_500,
        "x-downtime-parts": [
            ["name": "stop", "nanoseconds": 1_000_000], ["name": "collect", "nanoseconds": 8_000_000],
            ["name": "start", "nanoseconds": 3_000_500],
        ],
        "ram": [
            "transferred": 2_097_152, "remaining": 0, "total": 268_435_456, "duplicate": 3, "normal": 512,
            "mbps": 8053.5,
            "dirty-sync-count": 5, "page-size": 4096, "pages-per-second": 100, "x-hole": 251,
            "precopy-bytes": 2_000_000,
            "downtime-bytes": 97_152,
        ],
    ]

    @Test("the fields are those of info migrate")
    func fields() {
        let lines = MigrationReport(MigrationReading(completed)).text.split(separator: "\n")
        for line in [
            "Migration status: completed", "total time: 1234 ms", "downtime: 12 ms", "setup: 3 ms",
            "transferred ram: 2048 kbytes", "throughput: 13.60 mbps", "remaining ram: 0 kbytes",
            "total ram: 262144 kbytes", "duplicate: 3 pages", "normal: 512 pages", "normal bytes: 2048 kbytes",
            "dirty sync count: 5", "page size: 4 kbytes", "never touched: 251 pages", "handover: two-phase",
        ] {
            #expect(lines.contains(Substring(line)))
        }
    }

    @Test("switchovers that were broken off are told, with the longest standstill")
    func broken() {
        guard case .object(var members) = completed else { return }
        members["x-broken-switchovers"] = ["count": 3, "longest-ns": 20_001_000, "attempts": []]
        let text = MigrationReport(MigrationReading(.object(members))).text
        #expect(text.contains("broken switchovers: 3 (longest 20.001 ms)\n"))
        #expect(!MigrationReport(MigrationReading(completed)).text.contains("broken"))
    }

    @Test("the parts of the downtime add up to it, and bars are as long as their share")
    func parts() {
        let lines = MigrationReport(MigrationReading(completed)).downtimeText.split(separator: "\n")
        #expect(lines[0] == "downtime 12.001 ms:")
        #expect(lines.count == 4)
        let times = lines.dropFirst().compactMap { Double($0.split(separator: " ")[1]) }
        #expect(abs(times.reduce(0, +) - 12.001) < 0.002)
        let collect = lines[2].count { $0 == "█" }
        #expect(collect == MigrationReport.barWidth * 8 / 12)
    }

    @Test("what is in no part has a line of its own")
    func rest() {
        guard case .object(var members) = completed else { return }
        members["x-downtime-ns"] = 15_000_500
        let text = MigrationReport(MigrationReading(.object(members))).downtimeText
        #expect(text.contains("downtime 15.001 ms"))
        #expect(text.contains("other         3.000 ms"))
    }

    @Test("bars are measured in eighths", arguments: [(0, ""), (100, "████████████████████████████████"), (1, "▍")])
    func bars(percent: UInt64, bar: String) {
        #expect(MigrationReport.bar(part: percent, of: 100) == bar)
    }

    @Test("no migration, one that failed, and an answer that is none are reports, too")
    func others() {
        #expect(MigrationReport(MigrationReading([:])).text == "Migration status: none\n")
        #expect(MigrationReport(MigrationReading(.null)).text == "Migration status: none\n")
        let failed = MigrationReport(MigrationReading(["status": "failed", "error-desc": "connection refused"])).text
        #expect(failed == "Migration status: failed\nerror: connection refused\n")
        let negative: JSON = ["status": "active", "ram": ["total": -5, "remaining": "many", "mbps": .string("?")]]
        #expect(MigrationReading(negative).totalBytes == 0)
    }

    @Test("only a completed migration is a success; the others say what became of the guest")
    func completion() throws {
        try MigrationReading(completed).requireCompletion(of: "web", to: "tcp:a:1")
        for (status, words) in [
            ("cancelled", "the guest is here as before"), ("failed", "no space"), ("x-unsettled", "--settle"),
        ] {
            let reading = MigrationReading(["status": .string(status), "error-desc": "no space"])
            let error = #expect(throws: CommandFailure.self) {
                try reading.requireCompletion(of: "web", to: "tcp:a:1")
            }
            #expect(error?.description.contains(words) == true)
            #expect(error?.description.hasPrefix("migration of web to tcp:a:1") == true)
        }
    }
}
