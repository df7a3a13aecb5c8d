/// The checked arguments of a command, by name and type.
///
/// Each getter comes twice: the plain one is for what the command requires, the one with `ifPresent:` gives `nil` for an
/// argument the client left out. Errors are worded as QEMU words them.
public struct Arguments: Sendable, Equatable {
    public let members: [String: JSON]

    /// - Throws: `QMPError` for a missing, surplus or ill-typed argument.
    init(_ members: [String: JSON], checkedAgainst parameters: [Parameter]) throws(QMPError) {
        try Parameter.check(members, against: parameters)
        self.members = members
    }

    /// The value as it came; `nil` if it did not.
    public subscript(name: String) -> JSON? { members[name] }

    public func string(_ name: String) throws(QMPError) -> String { try required(name, string(ifPresent: name)) }

    public func string(ifPresent name: String) throws(QMPError) -> String? {
        try value(name, expected: "string") { $0.stringValue }
    }

    public func bool(_ name: String) throws(QMPError) -> Bool { try required(name, bool(ifPresent: name)) }

    public func bool(ifPresent name: String) throws(QMPError) -> Bool? {
        try value(name, expected: "boolean") { $0.boolValue }
    }

    public func list(_ name: String) throws(QMPError) -> [JSON] { try required(name, list(ifPresent: name)) }

    public func list(ifPresent name: String) throws(QMPError) -> [JSON]? {
        try value(name, expected: "array") { $0.arrayValue }
    }

    public func object(_ name: String) throws(QMPError) -> [String: JSON] {
        try required(name, object(ifPresent: name))
    }

    public func object(ifPresent name: String) throws(QMPError) -> [String: JSON]? {
        try value(name, expected: "object") { $0.objectValue }
    }

    /// An integer of the wanted type, and within `range` if one is given.
    public func integer<Integer: FixedWidthInteger>(
        _ name: String, in range: ClosedRange<Integer> = Integer.min...Integer.max
    ) throws(QMPError) -> Integer {
        try required(name, integer(ifPresent: name, in: range))
    }

    public func integer<Integer: FixedWidthInteger>(
        ifPresent name: String, in range: ClosedRange<Integer> = Integer.min...Integer.max
    ) throws(QMPError) -> Integer? {
        guard let value = members[name] else { return nil }
        guard value.integerValue(as: Int64.self) != nil || value.integerValue(as: UInt64.self) != nil else {
            throw .wrongType(name, expected: "integer")
        }
        guard let number = value.integerValue(as: Integer.self), range.contains(number) else {
            throw .parameter(name, expects: "a value between \(range.lowerBound) and \(range.upperBound)")
        }
        return number
    }

    private func value<Value>(
        _ name: String, expected: String, _ read: (JSON) -> Value?
    )
        throws(QMPError) -> Value?
    {
        guard let json = members[name] else { return nil }
        guard let value = read(json) else { throw .wrongType(name, expected: expected) }
        return value
    }

    private func required<Value>(_ name: String, _ value: Value?) throws(QMPError) -> Value {
        guard let value else { throw .missing(name) }
        return value
    }
}
