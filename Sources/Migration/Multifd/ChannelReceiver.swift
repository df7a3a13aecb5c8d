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

    /// - Parameter ahead: what came behind the greeting and was read with it.
    init(
        _ channel: Channel, behind ahead: consuming ReceiveBuffer, memory: GuestMemory, blocks: [RAMBlockDescription],
        received: ReceivedPages, statistics: IncomingStatistics
    ) {
        self.channel = channel
        self.memory = memory
        self.received = received
        self.statistics = statistics
        buffer = ahead
        codec = MultifdCodec(blocks: blocks)
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
    mutating func place(_ packet: MultifdPacket) throws(ChannelError) {
        let normal = Self.runs(packet.normal)
        received.mark(normal, of: packet.block)
        if !normal.isEmpty { try receive(normal, of: packet.block) }
        for run in Self.runs(packet.zero) { received.clear(run, of: packet.block) }
        position += UInt64(packet.contentBytes)
        statistics.received(
            bytes: UInt64(packet.contentBytes), normal: UInt64(packet.normal.count),
            duplicate: UInt64(packet.zero.count), overChannels: true)
    }

    private mutating func receive(_ runs: [Range<PageIndex>], of block: Int) throws(ChannelError) {
        let mapping = memory.blocks[block].mapping
        vector.removeAll()
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

    /// Neighbours in the list that are neighbours in memory, joined; the order stays.
    private static func runs(_ offsets: [UInt64]) -> [Range<PageIndex>] {
        var runs: [Range<PageIndex>] = []
        for offset in offsets {
            let page = RAMOffset(offset).page
            if let last = runs.last, last.upperBound == page {
                runs[runs.count - 1] = last.lowerBound..<page.advanced(by: 1)
            } else {
                runs.append(page..<page.advanced(by: 1))
            }
        }
        return runs
    }
}
