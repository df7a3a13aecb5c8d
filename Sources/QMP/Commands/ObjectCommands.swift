import Migration
import Transport

/// `object-add` and `object-del`: TLS credentials, and lists of peers.
struct ObjectCommands: Sendable {
    private let security: SecurityObjects

    init(_ security: SecurityObjects) { self.security = security }

    var all: [Command] {
        [
            Command("object-add", Self.heads + Self.properties, handler: add),
            Command("object-del", [.required("id", .string)]) { [security] call in
                try security.remove(id: try call.arguments.string("id"))
                return [:]
            },
        ]
    }

    // MARK: Types

    private static let types = ["tls-creds-x509", "tls-creds-psk", "authz-simple", "authz-list"]
    private static let heads: [Parameter] = [.required("qom-type", .string), .required("id", .string)]
    private static let endpoint = Parameter.optional(
        "endpoint", .enumeration(TLSCredentials.Endpoint.allCases.map(\.rawValue)))
    private static let policies = TLSPeerList.Policy.allCases.map(\.rawValue)
    private static let rule: [Parameter] = [
        .required("match", .string), .required("policy", .enumeration(policies)),
        .optional("format", .enumeration(TLSPeerList.Format.allCases.map(\.rawValue))),
    ]
    private static let credentials: [Parameter] = [
        .optional("dir", .string), endpoint, .optional("verify-peer", .bool), .optional("sanity-check", .bool),
        .optional("priority", .string),
    ]

    /// What one type or another may have.
    private static let properties: [Parameter] =
        credentials + [
            .optional("passwordid", .string), .optional("username", .string), .optional("identity", .string),
            .optional("policy", .enumeration(policies)), .optional("rules", .list(.object(rule))),
        ]

    /// What objects of a type have.
    private static func parameters(of type: String) -> [Parameter]? {
        switch type {
        case "tls-creds-x509": credentials + [.optional("passwordid", .string)]
        case "tls-creds-psk": credentials + [.optional("username", .string)]
        case "authz-simple": [.required("identity", .string)]
        case "authz-list": [.optional("policy", .enumeration(policies)), .optional("rules", .list(.object(rule)))]
        default: nil
        }
    }

    private func add(_ call: Command.Call) throws -> JSON {
        let arguments = call.arguments
        let type = try arguments.string("qom-type")
        let id = try arguments.string("id")
        guard let parameters = Self.parameters(of: type) else {
            throw QMPError(
                "object-add: objects of type '\(type)' do not exist here; possible are \(Self.types.joined(separator: ", "))"
            )
        }
        try Parameter.check(arguments.members, against: Self.heads + parameters)
        guard !id.isEmpty else { throw QMPError.parameter("id", expects: "a text that is not empty") }
        try security.add(try Self.object(type, id, arguments), id: id)
        return [:]
    }

    private static func object(_ type: String, _ id: String, _ arguments: Arguments) throws -> SecurityObject {
        switch type {
        case "authz-simple": return .peers(TLSPeerList(identity: try arguments.string("identity")))
        case "authz-list":
            let rules = try (arguments.list(ifPresent: "rules") ?? []).compactMap { rule -> TLSPeerList.Rule? in
                guard let match = rule["match"]?.stringValue,
                    let policy = rule["policy"]?.stringValue.flatMap(TLSPeerList.Policy.init(rawValue:))
                else { return nil }
                let format = rule["format"]?.stringValue.flatMap(TLSPeerList.Format.init(rawValue:))
                return TLSPeerList.Rule(match, policy: policy, format: format ?? .exact)
            }
            let policy = try arguments.string(ifPresent: "policy").flatMap(TLSPeerList.Policy.init(rawValue:))
            return .peers(TLSPeerList(rules: rules, policy: policy ?? .deny))
        default: return .credentials(try credentials(type, id, arguments))
        }
    }

    private static func credentials(_ type: String, _ id: String, _ arguments: Arguments) throws -> TLSCredentials {
        // GnuTLS's language for algorithms; its default asks for nothing that TLS 1.3 of OpenSSL does not do anyway.
        if let priority = try arguments.string(ifPresent: "priority"), !["", "NORMAL", "@SYSTEM"].contains(priority) {
            throw QMPError(
                "object-add: \(type) \(id): priority '\(priority)' is for GnuTLS; Godwit speaks TLS 1.3 by OpenSSL: leave it out"
            )
        }
        if try arguments.string(ifPresent: "passwordid") != nil {
            throw QMPError(
                "object-add: \(type) \(id): passwordid is not supported; keep the key without a password, in a folder of mode 0700"
            )
        }
        guard let folder = try arguments.string(ifPresent: "dir"), !folder.isEmpty else {
            throw QMPError(
                "object-add: \(type) \(id): dir is missing; it is the folder with the files (Documentation/tls.md)")
        }
        let endpoint = try arguments.string(ifPresent: "endpoint").flatMap(TLSCredentials.Endpoint.init(rawValue:))
        if type == TLSCredentials.Kind.psk.rawValue {
            return try TLSCredentials(
                id, pskFolder: folder, endpoint: endpoint ?? .client,
                user: try arguments.string(ifPresent: "username") ?? TLSCredentials.defaultUser)
        }
        return try TLSCredentials(
            id, x509Folder: folder, endpoint: endpoint ?? .client,
            verifiesPeer: try arguments.bool(ifPresent: "verify-peer") ?? true,
            checksSanity: try arguments.bool(ifPresent: "sanity-check") ?? true)
    }
}

/// QEMU's text form of an object: `tls-creds-x509,id=tls0,dir=/etc/pki/qemu,endpoint=server`. A comma in a value is doubled.
struct ObjectOptions {
    /// The arguments of `object-add`.
    private(set) var arguments: [String: JSON] = [:]

    private static let switches: [String: Bool] = [
        "on": true, "yes": true, "true": true, "y": true, "off": false, "no": false, "false": false, "n": false,
    ]

    /// - Throws: `QMPError` quoting what cannot be read.
    init(parsing text: String) throws(QMPError) {
        var rules: [Int: [String: JSON]] = [:]
        for (index, field) in Self.fields(of: text).enumerated() {
            guard let equals = field.firstIndex(of: "=") else {
                guard index == 0 else { throw QMPError("object '\(text)': 'name=value' is expected, not '\(field)'") }
                arguments["qom-type"] = .string(field)
                continue
            }
            let name = String(field[..<equals])
            let value = String(field[field.index(after: equals)...])
            let path = name.split(separator: ".", omittingEmptySubsequences: false)
            if path.count == 3, path[0] == "rules", let number = Int(path[1]), (0..<1000).contains(number) {
                rules[number, default: [:]][String(path[2])] = .string(value)
            } else if name == "verify-peer" || name == "sanity-check" {
                guard let isOn = Self.switches[value] else { throw .parameter(name, expects: "'on' or 'off'") }
                arguments[name] = .bool(isOn)
            } else {
                arguments[name] = .string(value)
            }
        }
        if !rules.isEmpty { arguments["rules"] = .array(rules.sorted { $0.key < $1.key }.map { .object($0.value) }) }
    }

    private static func fields(of text: String) -> [String] {
        var fields = [""]
        var rest = text[...]
        while let character = rest.popFirst() {
            if character != "," {
                fields[fields.count - 1].append(character)
            } else if rest.first == "," {
                rest.removeFirst()
                fields[fields.count - 1].append(",")
            } else {
                fields.append("")
            }
        }
        return fields
    }
}
