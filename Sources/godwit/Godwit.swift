import ArgumentParser
import CommandLineKit

/// The `godwit` command: one file per subcommand. All but `run`, `demo` and `stream` talk to a VM through its QMP socket.
@main
struct Godwit: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "godwit",
        abstract: "Virtual machines that move while they run.",
        version: Version.text,
        subcommands: [
            Run.self, Migrate.self, Save.self, Info.self, ListVMs.self, Stop.self, Continue.self, Reset.self, Quit.self,
            RawQMP.self,
            Demo.self, Bench.self, Stream.self, BenchWorker.self,
        ])

    /// Errors are one sentence on standard error: status 64 for a command line that makes no sense, 1 for the rest.
    static func main() {
        do {
            var command = try parseAsRoot()
            try command.run()
        } catch {
            switch exitCode(for: error) {
            case .failure where !(error is ExitCode): Terminal.error.write("godwit: \(error)\n")
            case .validationFailure: Terminal.error.write(usageText(of: error))
            default: exit(withError: error)
            }
            exit(withError: exitCode(for: error))
        }
    }

    /// What is wrong, and where to read on: without the parser's repetition of the option's help.
    private static func usageText(of error: any Error) -> String {
        let hint = fullMessage(for: error).split(separator: "\n").last { $0.contains("--help") }
        return "godwit: \(message(for: error))\n" + (hint.map { $0.drop { $0 == " " } + "\n" } ?? "")
    }
}
