import Glibc
import Host
import QMP
import TestSupport
import Testing

@Suite("godwit bench", .serialized)
struct BenchCommandTests {
    private let bench: Workbench

    init() throws { bench = try Workbench() }

    private func saved(value: Double) throws -> String {
        let path = "\(bench.folder)/result.json"
        let json: JSON = [
            "bench": "tracking", "runs": 5, "machine": ["cpu": "P", "cores": 2],
            "cells": [
                [
                    "columns": ["method"], "parameters": ["method": "ring"], "quantity-columns": ["total-ms"],
                    "quantities": ["total-ms": ["samples": [1.5, 2.5, 9.5]]],
                ]
            ],
            "promises": [["name": "ring-vs-log", "value": .double(value), "limit": 1.05, "better": "lower"]],
            "notes": [],
        ]
        try Descriptor.create(path).writeAll(json.encoded())
        return path
    }

    @Test("a result is printed as text, Markdown or JSON, and drawn; the status is 0 if its promises hold")
    func readsResult() throws {
        let path = try saved(value: 1.01)
        let plot = "\(bench.folder)/plot.svg"
        let text = try bench.run(["bench", "--from", path, "--plot", plot])
        #expect(text.status == .exited(0), "\(text)")
        #expect(text.output.contains("✔ ring-vs-log  1.01  (at most 1.05)"), "\(text)")
        #expect(String(decoding: try Descriptor.contents(of: plot), as: UTF8.self).hasPrefix("<svg "))
        let markdown = try bench.run(["bench", "--from", path, "--markdown"])
        #expect(markdown.output.contains("| ring | 2.50 |"), "\(markdown)")
        let json = try bench.run(["bench", "--from", path, "--json"])
        #expect(try JSON(parsing: json.output.utf8)["promises"]?[0]?["holds"] == true)
    }

    @Test("a promise that does not hold is a cross, and status 1")
    func broken() throws {
        let outcome = try bench.run(["bench", "--from", try saved(value: 1.06)])
        #expect(outcome.status == .exited(1), "\(outcome)")
        #expect(outcome.output.contains("✘ ring-vs-log  1.06  (at most 1.05)"), "\(outcome)")
        #expect(outcome.errors.isEmpty)
    }

    @Test("bad command lines end in one sentence and status 64")
    func badLines() throws {
        let lines: [([String], String)] = [
            (["nothing"], "nothing"), (["--runs", "0"], "--runs 0"), (["--runs", "many"], "many"),
            (["--json", "--markdown"], "--markdown"), (["--plot", "x.svg"], "--plot"),
            (["--from", "x", "--quick"], "--from"), (["--list", "--from", "x"], "--list"),
        ]
        for (arguments, word) in lines {
            let outcome = try bench.run(["bench"] + arguments)
            #expect(outcome.status == .exited(64), "\(outcome)")
            #expect(outcome.output.isEmpty && outcome.errorLines.count == 1, "\(outcome)")
            #expect(outcome.lastErrorLine.contains(word), "\(outcome)")
        }
    }

    @Test("a file that holds no result is named, status 1")
    func noResult() throws {
        for (content, word) in [("{}", "lacks bench"), ("no", "no")] {
            let path = "\(bench.folder)/bad.json"
            try Descriptor.create(path).writeAll(Array(content.utf8))
            let outcome = try bench.run(["bench", "--from", path])
            #expect(outcome.status == .exited(1), "\(outcome)")
            #expect(outcome.lastErrorLine.contains(path) && outcome.lastErrorLine.contains(word), "\(outcome)")
        }
    }

    @Test("a worker that does not exist, and arguments that are no JSON, are sentences")
    func badWorkers() throws {
        let outcome = try bench.run(["bench-worker", "nobody"])
        #expect(outcome.status == .exited(1) && outcome.lastErrorLine.contains("nobody"), "\(outcome)")
    }

    @Test("the list names every benchmark once; workers are not in the help")
    func list() throws {
        let outcome = try bench.run(["bench", "--list"])
        #expect(outcome.status == .exited(0) && outcome.output.hasPrefix("NAME"), "\(outcome)")
        let help = try bench.run(["--help"])
        #expect(help.output.contains("bench ") && !help.output.contains("bench-worker"), "\(help)")
    }

    @Test(
        "a migration is measured and verified, and one that is interrupted leaves nothing",
        .enabled(if: Workbench.hasKVM))
    func tracking() throws {
        let line = ["bench", "tracking", "--quick", "--runs", "1", "--only", "godwit log 400"]
        let outcome = try bench.run(line + ["--json"], seconds: 120)
        #expect(outcome.status == .exited(0), "\(outcome)")
        let cell = try #require(try JSON(parsing: outcome.output.utf8)["cells"]?[0])
        for name in ["total-ms", "downtime-ms", "sent-mb", "rate-before-mbs"] {
            #expect(try #require(cell["quantities"]?[name]?["median"]?.doubleValue) > 0, "\(name) in \(cell)")
        }
        let started = try bench.start(line)
        let deadline = Deadline.after(seconds: 20)
        while try !folders().contains(where: { try FileSystem.names(inFolder: $0).contains("source.qmp") }) {
            try #require(!deadline.hasPassed)
            Clock.sleep(nanoseconds: 5_000_000)
        }
        started.process.signal(SIGINT)
        let interrupted = bench.finish(started)
        #expect(interrupted.status == .exited(130), "\(interrupted)")
        #expect(interrupted.lastErrorLine == "godwit: interrupted")
        #expect(try folders() == [])
    }

    /// QEMU's guest is the same, behind its own firmware.
    @Test(
        "a guest with more memory than the host and several vCPUs is migrated and verified, and its holes stay holes",
        .enabled(if: Workbench.hasKVM), arguments: ["godwit", "qemu"])
    func bigGuest(vmm: String) throws {
        if vmm == "qemu", !Self.hasQEMU { return }
        let arguments: JSON = ["vmm": .string(vmm), "gibibytes": 48, "cpus": 6, "filled": 33_554_432]
        let outcome = try bench.run(["bench-worker", "big-guest", "\(arguments)"], seconds: 200)
        #expect(outcome.status == .exited(0), "\(outcome)")
        let answer = try JSON(parsing: outcome.output.utf8)
        for name in ["total-ms", "blackout-ms", "sent-mb"] + (vmm == "godwit" ? ["load-ms"] : []) {
            #expect(try #require(answer[name]?.doubleValue) > 0, "\(name) in \(answer)")
        }
    }

    private static let hasQEMU = ["/usr/bin", "/usr/local/bin"].contains {
        unsafe access("\($0)/qemu-system-x86_64", X_OK) == 0
    }

    @Test("a worker measures in a process of its own", .enabled(if: Workbench.hasKVM))
    func worker() throws {
        let arguments: JSON = [
            "memory": 67_108_864, "guest": "dirty,working-set=4M,fill=none", "ring": 0, "samples": 3,
        ]
        let outcome = try bench.run(["bench-worker", "collect", "\(arguments)"])
        #expect(outcome.status == .exited(0), "\(outcome)")
        let answer = try JSON(parsing: outcome.output.utf8)
        #expect(answer["verified"] == true && answer["method"] == "log")
        #expect(answer["nanoseconds"]?.arrayValue?.count == 3)
        // The whole working set, each time.
        for pages in answer["pages"]?.arrayValue ?? [] { #expect(try #require(pages.integerValue()) >= 1024) }
    }

    private func folders() throws -> [String] {
        try FileSystem.names(inFolder: bench.folder).filter { $0.hasPrefix("godwit-bench") }.map {
            "\(bench.folder)/\($0)"
        }
    }
}
