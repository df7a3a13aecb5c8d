extension GuestProgram {
    private static let common = ["fill=SIZE|all|none", "words=N", "heartbeat=TIME", "seed=N"]
    private static let walking = ["working-set=SIZE", "rate=SIZE", "random", "sequential", "stride=PAGES"]
    private static let sizeForm = "a multiple of 4K such as 64M or 1G"

    /// The parameters a guest takes, in the form they are written.
    static func parameters(of kind: Kind) -> [String] {
        switch kind {
        case .idle: common
        case .dirty: common + walking
        case .probe: common + walking + ["read", "write"]
        }
    }

    /// Read a guest's description: `NAME[,key=value|,flag]...`.
    ///
    /// Sizes take the suffixes K, M, G and T (powers of 1024), times ns, us, ms and s. A rate is a size per second, and 0 means
    /// no limit. Each parameter may be given once.
    public init(parsing text: String) throws(GuestProgramError) {
        let fields = text.split(separator: ",", omittingEmptySubsequences: false).map(String.init)
        guard let name = fields.first, let kind = Kind.allCases.first(where: { $0.name == name }) else {
            throw .unknownGuest(name: fields.first ?? "")
        }
        self.init(kind)
        var seen: Set<String> = []
        for field in fields.dropFirst() {
            let parts = field.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
            let key = parts[0]
            let subject = Self.subject(of: key)
            guard let form = Self.parameters(of: kind).first(where: { $0.prefix { $0 != "=" } == key }) else {
                throw .unknownParameter(guest: name, parameter: field, possible: Self.parameters(of: kind))
            }
            guard seen.insert(subject).inserted else {
                throw .repeatedParameter(guest: name, parameter: key)
            }
            guard form.contains("=") == (parts.count == 2) else {
                let value = parts.count == 2 ? parts[1] : ""
                throw .badValue(guest: name, parameter: key, value: value, expected: "the form \(form)")
            }
            try apply(key, parts.count == 2 ? parts[1] : "")
        }
    }

    /// What a parameter decides: opposites decide the same.
    private static func subject(of key: String) -> String {
        switch key {
        case "random", "sequential": "order"
        case "read", "write": "access"
        default: key
        }
    }

    private mutating func apply(_ key: String, _ value: String) throws(GuestProgramError) {
        switch key {
        case "fill":
            switch value {
            case "all": fill = .all
            case "none": fill = .none
            default:
                let bytes = try size(key, value, orElse: "'all', 'none' or \(Self.sizeForm)")
                fill = bytes == 0 ? .none : .bytes(bytes)
            }
        case "words": wordsPerPage = try number(key, value, in: 1...512)
        case "heartbeat":
            guard let time = Quantity.nanoseconds(value), time <= 3_600_000_000_000 else {
                throw badValue(key, value, "a time such as 500us, 2ms or 1s, up to an hour; 0 for none")
            }
            heartbeatNanoseconds = time
        case "seed": seed = try number(key, value, in: 0...UInt64.max)
        case "working-set":
            let bytes = try size(key, value, orElse: Self.sizeForm)
            guard bytes > 0 else { throw badValue(key, value, Self.sizeForm) }
            workingSetBytes = bytes
        case "rate":
            guard let rate = Quantity.bytes(value), rate <= 1 << 50 else {
                throw badValue(key, value, "bytes per second such as 800M; 0 for no limit")
            }
            rateBytesPerSecond = rate == 0 ? nil : rate
        case "stride": stridePages = try number(key, value, in: 1...1 << 32)
        case "random": order = .random
        case "sequential": order = .sequential
        case "read": probeWrites = false
        default: probeWrites = true
        }
    }

    private func badValue(_ key: String, _ value: String, _ expected: String) -> GuestProgramError {
        .badValue(guest: kind.name, parameter: key, value: value, expected: expected)
    }

    private func size(_ key: String, _ value: String, orElse form: String) throws(GuestProgramError) -> UInt64 {
        guard let bytes = Quantity.bytes(value), bytes % GuestLayout.pageBytes == 0 else {
            throw badValue(key, value, form)
        }
        return bytes
    }

    private func number(
        _ key: String, _ value: String, in range: ClosedRange<UInt64>
    ) throws(GuestProgramError) -> UInt64 {
        guard let number = Quantity.number(value), range.contains(number) else {
            throw badValue(key, value, "a number from \(range.lowerBound) to \(range.upperBound)")
        }
        return number
    }
}

/// Numbers with units, as the command line writes them. All return nil for anything else, overflow included.
enum Quantity {
    /// Decimal digits, or hexadecimal ones behind `0x`.
    static func number(_ text: some StringProtocol) -> UInt64? {
        let hexadecimal = text.hasPrefix("0x")
        let digits = hexadecimal ? text.dropFirst(2) : text[...]
        guard let first = digits.first, first != "+", first != "-" else { return nil }
        return UInt64(digits, radix: hexadecimal ? 16 : 10)
    }

    static func bytes(_ text: String) -> UInt64? {
        scaled(text, by: [("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30), ("T", 1 << 40), ("", 1)])
    }

    static func nanoseconds(_ text: String) -> UInt64? {
        if text == "0" { return 0 }
        return scaled(text, by: [("ns", 1), ("us", 1000), ("ms", 1_000_000), ("s", 1_000_000_000)])
    }

    private static func scaled(_ text: String, by units: [(suffix: String, factor: UInt64)]) -> UInt64? {
        guard let unit = units.first(where: { text.hasSuffix($0.suffix) }),
            let number = number(text.dropLast(unit.suffix.count))
        else { return nil }
        let (product, overflow) = number.multipliedReportingOverflow(by: unit.factor)
        return overflow ? nil : product
    }
}
