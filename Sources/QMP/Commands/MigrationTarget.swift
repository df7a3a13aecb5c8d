import Transport

/// Where to migrate, from the arguments of `migrate` and `migrate-incoming`: a `uri`, or QEMU's structured `channels`.
enum MigrationTarget {
    static let parameters: [Parameter] = [
        .optional("uri", .string),
        .optional(
            "channels",
            .list(
                .object([
                    .required("channel-type", .enumeration(["main", "cpr"])),
                    .required("addr", .any),
                ]))),
    ]

    /// - Throws: `QMPError` or `MigrationAddressError` quoting what cannot be used.
    static func address(_ arguments: Arguments, of command: String) throws -> MigrationAddress {
        let uri = try arguments.string(ifPresent: "uri")
        let channels = try arguments.list(ifPresent: "channels")
        switch (uri, channels) {
        case (nil, nil): throw QMPError.missing("uri")
        case (_?, _?): throw QMPError("\(command): 'uri' and 'channels' exclude each other; give one of them")
        case (let uri?, nil): return try MigrationAddress(uri)
        case (nil, let channels?): return try main(of: channels, command)
        }
    }

    private static func main(of channels: [JSON], _ command: String) throws -> MigrationAddress {
        if channels.contains(where: { $0["channel-type"] == "cpr" }) {
            throw QMPError("\(command): a channel of type 'cpr' is not supported; give one of type 'main'")
        }
        guard channels.count == 1, let address = channels[0]["addr"] else {
            throw QMPError("\(command): 'channels' has \(channels.count) entries; give one, of type 'main'")
        }
        return try self.address(address, path: "channels[0].addr")
    }

    // MARK: QAPI's MigrationAddress

    private static let transport = Parameter.required("transport", .enumeration(["socket", "exec", "rdma", "file"]))
    private static let socketType = Parameter.required("type", .enumeration(["inet", "unix", "vsock", "fd"]))

    static func address(_ json: JSON, path: String) throws -> MigrationAddress {
        guard let members = json.objectValue else { throw QMPError.wrongType(path, expected: "object") }
        /// Checks the members and gives the string of one.
        func checked(_ parameters: [Parameter]) throws {
            try Parameter.check(members, against: [transport] + parameters, path: path)
        }
        func text(_ name: String) throws -> String {
            guard let text = members[name]?.stringValue, !text.isEmpty, !text.unicodeScalars.contains("\0") else {
                throw QMPError.parameter("\(path).\(name)", expects: "a text that is not empty, without zero bytes")
            }
            return text
        }
        // The discriminator first: what else is wrong depends on it.
        try Parameter.check(members.filter { $0.key == transport.name }, against: [transport], path: path)
        switch members[transport.name]?.stringValue {
        case "socket": return try socket(members, path: path, text: text)
        case "file":
            try checked([.required("filename", .string), .required("offset", .unsigned(bits: 64))])
            guard let offset = members["offset"]?.integerValue(as: UInt64.self), offset <= UInt64(Int64.max) else {
                throw QMPError.parameter("\(path).offset", expects: "at most \(Int64.max)")
            }
            return .file(path: try text("filename"), offset: offset)
        case "exec":
            try checked([.required("args", .list(.string))])
            let words = members["args"]?.arrayValue?.compactMap(\.stringValue) ?? []
            guard words.first?.isEmpty == false else {
                throw QMPError.parameter("\(path).args", expects: "a program and its arguments")
            }
            return .exec(arguments: words)
        default: throw QMPError("\(path): transport 'rdma' is not supported; use 'socket', 'exec' or 'file'")
        }
    }

    private static func socket(
        _ members: [String: JSON], path: String, text: (String) throws -> String
    ) throws -> MigrationAddress {
        func checked(_ parameters: [Parameter]) throws {
            try Parameter.check(members, against: [transport, socketType] + parameters, path: path)
        }
        try Parameter.check(members.filter { $0.key == socketType.name }, against: [socketType], path: path)
        switch members[socketType.name]?.stringValue {
        case "inet":
            try checked([.required("host", .string), .required("port", .string)])
            let host = members["host"]?.stringValue ?? ""
            // The text form knows what a host and a port may be.
            return try MigrationAddress(MigrationAddress.tcp(host: host, port: try text("port")).description)
        case "unix":
            try checked([.required("path", .string)])
            return .unix(path: try text("path"))
        case "fd":
            try checked([.required("str", .string)])
            return .descriptor(try text("str"))
        default: throw QMPError("\(path): socket type 'vsock' is not supported; use 'inet', 'unix' or 'fd'")
        }
    }
}
