import ArgumentParser
import CommandLineKit
import Host
import QMP

struct Stop: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Stop the guest of a VM.")
    @OptionGroup var target: VMArgument

    func run() throws { try target.execute("stop") }
}

struct Continue: ParsableCommand {
    static let configuration = CommandConfiguration(commandName: "cont", abstract: "Let the guest of a VM run on.")
    @OptionGroup var target: VMArgument

    func run() throws { try target.execute("cont") }
}

struct Reset: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Start a VM afresh with what it was booted with.")
    @OptionGroup var target: VMArgument

    func run() throws { try target.execute("system_reset") }
}

struct Quit: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "End a VM's process.")
    @OptionGroup var target: VMArgument

    /// Returns when the VM has closed the connection, its sockets removed.
    func run() throws {
        let client = try target.vm.connect()
        try client.execute("quit")
        guard client.waitForEnd(deadline: .after(seconds: 10)) else {
            throw CommandFailure("VM \(target.vm): it took the quit command, and still runs")
        }
    }
}
