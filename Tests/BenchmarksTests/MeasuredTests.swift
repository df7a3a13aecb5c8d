import CommandLineKit
import QMP
import Testing

@testable import Benchmarks

@Suite("what a measured migration tells")
struct MeasuredTests {
    private static let told: [String: JSON] = [
        "status": "completed", "setup-time": 3, "total-time": 120, "downtime": 2, "x-downtime-ns": 2_345_678,
        "ram": ["transferred": 5000, "dirty-sync-count": 4],
    ]

    private static func figures(without name: String? = nil, _ more: String? = nil) throws -> MigrationFigures {
        let members = told.filter { $0.key != name && $0.key != more }
        return try MigrationFigures(MigrationReading(.object(members)), of: "this one")
    }

    @Test("figures are taken as they are told, the downtime in fractions where there are any")
    func complete() throws {
        let figures = try Self.figures()
        #expect(figures.setupMilliseconds == 3 && figures.totalMilliseconds == 120)
        #expect(figures.downtimeMilliseconds == 2.345678)
        #expect(figures.transferredBytes == 5000 && figures.rounds == 4)
        #expect(try Self.figures(without: "x-downtime-ns").downtimeMilliseconds == 2)
    }

    @Test(
        "a migration that does not tell a figure has failed, and not taken no time",
        arguments: ["setup-time", "total-time", "ram"])
    func missing(_ name: String) {
        let error = #expect(throws: CommandFailure.self) { try Self.figures(without: name) }
        #expect(error.map { "\($0)" } == "this one: query-migrate does not tell \(name)")
    }

    @Test("a downtime that is told in no unit is missing")
    func downtime() {
        #expect(throws: CommandFailure.self) { try Self.figures(without: "downtime", "x-downtime-ns") }
    }
}
