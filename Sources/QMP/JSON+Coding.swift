import FoundationEssentials

/// Text that is not JSON: why, in a few words.
public struct JSONError: Error, Equatable, Sendable, CustomStringConvertible {
    public let description: String
    init(_ description: String) { self.description = description }
}

extension JSON {
    /// Reads one JSON text (UTF-8, at most 512 levels deep).
    ///
    /// The parser is Foundation's: it takes a comma before a closing bracket, and the first of two equal names.
    /// - Throws: `JSONError` for anything that is not JSON, for bad UTF-8 and for numbers no `Double` can hold.
    public init(parsing text: some Sequence<UInt8>) throws(JSONError) {
        do {
            self = try JSONDecoder().decode(JSON.self, from: Data(text))
        } catch let error as DecodingError {
            throw JSONError(error.reason)
        } catch {
            throw JSONError("\(error)")
        }
    }

    /// The text of the value on one line, UTF-8, names in alphabetical order.
    public func encoded() -> [UInt8] { text(formatting: [.sortedKeys, .withoutEscapingSlashes]) }

    /// The text over several lines with indentation, for people.
    public var prettyDescription: String {
        String(decoding: text(formatting: [.sortedKeys, .withoutEscapingSlashes, .prettyPrinted]), as: UTF8.self)
    }

    private func text(formatting: JSONEncoder.OutputFormatting) -> [UInt8] {
        let encoder = JSONEncoder()
        encoder.outputFormatting = formatting
        // The encoder refuses only numbers that are not finite, and `encode(to:)` hands it none.
        guard let data = try? encoder.encode(self) else { return Array("null".utf8) }
        return [UInt8](data)
    }
}

extension JSON: CustomStringConvertible {
    /// The text on one line.
    public var description: String { String(decoding: encoded(), as: UTF8.self) }
}

extension JSON: Codable {
    private struct MemberName: CodingKey {
        let stringValue: String
        var intValue: Int? { nil }
        init(stringValue: String) { self.stringValue = stringValue }
        init?(intValue: Int) { nil }
    }

    public init(from decoder: any Decoder) throws {
        if let container = try? decoder.container(keyedBy: MemberName.self) {
            var members: [String: JSON] = [:]
            for name in container.allKeys { members[name.stringValue] = try container.decode(JSON.self, forKey: name) }
            self = .object(members)
        } else if var container = try? decoder.unkeyedContainer() {
            var elements: [JSON] = []
            while !container.isAtEnd { elements.append(try container.decode(JSON.self)) }
            self = .array(elements)
        } else {
            self = try JSON(scalar: try decoder.singleValueContainer())
        }
    }

    private init(scalar container: any SingleValueDecodingContainer) throws {
        if container.decodeNil() {
            self = .null
        } else if let value = try? container.decode(String.self) {
            self = .string(value)
        } else if let value = try? container.decode(Int64.self) {
            self = .integer(value)
        } else if let value = try? container.decode(Bool.self) {
            self = .bool(value)
        } else if let value = try? container.decode(UInt64.self) {
            self = JSON(value)
        } else if let value = try? container.decode(Double.self) {
            self = .double(value)
        } else {
            // A string that is broken inside says so; a number too large is none.
            self = .string(try container.decode(String.self))
        }
    }

    /// A double that is not finite is written as null: JSON has no word for it.
    public func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        switch self {
        case .null: try container.encodeNil()
        case .bool(let value): try container.encode(value)
        case .integer(let value): try container.encode(value)
        case .unsigned(let value): try container.encode(value)
        case .double(let value) where value.isFinite: try container.encode(value)
        case .double: try container.encodeNil()
        case .string(let value): try container.encode(value)
        case .array(let value): try container.encode(value)
        case .object(let value): try container.encode(value)
        }
    }
}

extension DecodingError {
    /// What the parser disliked, without Foundation's frame around it.
    fileprivate var reason: String {
        // A number is the only value that is found and then fits no type.
        guard case .dataCorrupted(let context) = self else { return "a number beyond the range of a double" }
        // SAFETY: nobody else holds this error, so nobody changes its dictionary meanwhile.
        guard let cause = context.underlyingError as? CocoaError,
            let words = unsafe cause.userInfo["NSDebugDescription"] as? String
        else { return context.debugDescription }
        let sentence = words.hasSuffix(".") ? String(words.dropLast()) : words
        return sentence.prefix(1).lowercased() + sentence.dropFirst()
    }
}
