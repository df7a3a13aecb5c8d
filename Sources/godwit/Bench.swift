import ArgumentParser
import Benchmarks
import CommandLineKit
import Glibc
import Host
import QMP

struct Bench: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Measure this machine's Godwit, and whether its promises hold.",
        discussion: """
            Without a name every benchmark runs, one after the other. Each ends in the promises of SPECIFICATION.md; the exit \
            status is 0 only if all of them hold. What is measured now goes to standard error, results to standard output.
            """)

    @Argument(
        help: "Which benchmark; --list shows them.", completion: .list(BenchmarkList.all.map { $0.name }))
    var name: String?

    @Flag(help: "Fewer cells, the same promises, under a minute.")
    var quick = false

    @Option(help: ArgumentHelp("Runs of each cell; medians are over these.", valueName: "n"))
    var runs: Int?

    @Option(help: ArgumentHelp("Measure only the cells whose name contains this.", valueName: "text"))
    var only: String?

    @Flag(help: "Print the result as JSON.")
    var json = false

    @Flag(help: "Print the result as tables in Markdown.")
    var markdown = false

    @Option(help: ArgumentHelp("Draw the result into this file, as SVG.", valueName: "file"), completion: .file())
    var plot: String?

    @Option(
        help: ArgumentHelp("Measure nothing: read the result that --json wrote into this file.", valueName: "file"),
        completion: .file())
    var from: String?

    @Flag(help: "List the benchmarks.")
    var list = false

    func validate() throws {
        if json, markdown { throw ValidationError("Give one of --json and --markdown.") }
        if let runs, !(1...1000).contains(runs) { throw ValidationError("--runs \(runs): possible are 1 to 1000.") }
        if from != nil, name != nil || quick || runs != nil || only != nil {
            throw ValidationError(
                "--from measures nothing: a name, --quick, --runs and --only have no meaning with it.")
        }
        if list, name != nil || from != nil { throw ValidationError("--list takes no name and no --from.") }
        if plot != nil, name == nil, from == nil { throw ValidationError("--plot needs the name of one benchmark.") }
        if let name, !BenchmarkList.all.contains(where: { $0.name == name }) {
            let known = BenchmarkList.all.map { $0.name }.joined(separator: ", ")
            throw ValidationError("no benchmark '\(name)'; there are: \(known)")
        }
    }

    func run() throws {
        if list { return showList() }
        let reports = try from.map { [try Self.report(from: $0)] } ?? measure()
        if let plot, let report = reports.first {
            try Descriptor.create(plot).writeAll(Array(report.figure.svg().utf8))
        }
        Terminal.output.write(text(of: reports))
        if !reports.allSatisfy(\.result.holds) { throw ExitCode(1) }
    }

    private func showList() {
        var table = TextTable([("NAME", .left), ("MEASURES", .left)])
        for benchmark in BenchmarkList.all { table.add([benchmark.name, benchmark.abstract]) }
        Terminal.output.write(table.text)
    }

    private static func report(from path: String) throws -> BenchmarkReport {
        let bytes = try Descriptor.contents(of: path, limit: 64 << 20)
        do {
            return try BenchmarkReport(try JSON(parsing: bytes))
        } catch { throw CommandFailure("\(path): \(error)") }
    }

    /// - Throws: an error of the benchmark; `ExitCode` 130 after Ctrl-C, when it has cleaned up behind itself.
    private func measure() throws -> [BenchmarkReport] {
        let interruption = try SignalWatch.startFlag { Glibc._exit(128 + $0) }
        let options = BenchmarkOptions(
            isQuick: quick, runs: runs, only: only, progress: Self.showProgress(_:),
            isInterrupted: { interruption.isRaised })
        defer { Self.showProgress(nil) }
        do {
            return try BenchmarkList.all.filter { name == nil || $0.name == name }.map { benchmark in
                try options.checkInterruption()
                return try BenchmarkReport { try benchmark.init().run(options) }
            }
        } catch  where interruption.isRaised {
            Self.showProgress(nil)
            Terminal.error.write("godwit: interrupted\n")
            throw ExitCode(128 + SIGINT)
        }
    }

    /// One line that changes on a terminal, else a line each; `nil` takes it away.
    private static func showProgress(_ text: String?) {
        let terminal = Terminal.error
        if terminal.isTerminal {
            terminal.write(LiveLine.replacing(text.map { String($0.prefix(terminal.width - 1)) } ?? ""))
        } else if let text {
            terminal.write(text + "\n")
        }
    }

    private func text(of reports: [BenchmarkReport]) -> String {
        if markdown { return reports.map(\.markdown).joined(separator: "\n") }
        guard json else {
            return reports.map { $0.text(showsColors: Terminal.output.showsColors) }.joined(separator: "\n")
        }
        // One benchmark is one object, all of them an array.
        if name != nil || from != nil, let report = reports.first { return report.json.prettyDescription + "\n" }
        return JSON.array(reports.map(\.json)).prettyDescription + "\n"
    }
}

/// What a benchmark starts in a process of its own.
struct BenchWorker: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "bench-worker", abstract: "A part of a benchmark, in a process of its own.", shouldDisplay: false)

    @Argument var name: String
    @Argument(parsing: .captureForPassthrough) var arguments: [String] = []

    func run() throws {
        // For programs that have no option to end with the process that started them.
        if name == "exec", !arguments.isEmpty { try ThisProgram.become(arguments) }
        Terminal.output.write("\(try BenchmarkWorkers.run(name, arguments: arguments.first ?? "{}"))\n")
    }
}
