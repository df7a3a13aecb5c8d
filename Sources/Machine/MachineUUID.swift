/// A machine's UUID, as `--uuid` gives it one.
public struct MachineUUID: Hashable, Sendable, CustomStringConvertible {
    /// The first eight bytes, and the last.
    public let high: UInt64
    public let low: UInt64

    public init(high: UInt64, low: UInt64) {
        self.high = high
        self.low = low
    }

    /// What a machine has that was given none.
    public static let none = MachineUUID(high: 0, low: 0)

    private static let groups = [8, 4, 4, 4, 12]

    /// - Parameter text: 32 hexadecimal digits in groups of 8, 4, 4, 4 and 12, with hyphens between them.
    /// - Returns: `nil` for anything else.
    public init?(_ text: String) {
        let parts = text.split(separator: "-", omittingEmptySubsequences: false)
        guard parts.map(\.utf8.count) == Self.groups else { return nil }
        let digits = parts.joined()
        guard digits.utf8.allSatisfy({ Character(UnicodeScalar($0)).isHexDigit }),
            let high = UInt64(digits.prefix(16), radix: 16), let low = UInt64(digits.suffix(16), radix: 16)
        else { return nil }
        self.init(high: high, low: low)
    }

    public var description: String {
        let digits = [high, low].map { number in
            let text = String(number, radix: 16)
            return String(repeating: "0", count: 16 - text.count) + text
        }.joined()
        var rest = digits[...]
        return Self.groups.map { count in
            defer { rest = rest.dropFirst(count) }
            return rest.prefix(count)
        }.joined(separator: "-")
    }
}
