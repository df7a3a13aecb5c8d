/// A quantity that cannot be read, as one sentence.
public struct QuantityError: Error, Equatable, Sendable, CustomStringConvertible {
    public let description: String
    init(_ description: String) { self.description = description }
}

/// A number of bytes as people write it: `4096`, `512M`, `1G`. K, M, G and T are powers of 1024.
public struct ByteSize: Hashable, Sendable {
    public let bytes: UInt64

    public init(bytes: UInt64) { self.bytes = bytes }

    /// - Throws: `QuantityError` for anything else, and for more than 64 bits hold.
    public init(_ text: String) throws(QuantityError) {
        let suffixes: [(String, UInt64)] = [("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30), ("T", 1 << 40), ("", 1)]
        bytes = try scaled(
            text, by: suffixes, ignoringCase: true, form: "a number of bytes, with K, M, G or T for powers of 1024")
    }
}

/// A length of time as people write it: `300ms`, `2s`, `500us`.
public struct TimeSpan: Hashable, Sendable {
    public let nanoseconds: UInt64

    public init(nanoseconds: UInt64) { self.nanoseconds = nanoseconds }

    /// - Throws: `QuantityError` for anything else: a bare number is not guessed at, except for 0.
    public init(_ text: String) throws(QuantityError) {
        let suffixes: [(String, UInt64)] = [("ns", 1), ("us", 1000), ("ms", 1_000_000), ("s", 1_000_000_000)]
        nanoseconds =
            text == "0"
            ? 0 : try scaled(text, by: suffixes, ignoringCase: false, form: "a time such as 300ms, 2s or 500us")
    }
}

/// The number before the first suffix that fits, times the suffix.
private func scaled(
    _ text: String, by suffixes: [(text: String, factor: UInt64)], ignoringCase: Bool, form: String
) throws(QuantityError) -> UInt64 {
    let compared = ignoringCase ? text.uppercased() : text
    guard let suffix = suffixes.first(where: { compared.hasSuffix($0.text) }) else {
        throw QuantityError("'\(text)' is not \(form)")
    }
    let digits = text.dropLast(suffix.text.count)
    // UInt64 would take a sign, too.
    guard !digits.isEmpty, digits.utf8.allSatisfy({ (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) }) else {
        throw QuantityError("'\(text)' is not \(form)")
    }
    guard let number = UInt64(digits), case (let product, false) = number.multipliedReportingOverflow(by: suffix.factor)
    else { throw QuantityError("'\(text)' is more than 64 bits hold") }
    return product
}
