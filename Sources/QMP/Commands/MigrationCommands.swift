import Host
import Migration
import Transport

/// `migrate` and its companions, and the descriptors that are passed for it.
struct MigrationCommands: Sendable {
    private let migrator: Migrator

    init(_ migrator: Migrator) { self.migrator = migrator }

    var all: [Command] {
        [
            Command("migrate", MigrationTarget.parameters + Self.migrateOptions, handler: migrate),
            Command("migrate-incoming", MigrationTarget.parameters + [.optional("exit-on-error", .bool)]) {
                [migrator] in
                try migrator.acceptMigration(on: MigrationTarget.address($0.arguments, of: "migrate-incoming"))
                return [:]
            },
            Command("migrate_cancel") { [migrator] _ in
                try migrator.cancel()
                return [:]
            },
            Command("migrate-start-postcopy") { [migrator] _ in
                try migrator.startPostcopy()
                return [:]
            },
            Command("migrate-pause", allowsOutOfBand: true) { [migrator] _ in
                try migrator.pause()
                return [:]
            },
            Command("migrate-recover", [.required("uri", .string)], allowsOutOfBand: true) { [migrator] call in
                try migrator.recover(on: MigrationAddress(try call.arguments.string("uri")))
                return [:]
            },
            Command("x-postcopy-take-back") { [migrator] _ in
                try migrator.takeBack()
                return [:]
            },
            Command("x-postcopy-keep", allowsOutOfBand: true) { [migrator] _ in
                try migrator.keep()
                return [:]
            },
            Command("migrate-continue", [.required("state", .enumeration(Self.states))], handler: proceed),
            Command("query-migrate") { [migrator] _ in
                migrator.info().json(downtimeLimitMilliseconds: migrator.parameters.downtimeLimitMilliseconds)
            },
            Command("x-migrate-settle", [.required("verdict", .enumeration(Self.verdicts.keys.sorted()))]) {
                [migrator] call in
                guard let verdict = Self.verdicts[try call.arguments.string("verdict")] else { return [:] }
                try migrator.settle(verdict)
                return [:]
            },
            Command("x-migrate-dry-run", Self.dryRunOptions, handler: dryRun),
            Command("getfd", [.required("fdname", .string)], handler: keepDescriptor),
            Command("closefd", [.required("fdname", .string)]) { [migrator] call in
                let name = try call.arguments.string("fdname")
                guard migrator.closeDescriptor(name) else {
                    throw QMPError("File descriptor named '\(name)' not found")
                }
                return [:]
            },
        ]
    }

    private static let migrateOptions: [Parameter] = ["blk", "inc", "detach", "resume", "x-hold"].map {
        .optional($0, .bool)
    }
    private static let dryRunOptions: [Parameter] = [
        .optional("uri", .string), .optional("bandwidth", .unsigned(bits: 64)),
        .optional("downtime-limit", .unsigned(bits: 64)), .optional("auto-converge", .bool),
    ]
    private static let states = MigrationStatus.allCases.filter { ![.unsettled, .paused].contains($0) }.map(\.rawValue)
    private static let verdicts: [String: Settlement] = [
        "ask-destination": .askDestination, "started-there": .startedThere, "resume-here": .resumeHere,
    ]

    private func migrate(_ call: Command.Call) throws -> JSON {
        for name in ["blk", "inc"] where try call.arguments.bool(ifPresent: name) == true {
            throw QMPError("migrate: '\(name)' asks for disks to be copied, and this VM has none; leave it out")
        }
        let holds = try call.arguments.bool(ifPresent: "x-hold") == true
        if try call.arguments.bool(ifPresent: "resume") == true {
            guard !holds else { throw QMPError("migrate: 'resume' goes on as the migration began; leave 'x-hold' out") }
            try migrator.resume(to: MigrationTarget.address(call.arguments, of: "migrate"))
            return [:]
        }
        try migrator.migrate(to: MigrationTarget.address(call.arguments, of: "migrate"), holds: holds)
        return [:]
    }

    private func dryRun(_ call: Command.Call) throws -> JSON {
        // Where to is checked and not used: nothing is sent, so what the link carries must be told.
        if let uri = try call.arguments.string(ifPresent: "uri") { _ = try MigrationAddress(uri) }
        return try migrator.dryRun(
            .init(
                bandwidth: call.arguments.integer(ifPresent: "bandwidth"),
                downtimeLimitMilliseconds: call.arguments.integer(ifPresent: "downtime-limit"),
                autoConverge: call.arguments.bool(ifPresent: "auto-converge"))
        ).json
    }

    private func proceed(_ call: Command.Call) throws -> JSON {
        let state = try call.arguments.string("state")
        guard state == MigrationStatus.preSwitchover.rawValue else {
            throw QMPError(
                "migrate-continue: a migration waits for an operator in state pre-switchover only, not in \(state)")
        }
        try migrator.proceed()
        return [:]
    }

    private func keepDescriptor(_ call: Command.Call) throws -> JSON {
        guard let descriptor = call.takeDescriptor() else {
            throw QMPError("No file descriptor supplied via SCM_RIGHTS")
        }
        let name = try call.arguments.string("fdname")
        // `fd:7` means a number that was inherited.
        guard let first = name.unicodeScalars.first, !("0"..."9").contains(first) else {
            throw QMPError.parameter("fdname", expects: "a name not starting with a digit")
        }
        migrator.keep(descriptor, as: name)
        return [:]
    }
}
