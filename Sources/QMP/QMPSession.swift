/// A client's request, checked for form: the command and its arguments are not looked at yet.
struct QMPRequest: Sendable, Equatable {
    var command: String
    var arguments: [String: JSON] = [:]
    var id: JSON?
    var isOutOfBand = false

    /// - Throws: `QMPError` in QEMU's words. `exec-oob` is an unknown member unless out-of-band was negotiated.
    init(_ json: JSON, outOfBandEnabled: Bool) throws(QMPError) {
        guard let members = json.objectValue else { throw QMPError("QMP input must be a JSON object") }
        id = members["id"]
        if outOfBandEnabled, members["execute"] != nil, members["exec-oob"] != nil {
            throw QMPError("QMP input member 'execute' clashes with 'exec-oob'")
        }
        let command = members["execute"] ?? (outOfBandEnabled ? members["exec-oob"] : nil)
        isOutOfBand = members["execute"] == nil && command != nil
        let verb = isOutOfBand ? "exec-oob" : "execute"
        let surplus = Set(members.keys).subtracting([verb, "arguments", "id"])
        if let first = surplus.min() { throw QMPError("QMP input member '\(first)' is unexpected") }
        guard let command else { throw QMPError("QMP input lacks member 'execute'") }
        guard let name = command.stringValue else { throw QMPError("QMP input member '\(verb)' must be a string") }
        self.command = name
        guard let arguments = members["arguments"] else { return }
        guard let named = arguments.objectValue else {
            throw QMPError("QMP input member 'arguments' must be an object")
        }
        self.arguments = named
    }
}

/// The state of one client's conversation: negotiating, then taking commands. Frames go in, steps come out.
struct QMPSession {
    enum Step: Equatable {
        /// Send this in its turn: after the replies to commands that came before.
        case reply(JSON)
        /// As `reply`, and from then on the client receives events.
        case negotiated(JSON)
        /// Run after the commands that came before.
        case run(QMPRequest)
        /// Run at once, whatever else runs.
        case runOutOfBand(QMPRequest)
        /// Send this, then close.
        case close(JSON)
    }

    static let negotiation = "qmp_capabilities"
    static let negotiationParameters: [Parameter] = [.optional("enable", .list(.enumeration(["oob"])))]
    static let alreadyNegotiated = QMPError(
        "Capabilities negotiation is already complete, command ignored", class: .commandNotFound)
    private static let notNegotiated = QMPError(
        "Expecting capabilities negotiation with '\(negotiation)'", class: .commandNotFound)

    private(set) var isNegotiated = false
    private var outOfBandEnabled = false

    static func greeting(version: QMPVersion) -> JSON {
        ["QMP": ["version": version.json, "capabilities": ["oob"]]]
    }

    static func reply(_ result: Result<JSON, QMPError>, id: JSON?) -> JSON {
        var members: [String: JSON] = [:]
        switch result {
        case .success(let value): members["return"] = value
        case .failure(let error): members["error"] = error.json
        }
        if let id { members["id"] = id }
        return .object(members)
    }

    mutating func receive(_ frame: MessageFramer.Frame) -> Step {
        switch frame {
        case .malformed(let reason): return .reply(Self.parseError(reason))
        case .tooLarge(let limit):
            let error = QMPError("The message is longer than \(limit) bytes; the connection is closed")
            return .close(Self.reply(.failure(error), id: nil))
        case .message(let text):
            do throws(JSONError) {
                return receive(try JSON(parsing: text))
            } catch {
                return .reply(Self.parseError(error.description))
            }
        }
    }

    private mutating func receive(_ json: JSON) -> Step {
        let id = json["id"]
        do throws(QMPError) {
            let request = try QMPRequest(json, outOfBandEnabled: outOfBandEnabled)
            guard !isNegotiated else { return request.isOutOfBand ? .runOutOfBand(request) : .run(request) }
            guard request.command == Self.negotiation else { throw Self.notNegotiated }
            let arguments = try Arguments(request.arguments, checkedAgainst: Self.negotiationParameters)
            outOfBandEnabled = try arguments.list(ifPresent: "enable")?.contains("oob") ?? false
            isNegotiated = true
            return .negotiated(Self.reply(.success([:]), id: id))
        } catch {
            return .reply(Self.reply(.failure(error), id: id))
        }
    }

    private static func parseError(_ reason: String) -> JSON {
        reply(.failure(QMPError("JSON parse error, \(reason)")), id: nil)
    }
}
