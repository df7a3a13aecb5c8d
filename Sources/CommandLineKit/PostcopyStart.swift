import QMP

/// When a guest moves before its memory: `after=N` rounds of precopy (0: at once), or once a migration is `stalled`.
public enum PostcopyStart: Equatable, Sendable {
    case afterRounds(UInt64)
    /// The VM's verdict is that precopy would never end.
    case whenStalled

    /// - Throws: `QuantityError` for anything else.
    public init(_ text: String) throws(QuantityError) {
        let number = text.hasPrefix("after=") ? UInt64(text.dropFirst("after=".count)) : nil
        if let number {
            self = .afterRounds(number)
        } else if text == "stalled" {
            self = .whenStalled
        } else {
            throw QuantityError("\"\(text)\" is neither after=N, such as after=1, nor stalled")
        }
    }

    /// Whether the guest should move now.
    public func isDue(_ reading: MigrationReading) -> Bool {
        switch self {
        case .afterRounds(0): return ["setup", "active"].contains(reading.status)
        // Pages are collected before a round, and before the next.
        case .afterRounds(let count): return reading.status == "active" && reading.round > count
        case .whenStalled: return reading.status == "active" && reading.verdict?.state == .notConverging
        }
    }

    static func capabilities(_ on: Bool, preempts: Bool) -> JSON {
        var list: [JSON] = [["capability": "postcopy-ram", "state": .bool(on)]]
        if preempts { list.append(["capability": "postcopy-preempt", "state": .bool(on)]) }
        return .array(list)
    }
}
