import GuestMemory

/// `xp /FORMAT ADDRESS`: guest-physical memory in lines of 16 bytes, as QEMU's monitor prints it.
struct MemoryListing: Equatable {
    enum Style: Character { case octal = "o", signed = "d", unsigned = "u", hexadecimal = "x", characters = "c" }

    private(set) var count = 1
    private(set) var style = Style.hexadecimal
    /// 1, 2, 4 or 8.
    private(set) var unitBytes = 4
    let address: UInt64

    /// More would be a dump: `pmemsave` is for that.
    static let mostUnits = 1 << 16
    private static let lineBytes = 16

    /// - Throws: `QMPError`: an unknown letter, no address, too much.
    init(parsing words: [String]) throws(QMPError) {
        var words = words
        let format = words.first?.hasPrefix("/") == true ? words.removeFirst().dropFirst() : ""
        guard words.count == 1 else {
            throw QMPError("xp expects a format such as /4xw, which may be left out, and one address")
        }
        guard let address = Self.number(words[0]) else {
            throw QMPError("xp: '\(words[0])' is no address; give a number, decimal or 0x hexadecimal")
        }
        self.address = address
        let digits = format.prefix { $0.isASCII && $0.isNumber }
        if !digits.isEmpty {
            guard let count = Int(digits), (1...Self.mostUnits).contains(count) else {
                throw QMPError("xp: count \(digits): 1 to \(Self.mostUnits) are possible; use pmemsave for more")
            }
            self.count = count
        }
        for letter in format.dropFirst(digits.count) {
            if let style = Style(rawValue: letter) {
                self.style = style
            } else if let bytes = (["b": 1, "h": 2, "w": 4, "g": 8] as [Character: Int])[letter] {
                unitBytes = bytes
            } else {
                throw QMPError("xp: format letter '\(letter)' is not one of o d u x c and b h w g")
            }
        }
        if style == .characters { unitBytes = 1 }
    }

    /// Decimal, or hexadecimal after `0x`.
    static func number(_ text: String) -> UInt64? {
        if text.hasPrefix("0x") || text.hasPrefix("0X") {
            let digits = text.dropFirst(2)
            guard digits.first?.isHexDigit == true else { return nil }
            return UInt64(digits, radix: 16)
        }
        guard text.first?.isNumber == true else { return nil }
        return UInt64(text)
    }

    func lines(of memory: GuestMemory) -> [String] {
        var lines: [String] = []
        var left = count * unitBytes
        var position = address
        while left > 0 {
            let byteCount = min(left, Self.lineBytes)
            let head = Self.padded(String(position, radix: 16), to: 16, with: "0") + ":"
            guard let bytes = try? memory.read(at: GuestPhysicalAddress(position), count: byteCount),
                memory.isKept
            else {
                lines.append(head + " Cannot access memory")
                break
            }
            let units = stride(from: 0, to: byteCount, by: unitBytes).map { " " + text(of: bytes[$0..<$0 + unitBytes]) }
            lines.append(head + units.joined())
            left -= byteCount
            position &+= UInt64(byteCount)
        }
        return lines
    }

    private func text(of bytes: ArraySlice<UInt8>) -> String {
        let value = bytes.reversed().reduce(UInt64(0)) { $0 << 8 | UInt64($1) }
        let bits = unitBytes * 8
        switch style {
        case .hexadecimal: return "0x" + Self.padded(String(value, radix: 16), to: bits / 4, with: "0")
        case .octal:
            return Self.padded((value == 0 ? "" : "0") + String(value, radix: 8), to: (bits + 2) / 3, with: " ")
        case .unsigned: return Self.padded(String(value), to: Self.decimalDigits(bits), with: " ")
        case .signed:
            let shift = UInt64(64 - bits)
            return Self.padded(
                String(Int64(bitPattern: value << shift) >> Int64(shift)), to: Self.decimalDigits(bits), with: " ")
        case .characters: return Self.quoted(UInt8(truncatingIfNeeded: value))
        }
    }

    private static func decimalDigits(_ bits: Int) -> Int { (bits * 10 + 32) / 33 }

    private static func padded(_ text: String, to width: Int, with filler: Character) -> String {
        String(repeating: filler, count: max(0, width - text.count)) + text
    }

    private static func quoted(_ byte: UInt8) -> String {
        switch byte {
        case UInt8(ascii: "\n"): "'\\n'"
        case UInt8(ascii: "\r"): "'\\r'"
        case UInt8(ascii: "\t"): "'\\t'"
        case UInt8(ascii: "'"): "'\\''"
        case UInt8(ascii: "\\"): "'\\\\'"
        case 32...126: "'\(Character(UnicodeScalar(byte)))'"
        default: "'\\x" + padded(String(byte, radix: 16), to: 2, with: "0") + "'"
        }
    }
}
