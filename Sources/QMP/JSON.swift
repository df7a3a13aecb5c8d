/// A JSON value with exact integers.
///
/// Integers are `integer` where an `Int64` holds them and `unsigned` above that, so that equal numbers are equal values;
/// anything else with digits is a `double`.
public enum JSON: Sendable, Hashable {
    case null
    case bool(Bool)
    case integer(Int64)
    /// Above `Int64.max` only: make it with `init(_:)`.
    case unsigned(UInt64)
    case double(Double)
    case string(String)
    case array([JSON])
    /// Encoded with its names in alphabetical order.
    case object([String: JSON])

    /// An integer in its one form; beyond 64 bits the nearest double.
    public init(_ number: some BinaryInteger) {
        if let small = Int64(exactly: number) {
            self = .integer(small)
        } else if let large = UInt64(exactly: number) {
            self = .unsigned(large)
        } else {
            self = .double(Double(number))
        }
    }

    public init(_ text: String) { self = .string(text) }
}

// MARK: Looking inside

extension JSON {
    /// The member of an object; `nil` if it lacks the name or this is no object.
    public subscript(name: String) -> JSON? { objectValue?[name] }

    /// The element of an array; `nil` outside of it or if this is no array.
    public subscript(index: Int) -> JSON? {
        guard let elements = arrayValue, elements.indices.contains(index) else { return nil }
        return elements[index]
    }

    public var isNull: Bool { self == .null }

    public var boolValue: Bool? {
        guard case .bool(let value) = self else { return nil }
        return value
    }

    public var stringValue: String? {
        guard case .string(let value) = self else { return nil }
        return value
    }

    public var arrayValue: [JSON]? {
        guard case .array(let value) = self else { return nil }
        return value
    }

    public var objectValue: [String: JSON]? {
        guard case .object(let value) = self else { return nil }
        return value
    }

    /// The integer, if this is one and the type holds it.
    public func integerValue<Integer: FixedWidthInteger>(as type: Integer.Type = Int.self) -> Integer? {
        switch self {
        case .integer(let value): Integer(exactly: value)
        case .unsigned(let value): Integer(exactly: value)
        default: nil
        }
    }

    /// Any number as a double, integers rounded.
    public var doubleValue: Double? {
        switch self {
        case .integer(let value): Double(value)
        case .unsigned(let value): Double(value)
        case .double(let value): value
        default: nil
        }
    }
}

// MARK: Literals

extension JSON: ExpressibleByStringLiteral, ExpressibleByBooleanLiteral, ExpressibleByFloatLiteral,
    ExpressibleByArrayLiteral, ExpressibleByDictionaryLiteral, ExpressibleByNilLiteral, ExpressibleByIntegerLiteral
{
    public init(stringLiteral value: String) { self = .string(value) }
    public init(booleanLiteral value: Bool) { self = .bool(value) }
    public init(floatLiteral value: Double) { self = .double(value) }
    public init(integerLiteral value: Int64) { self = .integer(value) }
    public init(arrayLiteral elements: JSON...) { self = .array(elements) }
    public init(nilLiteral: ()) { self = .null }

    /// Of a name that is given twice, the last value stands.
    public init(dictionaryLiteral elements: (String, JSON)...) {
        self = .object(Dictionary(elements, uniquingKeysWith: { $1 }))
    }
}
