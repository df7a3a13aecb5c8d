import Migration
import Synchronization

/// Capabilities and parameters. Every name of QEMU 7.2 to 10 is known: what this Godwit cannot do is listed as off, and
/// refused by name when it is asked for.
struct MigrationSettings: Sendable {
    private let migrator: Migrator

    init(_ migrator: Migrator) { self.migrator = migrator }

    var all: [Command] {
        let turn = Mutex(())
        return [
            Command("query-migrate-capabilities") { [self] _ in capabilities },
            Command("migrate-set-capabilities", [Self.capabilityList]) { [self] in
                try setCapabilities($0.arguments.list("capabilities"))
                return [:]
            },
            Command("query-migrate-parameters") { [self] _ in parameters },
            Command("migrate-set-parameters", MigrationParameterEntry.all.map(\.parameter)) { [self] call in
                // One client after the other: each reads all parameters, changes some and writes all.
                try turn.withLock { _ in try setParameters(call.arguments) }
                return [:]
            },
        ]
    }

    // MARK: Capabilities

    /// QEMU's order, then what later versions added, then ours.
    static let capabilityNames = [
        "xbzrle", "rdma-pin-all", "auto-converge", "zero-blocks", "compress", "events", "postcopy-ram", "x-colo",
        "release-ram", "block", "return-path", "pause-before-switchover", "multifd", "dirty-bitmaps",
        "postcopy-blocktime", "late-block-activate", "x-ignore-shared", "validate-uuid", "background-snapshot",
        "zero-copy-send", "postcopy-preempt", "switchover-ack", "dirty-limit", "mapped-ram",
        "x-resumable", "x-verify", "x-postcopy-safety-net",
    ]

    private static let capabilityList = Parameter.required(
        "capabilities",
        .list(.object([.required("capability", .enumeration(capabilityNames)), .required("state", .bool)])))

    private var capabilities: JSON {
        .array(
            Self.capabilityNames.map { name in
                [
                    "capability": .string(name),
                    "state": .bool(MigrationCapability(rawValue: name).map(migrator.isOn) ?? false),
                ]
            })
    }

    private func setCapabilities(_ list: [JSON]) throws {
        var changes: [(capability: MigrationCapability, on: Bool)] = []
        for item in list {
            guard let name = item["capability"]?.stringValue, let on = item["state"]?.boolValue else { continue }
            if let capability = MigrationCapability(rawValue: name) {
                changes.append((capability, on))
            } else if on {
                throw QMPError(
                    "migrate-set-capabilities: capability '\(name)' is not supported yet; leave it off"
                )
            }
        }
        try migrator.set(changes)
    }

    // MARK: Parameters

    private var parameters: JSON {
        let now = migrator.parameters
        return .object(
            Dictionary(
                MigrationParameterEntry.all.compactMap { entry in
                    switch entry.meaning {
                    case .setting(let field): (entry.name, JSON(now[keyPath: field]))
                    case .flag(let field): (entry.name, .bool(now[keyPath: field]))
                    case .text(let field), .choice(_, let field): (entry.name, .string(now[keyPath: field]))
                    case .off(let value, _): (entry.name, value)
                    case .absent: nil
                    }
                }, uniquingKeysWith: { first, _ in first }))
    }

    private func setParameters(_ arguments: Arguments) throws {
        var wanted = migrator.parameters
        for entry in MigrationParameterEntry.all {
            if let value = arguments[entry.name] { try entry.set(value, in: arguments, &wanted) }
        }
        try migrator.set(wanted)
    }
}

extension MigrationParameterEntry {
    /// Takes over one value whose type was checked. - Throws: `QMPError` naming the parameter, for what this Godwit cannot do.
    fileprivate func set(
        _ value: JSON, in arguments: Arguments, _ wanted: inout MigrationParameters
    )
        throws(QMPError)
    {
        switch meaning {
        case .setting(let field):
            if let number = try arguments.integer(ifPresent: name, in: UInt64.min...UInt64.max) {
                wanted[keyPath: field] = number
            }
        case .flag(let field):
            if let flag = value.boolValue { wanted[keyPath: field] = flag }
        case .text(let field): wanted[keyPath: field] = value.stringValue ?? ""
        case .choice(let ours, let field):
            let choice = value.stringValue ?? ""
            guard ours.contains(choice) else {
                throw QMPError(
                    "migrate-set-parameters: \(name) '\(choice)' is not supported; choose "
                        + ours.joined(separator: " or "))
            }
            wanted[keyPath: field] = choice
        case .off(let off, let feature):
            guard value == off || (value.isNull && off == "") else {
                throw QMPError(
                    "migrate-set-parameters: \(name) \(value): \(feature) is not supported yet; leave it at \(off)")
            }
        case .absent(let off, let feature):
            guard value == off else {
                throw QMPError("migrate-set-parameters: \(name): \(feature) is not supported yet; leave it out")
            }
        }
    }
}
