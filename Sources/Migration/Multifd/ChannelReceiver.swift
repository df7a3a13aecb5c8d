import Compression
import GuestMemory
import Host
import MigrationStream
import Transport

/// Reads one channel of an incoming migration: decodes the heads of packets, and receives contents straight into guest memory.
struct ChannelReceiver: ~Copyable {
    private let channel: Channel
    private let memory: GuestMemory
    private let codec: MultifdCodec
    private let received: ReceivedPages
    private let statistics: IncomingStatistics
    /// What was read before it was known what the connection is, then one head at a time.
    private var buffer: ReceiveBuffer
    private var vector = IOVector()
    /// Bytes of the channel before the next head.
    private var position = UInt64(MultifdGreeting.byteCount)
    /// How the first packet with pages was compressed, and what unpacks such.
    private var compression: MultifdCompression?
    private var unpacker: PacketUnpacker?
    /// A Godwit sends packets plain that would not shrink.
    private let mayMix: Bool
    private let verification: IncomingVerification?
    private let populating: PopulateAhead?
    /// Where the digests of a packet arrive.
    private let digests: Mapping?

    /// - Parameters:
    ///   - ahead: what came behind the greeting and was read with it.
    ///   - mayMix: whether plain packets may come among compressed ones.
    init(
        _ channel: Channel, behind ahead: consuming ReceiveBuffer, memory: GuestMemory, blocks: [RAMBlockDescription],
        received: ReceivedPages, statistics: IncomingStatistics, mayMix: Bool,
        verification: IncomingVerification? = nil, populating: PopulateAhead? = nil
    ) throws(SystemError) {
        var digests: Mapping?
        if verification != nil { digests = try Mapping(anonymousByteCount: 8 * MultifdWire.packetPages) }
        self.channel = channel
        self.memory = memory
        self.received = received
        self.statistics = statistics
        self.mayMix = mayMix
        self.verification = verification
        self.populating = populating
        self.digests = digests
        unpacker = nil
        buffer = ahead
        codec = MultifdCodec(blocks: blocks, compression: nil)
        statistics.received(bytes: position, normal: 0, duplicate: 0, overChannels: true)
    }

    /// The next packet, whose contents must be placed before the one after it; `nil` when the channel ends behind a packet.
    /// - Throws: `ChannelError`, or the `StreamError` of a packet that is none.
    mutating func next() throws -> MultifdPacket? {
        while true {
            if let packet = try codec.next(from: &buffer, position: position) {
                position += UInt64(MultifdWire.headBytes)
                statistics.received(
                    bytes: UInt64(MultifdWire.headBytes), normal: 0, duplicate: 0, overChannels: true)
                return packet
            }
            let channel = channel
            // Not more than the head: what follows goes into guest memory without a stop here.
            let missing = MultifdWire.headBytes - buffer.count
            let count = try unsafe buffer.fill(atLeast: missing) { (room) throws(ChannelError) in
                try unsafe channel.receive(into: UnsafeMutableRawBufferPointer(rebasing: room.prefix(missing)))
            }
            if count > 0 { continue }
            guard buffer.isEmpty else {
                throw ChannelError.endOfStream(
                    peer: channel.peer, received: buffer.count, wanted: MultifdWire.headBytes)
            }
            return nil
        }
    }

    /// Puts the pages of a packet into guest memory.
    /// - Throws: `ChannelError`; the `StreamError` of contents that cannot be unpacked; `CompressionError` where the library is not here.
    mutating func place(_ packet: MultifdPacket) throws {
        try check(packet)
        let normal = PacketPacking.runs(packet.normal)
        if normal.count == 1, packet.normal.count == MultifdWire.packetPages {
            populating?.reached(packet.normal[0], of: packet.block)
        }
        received.mark(normal, of: packet.block)
        if !normal.isEmpty {
            if packet.compression == .none {
                try unpacker?.sawPlain()
                try receive(normal, of: packet)
            } else {
                try unpack(packet)
            }
        }
        for run in PacketPacking.runs(packet.zero) { received.clear(run, of: packet.block) }
        verify(packet, normal)
        position += UInt64(packet.contentBytes + digestBytes(packet))
        statistics.received(
            bytes: UInt64(packet.contentBytes + digestBytes(packet)), normal: UInt64(packet.normal.count),
            duplicate: UInt64(packet.zero.count), overChannels: true)
    }

    /// The first compressed packet decides what the channel is compressed with.
    private mutating func check(_ packet: MultifdPacket) throws {
        if let compression, packet.compression != compression, !(mayMix && packet.compression == .none),
            !(mayMix && compression == .none)
        {
            throw StreamError(
                .multifd(.compression(got: UInt32(packet.compression.rawValue), agreed: compression)),
                position: position)
        }
        if packet.compression != .none || compression == nil { compression = packet.compression }
        if unpacker == nil, let method = CompressionMethod(packet.compression) {
            unpacker = try PacketUnpacker(method, packetBytes: PacketPacking.packetBytes)
        }
    }

    private mutating func unpack(_ packet: MultifdPacket) throws {
        guard let room = unpacker?.buffer else { return }
        let count = packet.contentBytes
        vector.removeAll()
        expectDigests(packet)
        let ahead = min(buffer.count, count)
        if ahead > 0 { unsafe room.withMutableBytes(at: 0, count: ahead) { _ = unsafe buffer.move(to: $0) } }
        vector.append(room, offset: ahead, count: count - ahead)
        if vector.byteCount > 0 { try channel.receive(&vector) }
        do throws(CompressionError) {
            let ranges = PacketPacking.ranges(packet.normal, in: memory.blocks[packet.block].mapping)
            try unpacker?.unpack(count: count, into: ranges)
        } catch { throw StreamError(.multifd(.packed(sentence(of: error, packet))), position: position) }
    }

    /// What broke may have come in an earlier packet: all of them are one compressed stream.
    private func sentence(of error: CompressionError, _ packet: MultifdPacket) -> String {
        let first = packet.normal.first.map { String($0, radix: 16) } ?? ""
        let pages =
            "\(packet.normal.count) pages of RAM block '\(memory.blocks[packet.block].name)' from offset 0x\(first) on"
        let before = verification?.mismatchesSoFar.map { "; before them came \($0)" } ?? ""
        return "\(error.description) (\(pages)\(before))"
    }

    private mutating func receive(_ runs: [Range<PageIndex>], of packet: MultifdPacket) throws(ChannelError) {
        let mapping = memory.blocks[packet.block].mapping
        vector.removeAll()
        expectDigests(packet)
        for run in runs {
            let start = Int(run.lowerBound.offset.value)
            let count = Int(run.upperBound.value - run.lowerBound.value) * Wire.pageSize
            let ahead = min(buffer.count, count)
            if ahead > 0 {
                unsafe mapping.withMutableBytes(at: start, count: ahead) { _ = unsafe buffer.move(to: $0) }
            }
            vector.append(mapping, offset: start + ahead, count: count - ahead)
        }
        if vector.byteCount > 0 { try channel.receive(&vector) }
    }

    // MARK: Digests (`x-verify`)

    private func digestBytes(_ packet: MultifdPacket) -> Int { digests == nil ? 0 : 8 * packet.normal.count }

    /// They stand between the head and the contents.
    private mutating func expectDigests(_ packet: MultifdPacket) {
        guard let digests else { return }
        let count = digestBytes(packet)
        let ahead = min(buffer.count, count)
        if ahead > 0 { unsafe digests.withMutableBytes(at: 0, count: ahead) { _ = unsafe buffer.move(to: $0) } }
        vector.append(digests, offset: ahead, count: count - ahead)
    }

    private func verify(_ packet: MultifdPacket, _ normal: [Range<PageIndex>]) {
        guard let verification, let digests else { return }
        let values = packet.normal.indices.map { digests.load(at: 8 * $0, as: UInt64.self).byteSwapped }
        verification.received(normal, of: packet.block, in: memory.blocks[packet.block].mapping, digests: values[...])
        for run in PacketPacking.runs(packet.zero) { verification.receivedZeroes(run, of: packet.block) }
    }
}
