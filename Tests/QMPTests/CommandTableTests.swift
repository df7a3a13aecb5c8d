import Host
import Testing

@testable import QMP

/// Parameters shaped like those of QEMU's migration commands, so that both refuse the same words.
let migrationLikeCommands: [Command] = [
    Command("migrate", [.required("uri", .string), .optional("resume", .bool)]) {
        .string(try $0.arguments.string("uri"))
    },
    Command(
        "migrate-set-capabilities",
        [
            .required(
                "capabilities",
                .list(
                    .object([
                        .required("capability", .enumeration(["xbzrle", "events"])), .required("state", .bool),
                    ])))
        ]
    ) { _ in [:] },
    Command(
        "migrate-set-parameters",
        [
            .optional("multifd-channels", .unsigned(bits: 8)), .optional("downtime-limit", .unsigned(bits: 64)),
            .optional("tls-creds", .stringOrNull),
        ]
    ) { .object($0.arguments.members) },
    Command("pmemsave", [.required("val", .integer), .required("size", .integer), .required("filename", .string)]) {
        _ in
        [:]
    },
    Command("migrate-pause", allowsOutOfBand: true) { _ in
        throw QMPError("migrate-pause is currently only supported during postcopy-active state")
    },
    Command("closefd", [.required("fdname", .string)]) {
        throw QMPError("File descriptor named '\(try $0.arguments.string("fdname"))' not found")
    },
]

@Suite struct CommandTableTests {
    private func run(
        _ command: Command, _ arguments: JSON, runState: String = "running", outOfBand: Bool = false
    ) throws -> JSON {
        let table = CommandTable(commands: [command], runState: { runState })
        let verb = outOfBand ? "exec-oob" : "execute"
        let request = try QMPRequest(
            .object([verb: .string(command.name), "arguments": arguments]), outOfBandEnabled: true)
        return try table.run(request).get()
    }

    @Test("typed getters give what the client sent, and nil for what it left out")
    func getters() throws {
        let parameters: [Parameter] = [
            .required("name", .string), .required("on", .bool), .required("big", .unsigned(bits: 64)),
            .required("list", .list(.integer)), .required("map", .object([.optional("a", .any)])),
            .optional("rest", .string),
        ]
        let a = try Arguments(
            ["name": "x", "on": true, "big": JSON(UInt64.max), "list": [1, 2], "map": ["a": nil]],
            checkedAgainst: parameters)
        #expect(try a.string("name") == "x")
        #expect(try a.bool("on") == true)
        #expect(try a.integer("big") == UInt64.max)
        #expect(try a.list("list") == [1, 2])
        #expect(try a.object("map") == ["a": nil])
        #expect(try a.string(ifPresent: "rest") == nil)
        #expect(throws: QMPError("Parameter 'rest' is missing")) { _ = try a.string("rest") }
        #expect(throws: QMPError("Parameter 'big' expects a value between 1 and 255")) {
            let _: UInt8 = try a.integer("big", in: 1...255)
        }
    }

    @Test("a command bound to run states is refused in others")
    func runStates() throws {
        let command = Command("cont", runStates: ["paused", "prelaunch"]) { _ in [:] }
        #expect(try run(command, [:], runState: "paused") == [:])
        #expect(throws: QMPError("The command cont is not permitted while the VM is 'inmigrate'")) {
            try run(command, [:], runState: "inmigrate")
        }
    }

    @Test("an error of any type reaches the client as a sentence")
    func foreignErrors() {
        let command = Command("save") { _ in throw SystemError("open", "/x", code: 2) }
        #expect(throws: QMPError("open /x: no such file or directory")) { try run(command, [:]) }
    }

    @Test("query-commands lists every command, and each that it lists exists")
    func queryCommands() throws {
        let table = CommandTable(commands: migrationLikeCommands)
        let request = try QMPRequest(["execute": "query-commands"], outOfBandEnabled: false)
        let names = try table.run(request).get().arrayValue?.compactMap { $0["name"]?.stringValue }
        #expect(names == table.names)
        #expect(Set(table.names).isSuperset(of: ["query-commands", "query-version", "qmp_capabilities", "migrate"]))
    }
}
