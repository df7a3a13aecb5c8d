/// Finds where messages end in a stream of bytes: several on a line, or one over many lines.
///
/// Brackets and quotes are all it looks at; whether the text between them is JSON is the parser's to say. Bytes that no
/// message can contain (a control byte in a string, a bracket that closes another kind) end the message with an error,
/// and everything up to the next newline is skipped. The byte 0xFF starts afresh at once, also inside an unfinished
/// message: peers send it to be sure where they stand.
struct MessageFramer {
    enum Frame: Equatable {
        /// One whole message, brackets balanced.
        case message([UInt8])
        /// Bytes that are no message; the stream goes on after them.
        case malformed(String)
        /// A message longer than the limit. Nothing more comes out of this framer.
        case tooLarge(limitBytes: Int)
    }

    private enum State {
        case between, scalar, structure, string, escape, skipping, finished
    }

    static let deepestNesting = 128

    private let limitBytes: Int
    private var state = State.between
    private var buffer: [UInt8] = []
    /// The closing brackets which are due, innermost last.
    private var due: [UInt8] = []

    init(limitBytes: Int) { self.limitBytes = limitBytes }

    /// Takes what arrived, and tells what it completed, in order.
    mutating func receive(_ bytes: some Sequence<UInt8>) -> [Frame] {
        var frames: [Frame] = []
        for byte in bytes where state != .finished {
            advance(byte, &frames)
            guard buffer.count > limitBytes else { continue }
            frames.append(.tooLarge(limitBytes: limitBytes))
            state = .finished
            buffer = []
        }
        return frames
    }

    private mutating func advance(_ byte: UInt8, _ frames: inout [Frame]) {
        if byte == 0xFF { return fail("stray byte 0xff", &frames) }
        switch state {
        case .between: start(with: byte, &frames)
        case .scalar: advanceScalar(byte, &frames)
        case .structure: advanceStructure(byte, &frames)
        case .string, .escape: advanceString(byte, &frames)
        case .skipping: if byte == Self.newline { state = .between }
        case .finished: break
        }
    }

    private mutating func start(with byte: UInt8, _ frames: inout [Frame]) {
        switch byte {
        case _ where Self.isSpace(byte): break
        case UInt8(ascii: "{"), UInt8(ascii: "["): open(byte, &frames)
        case Self.quote:
            buffer.append(byte)
            state = .string
        case UInt8(ascii: "-"), UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "a")...UInt8(ascii: "z"):
            buffer.append(byte)
            state = .scalar
        default: fail("stray \(Self.name(byte))", at: byte, &frames)
        }
    }

    private mutating func advanceScalar(_ byte: UInt8, _ frames: inout [Frame]) {
        if byte > 0x20 && byte < 0x7F && !Self.isStructural(byte) {
            buffer.append(byte)
        } else {
            // The end of a bare word is known by the byte after it, which may begin the next message.
            complete(&frames)
            start(with: byte, &frames)
        }
    }

    private mutating func advanceStructure(_ byte: UInt8, _ frames: inout [Frame]) {
        switch byte {
        case UInt8(ascii: "{"), UInt8(ascii: "["): open(byte, &frames)
        case UInt8(ascii: "}"), UInt8(ascii: "]"):
            guard due.last == byte else { return fail("unexpected \(Self.name(byte))", at: byte, &frames) }
            buffer.append(byte)
            due.removeLast()
            if due.isEmpty { complete(&frames) }
        case Self.quote:
            buffer.append(byte)
            state = .string
        case 0x21..<0x7F: buffer.append(byte)
        case _ where Self.isSpace(byte): buffer.append(byte)
        default: fail("stray \(Self.name(byte))", at: byte, &frames)
        }
    }

    private mutating func advanceString(_ byte: UInt8, _ frames: inout [Frame]) {
        guard byte >= 0x20 else { return fail("\(Self.name(byte)) in a string", at: byte, &frames) }
        buffer.append(byte)
        if state == .escape {
            state = .string
        } else if byte == UInt8(ascii: "\\") {
            state = .escape
        } else if byte == Self.quote {
            if due.isEmpty { complete(&frames) } else { state = .structure }
        }
    }

    private mutating func open(_ byte: UInt8, _ frames: inout [Frame]) {
        guard due.count < Self.deepestNesting else {
            return fail("nesting deeper than \(Self.deepestNesting) levels", at: byte, &frames)
        }
        buffer.append(byte)
        due.append(byte == UInt8(ascii: "{") ? UInt8(ascii: "}") : UInt8(ascii: "]"))
        state = .structure
    }

    private mutating func complete(_ frames: inout [Frame]) {
        // One byte too many is seen by `receive`, which looks after every byte.
        guard buffer.count <= limitBytes else { return }
        frames.append(.message(buffer))
        reset(to: .between)
    }

    /// Gives up the message; `byte`, the one that broke it, may be the newline at which the next can begin.
    private mutating func fail(_ reason: String, at byte: UInt8? = nil, _ frames: inout [Frame]) {
        frames.append(.malformed(reason))
        reset(to: byte == nil || byte == Self.newline ? .between : .skipping)
    }

    private mutating func reset(to next: State) {
        buffer = []
        due = []
        state = next
    }
}

// MARK: Bytes

extension MessageFramer {
    private static let quote = UInt8(ascii: "\"")
    private static let newline = UInt8(ascii: "\n")

    private static func isSpace(_ byte: UInt8) -> Bool { byte == 0x20 || byte == 0x09 || byte == 0x0A || byte == 0x0D }

    private static func isStructural(_ byte: UInt8) -> Bool {
        switch byte {
        case UInt8(ascii: "{"), UInt8(ascii: "}"), UInt8(ascii: "["), UInt8(ascii: "]"), UInt8(ascii: ","),
            UInt8(ascii: ":"), quote:
            true
        default: false
        }
    }

    private static func name(_ byte: UInt8) -> String {
        if byte > 0x20 && byte < 0x7F { return "'\(Character(Unicode.Scalar(byte)))'" }
        let digits = String(byte, radix: 16)
        return "byte 0x" + (digits.count < 2 ? "0" + digits : digits)
    }
}
