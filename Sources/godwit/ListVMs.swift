import ArgumentParser
import CommandLineKit
import Host
import QMP

struct ListVMs: ParsableCommand {
    static let configuration = CommandConfiguration(commandName: "ps", abstract: "List the VMs that run.")

    @Flag(help: "Print a JSON array.")
    var json = false

    func run() throws {
        let overviews = try RuntimeFolder.current.runningVMs().map { running in
            let reference = VMReference.name(running.name)
            // A VM that hangs keeps its row.
            guard let client = try? reference.connect(deadline: .after(seconds: 2)) else {
                return VMOverview(name: running.name.text, processIdentifier: reference.processIdentifier)
            }
            defer { client.close() }
            return (try? VMOverview(of: reference, client: client, deadline: .after(seconds: 2)))
                ?? VMOverview(name: running.name.text, processIdentifier: reference.processIdentifier)
        }
        if json {
            Terminal.output.write(JSON.array(overviews.map(\.json)).prettyDescription + "\n")
        } else {
            Terminal.output.write(VMOverview.table(overviews))
        }
    }
}
