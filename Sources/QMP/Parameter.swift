/// What a command takes under one name. Commands declare their parameters; arguments are checked before a handler runs.
public struct Parameter: Sendable {
    public let name: String
    public let kind: Kind
    public let isRequired: Bool

    public static func required(_ name: String, _ kind: Kind) -> Parameter {
        Parameter(name: name, kind: kind, isRequired: true)
    }

    public static func optional(_ name: String, _ kind: Kind) -> Parameter {
        Parameter(name: name, kind: kind, isRequired: false)
    }

    public indirect enum Kind: Sendable {
        case string
        case bool
        /// An `Int64`.
        case integer
        /// An unsigned integer of 8, 16, 32 or 64 bits.
        case unsigned(bits: Int)
        /// Any number.
        case number
        /// A string, or null which stands for the default.
        case stringOrNull
        case enumeration([String])
        case list(Kind)
        case object([Parameter])
        /// Any JSON value.
        case any
    }

    /// Checks the members of an object against the parameters: types and missing ones first, then what is too much.
    static func check(
        _ members: [String: JSON], against parameters: [Parameter], path: String = ""
    )
        throws(QMPError)
    {
        for parameter in parameters {
            let place = path.isEmpty ? parameter.name : "\(path).\(parameter.name)"
            if let value = members[parameter.name] {
                try parameter.kind.check(value, path: place, name: parameter.name)
            } else if parameter.isRequired {
                throw .missing(place)
            }
        }
        let surplus = Set(members.keys).subtracting(parameters.map(\.name))
        if let first = surplus.min() { throw .unexpected(path.isEmpty ? first : "\(path).\(first)") }
    }
}

extension Parameter.Kind {
    /// `path` leads to the value from the arguments (`capabilities[0].state`), `name` is its last member name.
    func check(_ value: JSON, path: String, name: String) throws(QMPError) {
        switch self {
        case .any: return
        case .string: try expect(value.stringValue != nil, path, "string")
        case .bool: try expect(value.boolValue != nil, path, "boolean")
        case .integer: try expect(value.integerValue(as: Int64.self) != nil, path, "integer")
        case .number: try expect(value.doubleValue != nil, path, "number")
        case .stringOrNull: try expect(value.stringValue != nil || value.isNull, path, "StrOrNull")
        case .unsigned(let bits):
            guard let number = value.integerValue(as: UInt64.self), bits >= 64 || number >> UInt64(bits) == 0 else {
                throw .parameter(path, expects: bits >= 64 ? "uint64" : "uint\(bits)_t")
            }
        case .enumeration(let names):
            guard let text = value.stringValue else { throw .wrongType(path, expected: "string") }
            guard names.contains(text) else { throw .unknownValue(text, of: name) }
        case .list(let element):
            guard let elements = value.arrayValue else { throw .wrongType(path, expected: "array") }
            for (index, item) in elements.enumerated() {
                try element.check(item, path: "\(path)[\(index)]", name: "\(path)[\(index)]")
            }
        case .object(let parameters):
            guard let members = value.objectValue else { throw .wrongType(path, expected: "object") }
            try Parameter.check(members, against: parameters, path: path)
        }
    }

    private func expect(_ holds: Bool, _ path: String, _ type: String) throws(QMPError) {
        guard holds else { throw .wrongType(path, expected: type) }
    }
}
