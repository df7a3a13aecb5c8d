/// Where a migration goes to or comes from: QEMU's migration URI, parsed. `description` gives the URI back.
///
/// The cases are also what QMP's structured `channels` argument says (`MigrationAddress` in QEMU's QAPI schema).
public enum MigrationAddress: Equatable, Hashable, Sendable {
    /// `tcp:HOST:PORT`. An empty host listens on all addresses, and connects to this machine; port "0" listens on one the
    /// kernel chooses. The host has no brackets here.
    case tcp(host: String, port: String)
    /// `unix:PATH`.
    case unix(path: String)
    /// `fd:NUMBER`, inherited when the process started, or `fd:NAME`, passed by QMP `getfd`.
    case descriptor(String)
    /// `exec:COMMAND` (then the arguments are `/bin/sh -c COMMAND`), or a program with its arguments.
    case exec(arguments: [String])
    /// `file:PATH[,offset=N]`; the stream starts at byte `offset` of the file.
    case file(path: String, offset: UInt64)

    /// The schemes this build knows, as they appear in error sentences.
    public static let schemes = ["tcp", "unix", "fd", "exec", "file"]

    /// A shell command as QEMU runs it.
    public static func command(_ text: String) -> MigrationAddress { .exec(arguments: ["/bin/sh", "-c", text]) }

    /// Parses a migration URI. - Throws: `MigrationAddressError`, a sentence which quotes the URI.
    public init(_ uri: String) throws(MigrationAddressError) {
        guard let colon = uri.firstIndex(of: ":") else { throw MigrationAddressError(uri, .noScheme) }
        let rest = String(uri[uri.index(after: colon)...])
        guard !rest.unicodeScalars.contains("\0") else { throw MigrationAddressError(uri, .zeroByte) }
        switch uri[..<colon] {
        case "tcp":
            self = try Self.tcp(rest, in: uri)
        case "unix":
            guard !rest.isEmpty else { throw MigrationAddressError(uri, .empty("path")) }
            self = .unix(path: rest)
        case "fd":
            guard !rest.isEmpty else { throw MigrationAddressError(uri, .empty("descriptor")) }
            self = .descriptor(rest)
        case "exec":
            guard !rest.allSatisfy(\.isWhitespace) else { throw MigrationAddressError(uri, .empty("command")) }
            self = .command(rest)
        case "file":
            self = try Self.file(rest, in: uri)
        default:
            throw MigrationAddressError(uri, .unknownScheme(String(uri[..<colon])))
        }
    }

    private static func tcp(_ text: String, in uri: String) throws(MigrationAddressError) -> MigrationAddress {
        if let comma = text.firstIndex(of: ",") { throw MigrationAddressError(uri, .option(String(text[comma...]))) }
        let host: Substring
        let tail: Substring
        if text.hasPrefix("[") {
            guard let close = text.firstIndex(of: "]") else { throw MigrationAddressError(uri, .openBracket) }
            host = text[text.index(after: text.startIndex)..<close]
            tail = text[text.index(after: close)...]
        } else {
            let end = text.firstIndex(of: ":") ?? text.endIndex
            host = text[..<end]
            tail = text[end...]
        }
        guard tail.first == ":" else { throw MigrationAddressError(uri, .empty("port")) }
        let port = tail.dropFirst()
        guard !port.contains(":") else { throw MigrationAddressError(uri, .bareColons) }
        guard !port.isEmpty else { throw MigrationAddressError(uri, .empty("port")) }
        let isService =
            port.first?.isLetter == true && port.allSatisfy { $0.isASCII && ($0.isLetter || $0.isNumber || $0 == "-") }
        guard isService || (port.allSatisfy { $0.isASCII && $0.isNumber } && UInt16(port) != nil) else {
            throw MigrationAddressError(uri, .port(String(port)))
        }
        return .tcp(host: String(host), port: String(port))
    }

    private static let offsetOption = ",offset="

    private static func file(_ text: String, in uri: String) throws(MigrationAddressError) -> MigrationAddress {
        var path = text
        var offset: UInt64 = 0
        if let start = Self.start(of: offsetOption, in: text) {
            path = String(text[..<start])
            let number = String(text[text.index(start, offsetBy: offsetOption.count)...])
            guard let value = ByteCount.parse(number), value <= UInt64(Int64.max) else {
                throw MigrationAddressError(uri, .offset(number))
            }
            offset = value
        }
        guard !path.isEmpty else { throw MigrationAddressError(uri, .empty("path")) }
        return .file(path: path, offset: offset)
    }

    /// The first place of `word` in `text`, as QEMU looks for the option.
    private static func start(of word: String, in text: String) -> String.Index? {
        text.indices.first { text[$0...].hasPrefix(word) }
    }
}

extension MigrationAddress: CustomStringConvertible {
    public var description: String {
        switch self {
        case .tcp(let host, let port): host.contains(":") ? "tcp:[\(host)]:\(port)" : "tcp:\(host):\(port)"
        case .unix(let path): "unix:\(path)"
        case .descriptor(let name): "fd:\(name)"
        case .exec(let arguments): "exec:\(Self.commandText(arguments))"
        case .file(let path, let offset): offset == 0 ? "file:\(path)" : "file:\(path),offset=\(offset)"
        }
    }

    /// The text a shell would take: what `exec:` said, or the arguments quoted where they need it.
    static func commandText(_ arguments: [String]) -> String {
        if arguments.count == 3, arguments[0] == "/bin/sh", arguments[1] == "-c" { return arguments[2] }
        let plain = Set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:=,@%+")
        return arguments.map { word in
            if !word.isEmpty, word.allSatisfy(plain.contains) { return word }
            return "'" + word.map { $0 == "'" ? "'\\''" : String($0) }.joined() + "'"
        }.joined(separator: " ")
    }
}

/// A migration URI that cannot be used: the URI, what is wrong with it, and what would be right.
public struct MigrationAddressError: Error, Equatable, Sendable, CustomStringConvertible {
    public enum Reason: Equatable, Sendable {
        case noScheme
        case unknownScheme(String)
        /// A part that must not be empty.
        case empty(String)
        case port(String)
        case offset(String)
        /// A comma option of `tcp:`.
        case option(String)
        case openBracket
        case bareColons
        case zeroByte
    }

    public let uri: String
    public let reason: Reason

    public init(_ uri: String, _ reason: Reason) {
        self.uri = uri
        self.reason = reason
    }

    public var description: String {
        let schemes = MigrationAddress.schemes.map { $0 + ":" }.joined(separator: ", ")
        let words =
            switch reason {
            case .noScheme: "it has no scheme; it starts with one of \(schemes)"
            case .unknownScheme(let name): "the scheme \"\(name)\" is not known; the possible ones are \(schemes)"
            case .empty(let part): "its \(part) is missing"
            case .port(let text): "\"\(text)\" is no port; it is a number from 0 to 65535 or a service name"
            case .offset(let text):
                "\"\(text)\" is no offset; it is a byte count, decimal or 0x hexadecimal, or decimal with K, M, G or T"
            case .option(let text): "the option \"\(text)\" is not supported; leave it out"
            case .openBracket: "the bracket of its IPv6 address is not closed"
            case .bareColons: "it has too many colons; an IPv6 address stands in brackets, as in tcp:[::1]:4444"
            case .zeroByte: "it contains a zero byte"
            }
        return "migration address \"\(uri)\": \(words)"
    }
}

/// Byte counts as QEMU's options write them.
enum ByteCount {
    private static let shifts: [Character: UInt64] = ["B": 0, "K": 10, "M": 20, "G": 30, "T": 40]

    /// `4096`, `0x1000`, `4K`, `2g`: `nil` for anything else, and for what does not fit in 64 bits.
    static func parse(_ text: String) -> UInt64? {
        if text.hasPrefix("0x") || text.hasPrefix("0X") { return digits(text.dropFirst(2), radix: 16) }
        guard let last = text.last, let shift = shifts[Character(last.uppercased())] else {
            return digits(text[...], radix: 10)
        }
        guard let number = digits(text.dropLast(), radix: 10) else { return nil }
        let (product, overflow) = number.multipliedReportingOverflow(by: 1 << shift)
        return overflow ? nil : product
    }

    private static func digits(_ text: Substring, radix: Int) -> UInt64? {
        guard let first = text.first, first.isHexDigit else { return nil }
        return UInt64(text, radix: radix)
    }
}
