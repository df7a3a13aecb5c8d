public import QMP

/// A QMP command as people write it on a command line.
public struct QMPMessage: Equatable, Sendable {
    public let command: String
    public let arguments: JSON
    public let isOutOfBand: Bool

    /// A name and `key=value` words, or one word of JSON. A value is JSON where it can be read as such, else a text.
    public init(words: [String]) throws(CommandFailure) {
        guard let first = words.first else { throw CommandFailure("a QMP command has a name") }
        if first.drop(while: \.isWhitespace).first == "{" {
            try self.init(json: words.joined(separator: " "))
            return
        }
        var arguments: [String: JSON] = [:]
        for word in words.dropFirst() {
            let parts = word.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            guard parts.count == 2, !parts[0].isEmpty else {
                throw CommandFailure("argument '\(word)' of \(first) is not of the form key=value")
            }
            arguments[String(parts[0])] = (try? JSON(parsing: parts[1].utf8)) ?? .string(String(parts[1]))
        }
        self.init(command: first, arguments: .object(arguments), isOutOfBand: false)
    }

    /// `{"execute": ..., "arguments": ...}`, or `exec-oob`. An `id` is not needed: the client has its own.
    private init(json text: String) throws(CommandFailure) {
        let json: JSON
        do throws(JSONError) { json = try JSON(parsing: text.utf8) } catch {
            throw CommandFailure("'\(text.prefix(120))' is not JSON: \(error)")
        }
        guard let name = (json["execute"] ?? json["exec-oob"])?.stringValue else {
            throw CommandFailure("'\(text.prefix(120))' is no QMP command: it has no \"execute\"")
        }
        self.init(command: name, arguments: json["arguments"] ?? [:], isOutOfBand: json["execute"] == nil)
    }

    private init(command: String, arguments: JSON, isOutOfBand: Bool) {
        self.command = command
        self.arguments = arguments
        self.isOutOfBand = isOutOfBand
    }

    public func run(on client: QMPClient) throws(QMPClientError) -> JSON {
        try client.execute(command, arguments, outOfBand: isOutOfBand)
    }

    /// The answer to a line: `{"return": ...}` or `{"error": ...}`. A line that is no command is answered by us.
    /// - Throws: `QMPClientError` when the VM does not answer.
    public static func answer(toLine line: String, on client: QMPClient) throws(QMPClientError) -> JSON {
        let message: QMPMessage
        do throws(CommandFailure) {
            let words = line.split(whereSeparator: \.isWhitespace).map(String.init)
            message = line.drop(while: \.isWhitespace).first == "{" ? try Self(json: line) : try Self(words: words)
        } catch {
            return ["error": ["class": "GenericError", "desc": .string(error.description)]]
        }
        do throws(QMPClientError) {
            return ["return": try message.run(on: client)]
        } catch {
            guard case .refused(let refusal) = error else { throw error }
            return ["error": ["class": .string(refusal.errorClass.rawValue), "desc": .string(refusal.description)]]
        }
    }

    /// An event as the protocol writes it.
    public static func json(of event: QMPEvent) -> JSON {
        var members: [String: JSON] = [
            "event": .string(event.name),
            "timestamp": [
                "seconds": JSON(event.microseconds / 1_000_000), "microseconds": JSON(event.microseconds % 1_000_000),
            ],
        ]
        if event.data != [:] { members["data"] = event.data }
        return .object(members)
    }
}
