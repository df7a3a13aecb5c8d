/// What passes between two Godwits on the channel of a safety net (`x-postcopy-safety-net`), in the order in which it is met:
///
///     source                                                     destination
///       KEPT n: the last epoch that it has whole, 0 at first  ------>|  on every connection, first
///       |<----------------  PAGES, ZEROES ..., SECTION ..., END n + 1
///       KEPT n + 1                                            ------>|  what the guest said in that epoch may be heard
///       ...
///       |<-----------------------------------------------------  STAYS
///       RELEASED                                              ------>|  nothing is given back any more
///
/// Each message begins with 16 bytes: be16 kind, be16 block, be32 count, be64 value.
public enum EpochMessage: Hashable, Sendable {
    /// Pages side by side; their contents follow as payload (``EpochDecoder/payloadBytes``).
    case pages(block: Int, first: UInt64, count: Int)
    case zeroes(block: Int, first: UInt64, count: UInt64)
    case section(DeviceSection)
    /// All since the last end is that epoch. `guestRuns`: false when it was paused.
    case end(epoch: UInt64, guestRuns: Bool)
    /// The guest stays at the destination: all of its memory is there, or its operator said so.
    case stays
    /// The source has that epoch whole.
    case kept(epoch: UInt64)
    /// The source will never take the guest back.
    case released

    enum Kind: UInt16 {
        case invalid = 0
        case pages = 1
        case zeroes = 2
        case section = 3
        case end = 4
        case stays = 5
        case kept = 6
        case released = 7
    }

    /// Bytes at the start of each.
    public static let headBytes = 16
    /// Pages of one message.
    public static let mostPages = 1024

    /// The bytes of the message, without a payload of pages.
    public var bytes: [UInt8] {
        switch self {
        case .pages(let block, let first, let count): Self.head(.pages, block, UInt32(count), first)
        case .zeroes(let block, let first, let count): Self.head(.zeroes, block, UInt32(count), first)
        case .section(let section): Self.bytes(of: section)
        case .end(let epoch, let guestRuns): Self.head(.end, 0, guestRuns ? 1 : 0, epoch)
        case .stays: Self.head(.stays, 0, 0, 0)
        case .kept(let epoch): Self.head(.kept, 0, 0, epoch)
        case .released: Self.head(.released, 0, 0, 0)
        }
    }

    private static func head(_ kind: Kind, _ block: Int, _ count: UInt32, _ value: UInt64) -> [UInt8] {
        var writer = StreamWriter()
        writer.be16(kind.rawValue)
        writer.be16(UInt16(truncatingIfNeeded: block))
        writer.be32(count)
        writer.be64(value)
        return writer.bytes
    }

    /// Behind the head: the name with its length in a byte, be32 instance, be32 version, the body.
    private static func bytes(of section: DeviceSection) -> [UInt8] {
        var writer = StreamWriter()
        writer.name(section.name)
        writer.be32(section.instance)
        writer.be32(section.version)
        writer.append(section.body)
        return head(.section, 0, UInt32(writer.bytes.count), 0) + writer.bytes
    }
}

/// Why something on the channel of a safety net was rejected.
public enum EpochFault: Hashable, Sendable {
    case kind(UInt16)
    case outside(block: UInt16, first: UInt64, count: UInt32)
    case sectionLength(UInt32)
    case sectionName
    case tooMuch(what: String)
    case order(epoch: UInt64, behind: UInt64)

    var sentence: String {
        switch self {
        case .kind(let kind): "message \(kind) of a safety net is not known"
        case .outside(let block, let first, let count):
            "\(count) pages from page \(first) of RAM block \(block) on are not in this machine"
        case .sectionLength(let length): "a section of an epoch has \(length) bytes"
        case .sectionName: "the name of a section of an epoch is not text"
        case .tooMuch(let what): "an epoch has more \(what) than this machine"
        case .order(let epoch, let last): "epoch \(epoch) comes behind epoch \(last)"
        }
    }
}

/// Decodes what comes on the channel of a safety net, at either end, by being asked like ``StreamDecoder``.
public struct EpochDecoder: Sendable {
    private let blocks: [RAMBlockDescription]
    /// Bytes of pages to take by the caller before the next message.
    public private(set) var payloadBytes = 0
    private var position: UInt64 = 0
    /// Of the epoch that is being read, which the guest's memory and ``StreamLimit`` bound.
    private var (pages, sections, stateBytes) = (UInt64(0), 0, 0)
    private var failure: StreamError?

    private static let sectionHeadBytes = 1 + 8
    private static let mostStateBytes = 64 << 20

    public init(_ blocks: [RAMBlockDescription]) { self.blocks = blocks }

    public mutating func payloadConsumed(_ count: Int) {
        precondition(count >= 0 && count <= payloadBytes, "EpochDecoder: more payload consumed than there is")
        payloadBytes -= count
        position += UInt64(count)
    }

    /// The next message, or nil when `buffer` does not hold a whole one. The first error is final.
    public mutating func next(from buffer: inout ReceiveBuffer) throws(StreamError) -> EpochMessage? {
        precondition(payloadBytes == 0, "EpochDecoder: payload was not taken")
        if let failure { throw failure }
        do throws(StreamError) { return try read(&buffer) } catch {
            failure = error
            throw error
        }
    }

    private mutating func read(_ buffer: inout ReceiveBuffer) throws(StreamError) -> EpochMessage? {
        guard buffer.count >= EpochMessage.headBytes else { return nil }
        let (block, count, value) = (buffer.be16(2), buffer.be32(4), buffer.be64(8))
        guard let kind = EpochMessage.Kind(rawValue: buffer.be16(0)), kind != .invalid else {
            throw error(.kind(buffer.be16(0)))
        }
        let message: EpochMessage
        switch kind {
        case .invalid: throw error(.kind(0))
        case .pages, .zeroes:
            try check(block, value, count, most: kind == .pages ? EpochMessage.mostPages : .max)
            if kind == .pages { payloadBytes = Int(count) * Wire.pageSize }
            message =
                kind == .pages
                ? .pages(block: Int(block), first: value, count: Int(count))
                : .zeroes(block: Int(block), first: value, count: UInt64(count))
        case .section:
            guard (Self.sectionHeadBytes...(StreamLimit.sectionBodyBytes + 512)).contains(Int(count)) else {
                throw error(.sectionLength(count))
            }
            guard buffer.count >= EpochMessage.headBytes + Int(count) else { return nil }
            message = .section(try section(Int(count), buffer))
            advance(Int(count), in: &buffer)
        case .end:
            (pages, sections, stateBytes) = (0, 0, 0)
            message = .end(epoch: value, guestRuns: count & 1 != 0)
        case .stays: message = .stays
        case .kept: message = .kept(epoch: value)
        case .released: message = .released
        }
        advance(EpochMessage.headBytes, in: &buffer)
        return message
    }

    private mutating func check(
        _ block: UInt16, _ first: UInt64, _ count: UInt32, most: Int
    ) throws(StreamError) {
        guard Int(block) < blocks.count, (1...most).contains(Int(count)) else {
            throw error(.outside(block: block, first: first, count: count))
        }
        let all = blocks[Int(block)].length / UInt64(Wire.pageSize)
        guard first < all, UInt64(count) <= all - first else {
            throw error(.outside(block: block, first: first, count: count))
        }
        pages += UInt64(count)
        // A page comes once in an epoch.
        guard pages <= blocks.reduce(0, { $0 + $1.length / UInt64(Wire.pageSize) }) else {
            throw error(.tooMuch(what: "pages"))
        }
    }

    private mutating func section(_ count: Int, _ buffer: ReceiveBuffer) throws(StreamError) -> DeviceSection {
        let start = EpochMessage.headBytes
        let nameBytes = Int(buffer[start])
        guard count >= Self.sectionHeadBytes + nameBytes else { throw error(.sectionLength(UInt32(count))) }
        guard let name = buffer.text(start + 1..<start + 1 + nameBytes) else { throw error(.sectionName) }
        (sections, stateBytes) = (sections + 1, stateBytes + count)
        guard sections <= StreamLimit.sections, stateBytes <= Self.mostStateBytes else {
            throw error(.tooMuch(what: "device state"))
        }
        let rest = start + 1 + nameBytes
        return DeviceSection(
            name: name, instance: buffer.be32(rest), version: buffer.be32(rest + 4),
            body: buffer.copy(rest + 8..<start + count))
    }

    private func error(_ fault: EpochFault) -> StreamError { StreamError(.epoch(fault), position: position) }

    private mutating func advance(_ count: Int, in buffer: inout ReceiveBuffer) {
        buffer.consume(count)
        position += UInt64(count)
    }
}
