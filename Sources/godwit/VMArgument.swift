import ArgumentParser
import CommandLineKit
import QMP

/// The VM that a command talks to.
struct VMArgument: ParsableArguments {
    @Argument(
        help: ArgumentHelp("The VM: its name, or the path of its QMP socket (unix:PATH).", valueName: "name"),
        completion: .custom { _, _, _ in (try? RuntimeFolder.current.runningVMs())?.map(\.name.text) ?? [] },
        transform: { try VMReference($0) })
    var vm: VMReference

    /// Runs a command in the VM. - Throws: an error that names the VM.
    @discardableResult
    func execute(_ command: String, _ arguments: JSON = [:]) throws -> JSON {
        let client = try vm.connect()
        defer { client.close() }
        do {
            return try client.execute(command, arguments)
        } catch QMPClientError.refused(let error) {
            throw CommandFailure("VM \(vm): \(error)")
        }
    }
}
