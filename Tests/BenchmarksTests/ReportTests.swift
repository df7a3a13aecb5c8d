import CommandLineKit
import QMP
import Testing

@testable import Benchmarks

@Suite("reports of benchmarks")
struct ReportTests {
    private static let result = BenchmarkResult(
        bench: "tracking", runs: 3,
        cells: [
            BenchmarkCell([("method", "log"), ("rate", "100 MB/s")], [("total-ms", [3, 1, 2.5]), ("rounds", [4])]),
            BenchmarkCell([("method", "ring"), ("rate", "100 MB/s")], [("total-ms", [7]), ("rounds", [])]),
            // The same parameter at another place.
            BenchmarkCell([("size", "512 GiB"), ("method", "log")], [("gap-ms", [0.0312]), ("total-ms", [2])]),
        ],
        promises: [
            BenchmarkPromise("ring-vs-log", 1.02, limit: 1.05, better: .lower),
            BenchmarkPromise("merge-vs-bitwise", 12, limit: 30, better: .higher),
            BenchmarkPromise("start-gap-512g-ms", 3.25, limit: nil, better: .lower),
            BenchmarkPromise("never-measured", .nan, limit: 1, better: .lower),
        ], notes: ["a | b"])
    private static let report = BenchmarkReport(
        machine: MachineDescription(processor: "P", cores: 2, kernel: "6.18", memoryBytes: 16 << 30, load: 0.5),
        result: result)

    @Test("the JSON has the members that the design names, and what is not finite is null")
    func json() throws {
        let json = Self.report.json
        #expect(json["bench"] == "tracking" && json["runs"] == 3)
        for name in ["cpu", "cores", "kernel", "memory", "load"] { #expect(json["machine"]?[name] != nil, "\(name)") }
        let total = try #require(json["cells"]?[0]?["quantities"]?["total-ms"])
        #expect(total["median"]?.doubleValue == 2.5)
        #expect(total["minimum"]?.doubleValue == 1 && total["maximum"]?.doubleValue == 3)
        #expect(json["cells"]?[0]?["parameters"]?["method"] == "log")
        let promise = try #require(json["promises"]?[0])
        #expect(promise["name"] == "ring-vs-log" && promise["better"] == "lower" && promise["holds"] == true)
        #expect(promise["limit"]?.doubleValue == 1.05)
        #expect(json["promises"]?[2]?["limit"] == .null)
        #expect(json["promises"]?[3]?["value"] == .null && json["promises"]?[3]?["holds"] == false)
    }

    @Test("what was written as JSON and read back prints the same text, Markdown and picture")
    func roundTrip() throws {
        let text = Self.report.json.prettyDescription
        let back = try BenchmarkReport(try JSON(parsing: text.utf8))
        #expect(back.json == Self.report.json)
        #expect(back.machine == Self.report.machine)
        #expect(back.text() == Self.report.text())
        #expect(back.markdown == Self.report.markdown)
        #expect(back.figure.svg() == Self.report.figure.svg())
        #expect(!back.result.holds)
    }

    @Test(
        "what is no result is refused with a sentence",
        arguments: ["{}", "[]", "3", "{\"bench\": \"x\"}", "{\"bench\": 1, \"cells\": [], \"promises\": []}"])
    func noResult(text: String) throws {
        let json = try JSON(parsing: text.utf8)
        #expect(throws: CommandFailure.self) { try BenchmarkReport(json) }
    }

    @Test("the text shows a table for each shape of cell, and each promise with its mark")
    func text() {
        let lines = Self.report.text().split(separator: "\n")
        #expect(lines.contains { $0.hasPrefix("METHOD  RATE") && $0.hasSuffix("TOTAL-MS  ROUNDS") })
        #expect(lines.contains { $0.hasPrefix("log     100 MB/s") && $0.contains("2.50") })
        #expect(lines.contains { $0.hasPrefix("ring") && $0.hasSuffix("-") })
        #expect(lines.contains { $0.hasPrefix("✔ ring-vs-log ") && $0.hasSuffix("1.02  (at most 1.05)") })
        #expect(lines.contains { $0.hasPrefix("✘ merge-vs-bitwise ") && $0.hasSuffix("12  (at least 30)") })
        #expect(lines.contains { $0.hasPrefix("· start-gap-512g-ms ") && $0.hasSuffix("3.25") })
        #expect(lines.contains { $0.hasPrefix("✘ never-measured ") })
        #expect(lines.last == "note: a | b")
    }

    @Test("rows of a Markdown table have as many cells as its head")
    func markdown() {
        let rows = Self.report.markdown.split(separator: "\n").filter { $0.hasPrefix("|") }
        #expect(rows.contains("| method | rate | total-ms | rounds |"))
        #expect(rows.contains("| --- | --- | ---: | ---: |"))
        #expect(rows.contains("| `ring-vs-log` | 1.02 | at most 1.05 | ✔ |"))
        #expect(Set(rows.map { $0.count { $0 == "|" } }) == [5])
    }

    @Test("progress tells the step, how many there are, and how long the rest takes")
    func progress() {
        func line(_ step: Int, _ steps: Int, _ seconds: UInt64) -> String {
            BenchmarkProgress.line("x", step: step, of: steps, elapsedNanoseconds: seconds * 1_000_000_000)
        }
        #expect(line(1, 4, 0) == "[1/4] x")
        #expect(line(3, 4, 10) == "[3/4] x, about 10 s left")
        #expect(line(5, 4, 10) == "[5/5] x")
    }

    @Test("figures have three digits or more, and none where nothing was measured")
    func digits() {
        #expect(Digits.text(nil) == "-" && Digits.text(.nan) == "-" && Digits.text(0) == "0")
        #expect(Digits.text(12345.6) == "12346" && Digits.text(12.34) == "12.3" && Digits.text(0.01234) == "0.0123")
    }

    @Test("an interrupted benchmark goes no step further")
    func interruption() {
        let options = BenchmarkOptions(isInterrupted: { true })
        #expect(throws: CommandFailure("interrupted")) { try BenchmarkProgress(steps: 1, options).step("x") }
    }

    @Test("names of benchmarks and workers are unique, and can be written on a command line")
    func names() {
        let names = BenchmarkList.all.map { $0.name }
        #expect(Set(names).count == names.count)
        #expect(names.allSatisfy { $0.allSatisfy { $0.isLetter || $0 == "-" } && !$0.hasPrefix("-") })
        let workers = BenchmarkWorkerList.all.map { $0.name }
        #expect(Set(workers).count == workers.count)
    }
}
