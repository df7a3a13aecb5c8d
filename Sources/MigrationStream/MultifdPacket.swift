/// What the channels besides the main one carry: QEMU's multifd, see ``MultifdGreeting`` and ``MultifdPacket``.
public enum MultifdWire {
    /// The first four bytes of a channel, and of each packet on it.
    public static let magic: UInt32 = 0x1122_3344
    /// The only version that is spoken.
    public static let version: UInt32 = 1
    /// The most pages of a packet: 512 KiB.
    public static let packetPages = 128
    /// Bytes of a packet's head, whatever it holds.
    public static let headBytes = 320 + 8 * packetPages

    static func checkOpening(_ buffer: ReceiveBuffer, position: UInt64) throws(StreamError) {
        guard buffer.be32(0) == magic else { throw StreamError(.multifd(.magic(buffer.be32(0))), position: position) }
        guard buffer.be32(4) == version else {
            throw StreamError(.multifd(.version(buffer.be32(4))), position: position)
        }
    }
}

/// How the contents of a packet's normal pages are written: the number in bits 1 to 5 of its flags.
public enum MultifdCompression: UInt8, Sendable {
    /// As they are, 4096 bytes each.
    case none = 0
    case zlib = 1
    case zstd = 2
}

/// A packet on a channel: a head of 1344 bytes, and behind it the contents of its normal pages.
///
///     be32 magic 0x11223344, be32 version 1
///     be32 flags                  bit 0 SYNC, bits 1 to 5 ``MultifdCompression``
///     be32 room for pages (128), be32 normal pages, be32 bytes of contents
///     be64 number of the packet
///     be32 zero pages             QEMU 9.0 and newer, and Godwit; older ones write 0 and do not look
///     reserved (28 bytes), name of the block, filled up with zeros (256 bytes)
///     be64 offset in the block    for each normal page, then for each zero page, then room up to 128
///
/// SYNC: everything that was sent on this channel before belongs before the mark on the main channel (``RAMFlags/multifdFlush``, or
/// the end of a section of RAM). A packet without pages may say anything in its other fields: QEMU leaves there what was before.
public struct MultifdPacket: Hashable, Sendable {
    /// Whether the sender now waits for the main channel.
    public var isSync: Bool
    public var compression: MultifdCompression
    public var number: UInt64
    /// Index of the block; meaningless without pages.
    public var block: Int
    /// Offsets of the pages whose contents follow, in their order.
    public var normal: [UInt64]
    /// Offsets of pages that are zero.
    public var zero: [UInt64]
    /// Bytes that follow the head.
    public var contentBytes: Int

    public init(
        isSync: Bool = false, compression: MultifdCompression = .none, number: UInt64, block: Int = 0,
        normal: [UInt64] = [], zero: [UInt64] = [], contentBytes: Int? = nil
    ) {
        self.isSync = isSync
        self.compression = compression
        self.number = number
        self.block = block
        self.normal = normal
        self.zero = zero
        self.contentBytes = contentBytes ?? normal.count * Wire.pageSize
    }
}

/// Encodes and decodes the heads of packets. Contents never pass through it.
public struct MultifdCodec: Sendable {
    private let names: [[UInt8]]
    private let lengths: [UInt64]
    private let blocks: [RAMBlockDescription]
    /// The only one that packets may have; `nil`: any that is known.
    private let compression: MultifdCompression?

    private static let nameOffset = 64
    private static let nameBytes = 256
    private static let offsetsStart = nameOffset + nameBytes

    public init(blocks: [RAMBlockDescription], compression: MultifdCompression? = .some(.none)) {
        self.blocks = blocks
        self.compression = compression
        names = blocks.map { Array($0.name.utf8) }
        lengths = blocks.map(\.length)
        precondition(names.allSatisfy { $0.count < Self.nameBytes }, "MultifdCodec: block name of more than 255 bytes")
    }

    /// The head; the contents must follow.
    public func head(of packet: MultifdPacket) -> [UInt8] {
        let pages = packet.normal.count + packet.zero.count
        precondition(pages <= MultifdWire.packetPages, "MultifdCodec: number of pages")
        var writer = StreamWriter()
        writer.be32(MultifdWire.magic)
        writer.be32(MultifdWire.version)
        writer.be32(UInt32(packet.compression.rawValue) << 1 | (packet.isSync ? 1 : 0))
        writer.be32(UInt32(MultifdWire.packetPages))
        writer.be32(UInt32(packet.normal.count))
        writer.be32(UInt32(packet.contentBytes))
        writer.be64(packet.number)
        writer.be32(UInt32(packet.zero.count))
        writer.append(repeating: 0, count: Self.nameOffset - writer.bytes.count)
        if pages > 0 { writer.append(names[packet.block]) }
        writer.append(repeating: 0, count: Self.offsetsStart - writer.bytes.count)
        for offset in packet.normal { writer.be64(offset) }
        for offset in packet.zero { writer.be64(offset) }
        writer.append(repeating: 0, count: MultifdWire.headBytes - writer.bytes.count)
        return writer.take()
    }

    /// Reads a head; ``MultifdPacket/contentBytes`` bytes of contents follow.
    ///
    /// - Parameter position: bytes of the channel before this head, for the error.
    /// - Returns: `nil` when the buffer does not hold a whole one.
    public func next(from buffer: inout ReceiveBuffer, position: UInt64) throws(StreamError) -> MultifdPacket? {
        guard buffer.count >= MultifdWire.headBytes else { return nil }
        try MultifdWire.checkOpening(buffer, position: position)
        func fault(_ fault: MultifdFault) -> StreamError { StreamError(.multifd(fault), position: position) }

        let flags = buffer.be32(8)
        guard flags <= 0x3f else { throw fault(.flags(flags)) }
        var packet = MultifdPacket(isSync: flags & 1 != 0, number: buffer.be64(24))
        let (normal, zero) = (buffer.be32(16), buffer.be32(32))
        if normal != 0 || zero != 0 {
            guard let method = MultifdCompression(rawValue: UInt8(flags >> 1)), method == compression ?? method else {
                throw fault(.compression(got: flags >> 1, agreed: compression ?? .none))
            }
            packet.compression = method
            let room = buffer.be32(12)
            guard room <= MultifdWire.packetPages else { throw fault(.room(room)) }
            guard normal <= room, zero <= room - normal else { throw fault(.pages(normal: normal, zero: zero, room)) }
            packet.block = try block(of: buffer, position)
            packet.normal = try offsets(Int(normal), at: 0, of: packet.block, buffer, position)
            packet.zero = try offsets(Int(zero), at: Int(normal), of: packet.block, buffer, position)
            // Without normal pages nothing follows, whatever is written there.
            packet.contentBytes =
                normal == 0 ? 0 : try contentBytes(buffer.be32(20), normal: Int(normal), method, position)
        }
        buffer.consume(MultifdWire.headBytes)
        return packet
    }

    private func contentBytes(
        _ count: UInt32, normal: Int, _ compression: MultifdCompression, _ position: UInt64
    ) throws(StreamError) -> Int {
        let whole = normal * Wire.pageSize
        let isRight =
            compression == .none ? Int(count) == whole : (1...StreamLimit.multifdContentBytes).contains(Int(count))
        guard isRight else {
            throw StreamError(.multifd(.contents(count, normal: normal)), position: position)
        }
        return Int(count)
    }

    private func block(of buffer: ReceiveBuffer, _ position: UInt64) throws(StreamError) -> Int {
        var length = 0
        while length < Self.nameBytes, buffer[Self.nameOffset + length] != 0 { length += 1 }
        guard length < Self.nameBytes else { throw StreamError(.multifd(.endlessName), position: position) }
        for index in names.indices
        where names[index].count == length && buffer.holds(names[index], at: Self.nameOffset) {
            return index
        }
        guard let name = buffer.text(Self.nameOffset..<(Self.nameOffset + length)) else {
            throw StreamError(.nameNotText(what: "a packet's RAM block"), position: position)
        }
        throw StreamError(.unknownBlock(name: name), position: position)
    }

    private func offsets(
        _ count: Int, at first: Int, of block: Int, _ buffer: ReceiveBuffer, _ position: UInt64
    ) throws(StreamError) -> [UInt64] {
        var offsets: [UInt64] = []
        offsets.reserveCapacity(count)
        for index in first..<(first + count) {
            let offset = buffer.be64(Self.offsetsStart + 8 * index)
            guard offset & RAMFlags.mask == 0, offset < lengths[block] else {
                throw StreamError(
                    .multifd(.offset(block: blocks[block].name, offset, length: lengths[block])), position: position)
            }
            offsets.append(offset)
        }
        return offsets
    }
}

/// What is wrong with a greeting or a packet's head.
public enum MultifdFault: Hashable, Sendable {
    case magic(UInt32)
    case version(UInt32)
    case channelCount(UInt32, most: Int)
    case kind(UInt8)
    case channel(UInt8, of: Int)
    case flags(UInt32)
    case compression(got: UInt32, agreed: MultifdCompression)
    case room(UInt32)
    case pages(normal: UInt32, zero: UInt32, UInt32)
    case endlessName
    case offset(block: String, UInt64, length: UInt64)
    case contents(UInt32, normal: Int)
    /// Compressed contents that could not be unpacked: the sentence of the library's wrapper.
    case packed(String)

    var sentence: String {
        switch self {
        case .packed(let sentence): sentence
        case .magic(let magic): "0x\(hexadecimal(UInt64(magic), digits: 8)) begins no packet of a multifd channel"
        case .version(let version):
            "version \(version) of multifd channels is not supported, only \(MultifdWire.version)"
        case .channelCount(let count, let most): "\(count) channels are announced, not 1 to \(most)"
        case .kind(let kind): "a channel is of kind \(kind), which is not known"
        case .channel(let channel, let count):
            "the channel calls itself \(channel), the last one possible is \(count - 1)"
        case .flags(let flags): "a packet has unknown flags 0x\(hexadecimal(UInt64(flags)))"
        case .compression(let got, let agreed):
            "a packet is compressed by method \(got), and '\(agreed)' was agreed on; "
                + "set multifd-compression alike on both sides"
        case .room(let pages): "a packet has room for \(pages) pages, more than \(MultifdWire.packetPages)"
        case .pages(let normal, let zero, let room):
            "a packet has \(normal) normal and \(zero) zero pages, and room for \(room)"
        case .endlessName: "the name of a packet's RAM block has no end"
        case .offset(let block, let offset, let length):
            "a packet names offset 0x\(hexadecimal(offset)), which is no page of RAM block '\(block)' of "
                + "0x\(hexadecimal(length)) bytes"
        case .contents(let count, let normal):
            "\(count) bytes of contents do not fit a packet of \(normal) normal pages"
        }
    }
}
