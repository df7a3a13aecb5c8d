public import Host

/// One command of the monitor: what it takes, when it is allowed, what it does.
public struct Command: Sendable {
    /// What a handler is given.
    public struct Call: Sendable {
        public let arguments: Arguments
        /// Whether it runs on the client's reader thread, where it must not block.
        public let isOutOfBand: Bool
        /// The oldest descriptor that the client passed (SCM_RIGHTS) and no command took yet.
        public let takeDescriptor: @Sendable () -> Descriptor?
    }

    /// Returns what the client sees as `return`. Runs on a thread of one client, beside those of others.
    /// Any error becomes the client's: a `QMPError` as it is, another as a `GenericError` with its description.
    public typealias Handler = @Sendable (Call) throws -> JSON

    public let name: String
    public let parameters: [Parameter]
    /// Whether `exec-oob` may run it: then it never blocks.
    public let allowsOutOfBand: Bool
    /// The run states in which it is permitted; `nil` for all.
    public let runStates: Set<String>?
    let handler: Handler
    /// Runs once the answer to a call that went well stands before anything said later. Must not block.
    let afterReply: (@Sendable () -> Void)?

    public init(
        _ name: String, _ parameters: [Parameter] = [], allowsOutOfBand: Bool = false, runStates: Set<String>? = nil,
        afterReply: (@Sendable () -> Void)? = nil, handler: @escaping Handler
    ) {
        self.name = name
        self.parameters = parameters
        self.allowsOutOfBand = allowsOutOfBand
        self.runStates = runStates
        self.afterReply = afterReply
        self.handler = handler
    }
}

/// The commands a monitor knows. `query-commands`, `query-version` and `qmp_capabilities` are always among them.
public struct CommandTable: Sendable {
    public let version: QMPVersion
    private let commands: [String: Command]
    private let runState: @Sendable () -> String

    /// - Parameter runState: the VM's state in QEMU's words (`running`, `inmigrate`), for commands bound to states.
    /// Of two commands with one name the later stands.
    public init(
        version: QMPVersion = .current, commands: [Command],
        runState: @escaping @Sendable () -> String = { "running" }
    ) {
        self.version = version
        self.runState = runState
        let builtIn = [
            Command("query-version") { _ in version.json },
            Command(QMPSession.negotiation, QMPSession.negotiationParameters) { _ in
                // The session answers it; a client that got this far has negotiated.
                throw QMPSession.alreadyNegotiated
            },
        ]
        var table = Dictionary((builtIn + commands).map { ($0.name, $0) }, uniquingKeysWith: { $1 })
        let names = Set(table.keys).union(["query-commands"]).sorted()
        let list = JSON.array(names.map { ["name": .string($0)] })
        table["query-commands"] = Command("query-commands") { _ in list }
        self.commands = table
    }

    /// The names of all commands, sorted.
    public var names: [String] { commands.keys.sorted() }

    public subscript(name: String) -> Command? { commands[name] }

    /// Runs a request: finds the command, checks its arguments and the run state, calls the handler.
    func run(
        _ request: QMPRequest, takeDescriptor: @escaping @Sendable () -> Descriptor? = { nil }
    ) -> Result<JSON, QMPError> {
        do {
            guard let command = commands[request.command] else { throw QMPError.commandNotFound(request.command) }
            if request.isOutOfBand, !command.allowsOutOfBand {
                throw QMPError("The command \(command.name) does not support OOB")
            }
            let arguments = try Arguments(request.arguments, checkedAgainst: command.parameters)
            if let allowed = command.runStates {
                let state = runState()
                guard allowed.contains(state) else {
                    throw QMPError("The command \(command.name) is not permitted while the VM is '\(state)'")
                }
            }
            let call = Command.Call(
                arguments: arguments, isOutOfBand: request.isOutOfBand, takeDescriptor: takeDescriptor)
            return .success(try command.handler(call))
        } catch {
            return .failure(QMPError(error))
        }
    }
}
