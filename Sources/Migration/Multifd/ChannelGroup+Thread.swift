import Compression
import GuestMemory
import Host
import MigrationStream
import Synchronization
import Transport

// What the thread of one channel does.

extension ChannelGroup {
    private enum Task {
        case send(Item)
        case synchronize(UInt64)
        case end
    }

    func run(_ index: Int) {
        do {
            var sender = try PacketSender(self, channels[index])
            var synchronized: UInt64 = 0
            while true {
                switch nextTask(after: synchronized) {
                case .end: return
                case .send(let item):
                    progress.withLock { $0.queued -= 1 }
                    try sender.send(item)
                case .synchronize(let turn):
                    synchronized = turn
                    try sender.sendSync()
                    progress.withLock { $0.synchronized += 1 }
                }
            }
        } catch let error as ChannelError {
            fail(index, error)
        } catch let error as SystemError {
            fail(index, .system(error))
        } catch {
            fail(index, .unusable("\(error)"))
        }
    }

    /// Items come before a SYNC that was asked for after them.
    private func nextTask(after synchronized: UInt64) -> Task {
        work.wait { work -> Task? in
            if work.isOver { return .end }
            if !work.items.isEmpty { return .send(work.items.removeFirst()) }
            return work.synchronizations > synchronized ? .synchronize(work.synchronizations) : nil
        } ?? .end
    }

    private func fail(_ index: Int, _ error: ChannelError) {
        let named = error == .cancelled ? error : .unusable("channel \(index + 1): \(error.description)")
        progress.withLock { $0.failure = $0.failure ?? named }
    }

    /// Waits until so many bytes may go out; not longer than the round has time, or the rate stays as it is.
    func pay(_ bytes: Int) {
        let changes = pace.wait { $0.changes } ?? 0
        let wait = pacer.withLock { $0 }.sent(UInt64(bytes), at: Clock.monotonicNanoseconds)
        guard wait > 0 else { return }
        progress.withLock { $0.paying += 1 }
        pace.wait(deadline: .after(nanoseconds: wait)) { $0.isInHurry || $0.changes != changes ? () : nil }
        progress.withLock { $0.paying -= 1 }
    }
}

/// Makes packets of the pages it is given and sends them on one channel.
///
/// Contents go as they are, or through the channel's compressor, which turns the normal pages of a packet into `contentBytes` bytes.
private struct PacketSender: ~Copyable {
    private let group: ChannelGroup
    private let channel: Channel
    private let head: Mapping
    private var vector = IOVector()
    private var packet = MultifdPacket(number: 0)
    private var packer: PacketPacker?
    private var mayGoPlain = false

    init(_ group: ChannelGroup, _ channel: Channel) throws {
        let head = try Mapping(anonymousByteCount: MultifdWire.headBytes + 8 * MultifdWire.packetPages)
        if let packing = group.packing { packer = try packing.packer() } else { packer = nil }
        self.head = head
        self.group = group
        self.channel = channel
    }

    mutating func send(_ item: ChannelGroup.Item) throws(ChannelError) {
        let mapping = group.memory.blocks[item.block].mapping
        packet.block = item.block
        mayGoPlain = item.mayGoPlain
        for run in item.runs {
            for page in run {
                let offset = page.offset.value
                if item.zeroPages != .none,
                    mapping.isZeroPage(at: Int(offset), fetching: Int(offset) + RecordWriter.fetchedAheadBytes)
                {
                    packet.zero.append(offset)
                } else {
                    packet.normal.append(offset)
                }
                if packet.normal.count + packet.zero.count == MultifdWire.packetPages { try flush(item.zeroPages) }
            }
        }
        try flush(item.zeroPages)
    }

    mutating func sendSync() throws(ChannelError) {
        packet.isSync = true
        try sendPacket()
    }

    /// Sends what was gathered.
    private mutating func flush(_ zeroPages: ZeroPageDetection) throws(ChannelError) {
        if zeroPages == .legacy, !packet.zero.isEmpty {
            let found = (block: packet.block, offsets: packet.zero)
            packet.zero.removeAll()
            group.progress.withLock { $0.zeroes.append(found) }
        }
        if !packet.normal.isEmpty || !packet.zero.isEmpty { try sendPacket() }
    }

    /// Compresses the normal pages, or decides that they go plain. - Returns: whether `contentBytes` of the packer's buffer are to follow.
    private mutating func pack() throws(ChannelError) -> Bool {
        packet.contentBytes = packet.normal.count * Wire.pageSize
        packet.compression = .none
        guard let method = packer?.method, !packet.normal.isEmpty || !packet.zero.isEmpty else { return false }
        // A packet of zero pages alone has nothing to compress; QEMU wants to see the method all the same.
        packet.compression = method.onWire
        guard !packet.normal.isEmpty else { return false }
        let ranges = PacketPacking.ranges(packet.normal, in: group.memory.blocks[packet.block].mapping)
        let contents: PacketPacker.Contents?
        do throws(CompressionError) {
            contents = try packer?.pack(ranges, byteCount: packet.contentBytes, mayGoPlain: mayGoPlain)
        } catch { throw .unusable(error.description) }
        guard case .packed(let byteCount) = contents else {
            packet.compression = .none
            return false
        }
        packet.contentBytes = byteCount
        return true
    }

    /// With `x-verify`: the digests of the normal pages, as they are in guest memory, behind the packet's head. - Returns: their bytes.
    private func writeDigests() -> Int {
        guard let verification = group.verification else { return 0 }
        let (block, mapping) = (packet.block, group.memory.blocks[packet.block].mapping)
        var digests: [UInt64] = []
        digests.reserveCapacity(packet.normal.count)
        let runs = PacketPacking.runs(packet.normal)
        for run in runs { digests += verification.digests(of: run, in: block, mapping) }
        head.storeBigEndian(digests[...], at: MultifdWire.headBytes)
        verification.sent(runs, of: block, digests: digests[...])
        verification.sentZeroes(packet.zero.lazy.map { $0 / UInt64(Wire.pageSize) }, of: block)
        return digests.count * 8
    }

    private mutating func sendPacket() throws(ChannelError) {
        packet.number = group.packetNumber.add(1, ordering: .relaxed).oldValue
        let digestBytes = writeDigests()
        let isPacked = try pack()
        let isPacking = group.packing != nil
        let (normal, zero) = (UInt64(packet.normal.count), UInt64(packet.zero.count))
        head.write(group.codec.head(of: packet), at: 0)
        vector.removeAll()
        vector.append(head, offset: 0, count: MultifdWire.headBytes + digestBytes)
        if isPacked, let buffer = packer?.buffer {
            vector.append(buffer, offset: 0, count: packet.contentBytes)
        } else if normal > 0 {
            let mapping = group.memory.blocks[packet.block].mapping
            for offset in packet.normal { vector.append(mapping, offset: Int(offset), count: Wire.pageSize) }
        }
        packet.normal.removeAll(keepingCapacity: true)
        packet.zero.removeAll(keepingCapacity: true)
        packet.isSync = false
        try write()
        group.statistics.sent(bytes: 0, normal: normal, duplicate: zero, overChannels: true)
        // With a compressor also what went plain, or a round of both would seem to be smaller than it was.
        if isPacking { group.progress.withLock { $0.contentBytes += normal * UInt64(Wire.pageSize) } }
    }

    /// In pieces of what may go out at once.
    private mutating func write() throws(ChannelError) {
        while vector.byteCount > 0 {
            let bytes = min(vector.byteCount, group.writeBytes)
            group.pay(bytes)
            if bytes == vector.byteCount {
                try channel.send(&vector)
            } else {
                var piece = vector.removePrefix(bytes)
                try channel.send(&piece)
            }
            group.statistics.sent(bytes: UInt64(bytes), normal: 0, duplicate: 0, overChannels: true)
            group.progress.withLock { $0.bytes += UInt64(bytes) }
        }
    }
}
