import ArgumentParser
import CommandLineKit
import Host
import QMP

struct RawQMP: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "qmp",
        abstract: "Send QMP commands to a VM.",
        discussion: """
            A command is a name with key=value arguments, or a JSON object as the protocol has it: \
            'godwit qmp web migrate uri=tcp:host:4444', 'godwit qmp web {"execute":"query-status"}'. Values are JSON where \
            they can be, text otherwise. Without a command, lines are read from standard input, and answers and events \
            come as lines of JSON.
            """)

    @OptionGroup var target: VMArgument

    @Argument(parsing: .captureForPassthrough, help: "A command's name and key=value arguments, or JSON.")
    var command: [String] = []

    func run() throws {
        if command.isEmpty { return try converse() }
        let client = try target.vm.connect()
        let message = try QMPMessage(words: command)
        do {
            let answer = try message.run(on: client)
            Terminal.output.write(answer.prettyDescription + "\n")
        } catch QMPClientError.refused(let error) {
            throw CommandFailure("VM \(target.vm): \(error.errorClass.rawValue): \(error)")
        }
    }

    /// One line in, one line out, until the input ends; refusals are answers here, too.
    private func converse() throws {
        let client = try target.vm.connect { Terminal.output.write("\(QMPMessage.json(of: $0))\n") }
        while let line = readLine() {
            guard !line.allSatisfy(\.isWhitespace) else { continue }
            Terminal.output.write("\(try QMPMessage.answer(toLine: line, on: client))\n")
        }
    }
}
