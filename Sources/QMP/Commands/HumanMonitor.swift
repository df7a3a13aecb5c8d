import Accelerator
import GuestMemory
import Machine
import Migration

/// `human-monitor-command`: the few commands of QEMU's monitor for people that scripts still use.
///
/// Answers are text with CR LF, as QEMU gives them; what a command refuses is told in the text, after "Error: ".
struct HumanMonitor: Sendable {
    private let machine: VirtualMachine
    private let migrator: Migrator
    private let name: String
    private let table: CommandTable

    /// - Parameter commands: those of QMP, which do the work here too.
    init(machine: VirtualMachine, migrator: Migrator, name: String, commands: [Command]) {
        self.machine = machine
        self.migrator = migrator
        self.name = name
        table = CommandTable(commands: commands)
    }

    var command: Command {
        Command("human-monitor-command", [.required("command-line", .string), .optional("cpu-index", .integer)]) {
            call in
            if let index: Int64 = try call.arguments.integer(ifPresent: "cpu-index"),
                !machine.cpuThreadIDs.indices.contains(Int(index))
            {
                throw QMPError.parameter("cpu-index", expects: "a CPU number")
            }
            return .string(answer(to: try call.arguments.string("command-line")))
        }
    }

    /// The text for a command line, lines ended by CR LF.
    func answer(to line: String) -> String {
        let lines: [String]
        do {
            lines = try run(Self.words(of: line))
        } catch let usage as Usage {
            lines = [usage.sentence, "Try \"help \(usage.command)\" for more information"]
        } catch {
            lines = ["Error: \(QMPError(error).description)"]
        }
        return lines.map { $0 + "\r\n" }.joined()
    }

    /// A command line that does not fit its command.
    struct Usage: Error {
        let command: String
        let sentence: String
    }

    // MARK: Commands

    private static let help: [(usage: String, purpose: String)] = [
        ("calc_dirty_rate [-r] [-b] second [pages]", "start to measure the dirty rate; -r by rings, -b by tracking"),
        ("cancel_vcpu_dirty_limit [cpu]", "end the dirty limit of a vCPU, or of all"),
        ("cont|c", "resume emulation"),
        ("help|? [cmd]", "show the help"),
        ("info [subcommand]", "show what is known about the system"),
        ("migrate [-d] uri", "migrate to URI; it never waits for the end, so -d changes nothing"),
        ("migrate_cancel", "cancel the current VM migration"),
        ("migrate_continue state", "continue a migration that waits in the given state"),
        ("migrate_incoming uri", "wait for a migration at URI"),
        ("migrate_pause", "give up the connection of a postcopy, which can go on over another"),
        ("migrate_recover uri", "wait at URI for the source of a paused postcopy"),
        ("migrate_start_postcopy", "let the guest of a migration under way move now, and its memory follow"),
        ("object_add type,id=id[,property=value,...]", "make an object, such as TLS credentials"),
        ("object_del id", "delete an object"),
        ("pmemsave addr size file", "save guest physical memory from 'addr' on, of size 'size', to a file"),
        ("set_vcpu_dirty_limit rate [cpu]", "limit how much a vCPU, or each, makes dirty, in MB/s"),
        ("stop|s", "stop emulation"),
        ("system_reset", "reset the system"),
        ("xp /fmt addr", "show guest physical memory from 'addr' on; fmt is a count, o d u x or c, and b h w or g"),
    ]

    private static let subjects: [(name: String, purpose: String)] = [
        ("cpus", "show infos for each CPU"),
        ("dirty_rate", "show the dirty rate"),
        ("kvm", "show KVM information"),
        ("memory_size_summary", "show the amount of memory in bytes"),
        ("migrate", "show migration status"),
        ("migrate_capabilities", "show current migration capabilities"),
        ("migrate_parameters", "show current migration parameters"),
        ("mtree", "show memory regions and the guest's view of them; -f: the view alone"),
        ("name", "show the current VM name"),
        ("status", "show the current VM status (running|paused)"),
        ("uuid", "show the current VM UUID"),
        ("vcpu_dirty_limit", "show the dirty limits of vCPUs"),
        ("version", "show the version"),
    ]

    private func run(_ words: [String]) throws -> [String] {
        guard let first = words.first else { return [] }
        let rest = Array(words.dropFirst())
        switch first {
        case "help", "?": return help(on: rest)
        case "info": return try info(rest)
        case "xp": return try MemoryListing(parsing: rest).lines(of: machine.memory)
        case "pmemsave":
            let found = try operands(rest, 3, of: first)
            try perform(
                "pmemsave",
                ["val": number(found[0], first), "size": number(found[1], first), "filename": .string(found[2])])
        case "migrate":
            try perform(first, ["uri": .string(operands(rest.filter { $0 != "-d" }, 1, of: first)[0])])
        case "migrate_recover": try perform("migrate-recover", ["uri": .string(operands(rest, 1, of: first)[0])])
        case "migrate_incoming": try perform("migrate-incoming", ["uri": .string(operands(rest, 1, of: first)[0])])
        case "migrate_continue": try perform("migrate-continue", ["state": .string(operands(rest, 1, of: first)[0])])
        case "migrate_start_postcopy", "migrate_pause":
            _ = try operands(rest, 0, of: first)
            try perform(first == "migrate_pause" ? "migrate-pause" : "migrate-start-postcopy", [:])
        case "object_add":
            try perform("object-add", ObjectOptions(parsing: operands(rest, 1, of: first)[0]).arguments)
        case "object_del": try perform("object-del", ["id": .string(operands(rest, 1, of: first)[0])])
        case "stop", "s", "cont", "c", "migrate_cancel", "system_reset":
            _ = try operands(rest, 0, of: first)
            try perform(["s": "stop", "c": "cont"][first] ?? first, [:])
        case "calc_dirty_rate", "set_vcpu_dirty_limit", "cancel_vcpu_dirty_limit": return try dirtyRate(first, rest)
        default: return [Self.unknown(first)]
        }
        return []
    }

    func perform(_ command: String, _ arguments: [String: JSON]) throws {
        _ = try value(command, arguments)
    }

    func value(_ command: String, _ arguments: [String: JSON] = [:]) throws -> JSON {
        var request = try QMPRequest(["execute": .string(command)], outOfBandEnabled: false)
        request.arguments = arguments
        return try table.run(request).get()
    }

    private func operands(_ words: [String], _ count: Int, of command: String) throws -> [String] {
        if words.count < count { throw Usage(command: command, sentence: "\(command): \(count) operands are expected") }
        if words.count > count {
            throw Usage(command: command, sentence: "\(command): extraneous characters at the end of line")
        }
        return words
    }

    func number(_ text: String, _ command: String) throws -> JSON {
        guard let number = MemoryListing.number(text) else {
            throw Usage(command: command, sentence: "\(command): '\(text)' is no number")
        }
        return JSON(number)
    }

    private static func unknown(_ text: String) -> String { "unknown command: '\(text)'" }

    private func help(on words: [String]) -> [String] {
        guard let wanted = words.first else { return Self.help.map { "\($0.usage) -- \($0.purpose)" } }
        if wanted == "info" { return Self.subjects.map { "info \($0.name)  -- \($0.purpose)" } }
        let found = Self.help.filter { entry in
            entry.usage.split(separator: " ")[0].split(separator: "|").contains { $0 == wanted }
        }
        return found.isEmpty ? [Self.unknown(wanted)] : found.map { "\($0.usage) -- \($0.purpose)" }
    }

    // MARK: info

    private func info(_ words: [String]) throws -> [String] {
        guard let subject = words.first else { return help(on: ["info"]) }
        guard Self.subjects.contains(where: { $0.name == subject }) else { return [Self.unknown("info \(subject)")] }
        let options = subject == "mtree" && words.count == 2 && words[1] == "-f" ? 1 : 0
        guard words.count == 1 + options else {
            throw Usage(
                command: "info \(subject)", sentence: "\(subject): extraneous characters at the end of line")
        }
        switch subject {
        case "status": return [Self.text(of: machine.runState)]
        case "name": return [name]
        case "uuid": return [(machine.configuration.uuid ?? .none).description]
        case "version":
            return ["\(table.version.major).\(table.version.minor).\(table.version.micro) (\(table.version.package))"]
        case "dirty_rate": return try dirtyRateLines()
        case "vcpu_dirty_limit": return try dirtyLimitLines()
        case "kvm":
            let support = "kvm support: \(try value("query-kvm")["enabled"] == true ? "enabled" : "disabled")"
            return [support] + (machine.accelerator.map { ["dirty tracking: \($0.dirtyTracking)"] } ?? [])
        case "mtree": return options > 0 ? machine.memory.view.lines : machine.memory.mapLines
        case "cpus":
            return machine.cpuThreadIDs.enumerated().map { "\($0 == 0 ? "*" : " ") CPU #\($0): thread_id=\($1)" }
        case "memory_size_summary":
            return ["base memory: \(machine.memory.byteCount)", "plugged memory: 0"]
        case "migrate_capabilities":
            return (try value("query-migrate-capabilities").arrayValue ?? []).map {
                "\($0["capability"]?.stringValue ?? ""): \($0["state"] == true ? "on" : "off")"
            }
        case "migrate_parameters":
            return (try value("query-migrate-parameters").objectValue ?? [:]).sorted { $0.key < $1.key }.map {
                "\($0.key): \($0.value.stringValue.map { text in text.isEmpty ? "''" : text } ?? "\($0.value)")"
            }
        default:
            return MigrationReport(
                migrator.info(), downtimeLimitMilliseconds: migrator.parameters.downtimeLimitMilliseconds
            ).lines
        }
    }

    private static func text(of state: RunState) -> String {
        switch state {
        case .running: "VM status: running"
        case .paused: "VM status: paused"
        default: "VM status: paused (\(state.rawValue))"
        }
    }

    // MARK: Words

    /// Splits at spaces. Double quotes hold words together; inside them a backslash takes the next character as it is.
    static func words(of line: String) -> [String] {
        var words: [String] = []
        var word: String?
        var isQuoted = false
        var isEscaped = false
        for character in line {
            if isEscaped {
                word = (word ?? "") + String(character)
                isEscaped = false
            } else if character == "\"" {
                isQuoted.toggle()
                word = word ?? ""
            } else if isQuoted, character == "\\" {
                isEscaped = true
            } else if !isQuoted, character.isWhitespace {
                if let whole = word { words.append(whole) }
                word = nil
            } else {
                word = (word ?? "") + String(character)
            }
        }
        if let word { words.append(word) }
        return words
    }
}
