import GuestMemory
import Host
import MigrationStream
import Transport

/// Reads one connection: decodes the stream's words, and puts page contents straight into guest memory.
struct PageReceiver: ~Copyable {
    private let channel: Channel
    private let memory: GuestMemory
    private let statistics: IncomingStatistics
    private var decoder: StreamDecoder
    private var buffer = ReceiveBuffer(capacity: bulkBytes)
    /// Pages that hold data already: a zero page must clear them, and must not touch others.
    private let received: [DirtyBitmap]
    /// Pages that came as zero: a delta may refer to those, too, but to no page that never came.
    private let zeroed: [DirtyBitmap]
    /// What the decoder rejected; no item comes after it.
    private(set) var failure: StreamError?
    /// The stream carries batches: read little ahead, so that most page contents go to guest memory without a stop here.
    private var hasBatches = false
    private var vector = IOVector()
    private var pending = (normal: UInt64(0), duplicate: UInt64(0))
    /// Whether this connection is the source's: a stranger's bytes do not count.
    var isCounted = false
    /// Bytes of the stream that were told to `statistics`.
    private var countedBytes: UInt64 = 0

    private static let bulkBytes = 512 << 10
    private static let batchAheadBytes = 4 << 10
    private static let hugePageBytes: UInt64 = 2 << 20

    init(
        _ channel: Channel, memory: GuestMemory, blocks: [RAMBlockDescription], catalogue: SectionCatalogue,
        statistics: IncomingStatistics
    ) throws(SystemError) {
        var received: [DirtyBitmap] = []
        var zeroed: [DirtyBitmap] = []
        for block in memory.blocks {
            received.append(try DirtyBitmap(pageCount: block.pageCount))
            zeroed.append(try DirtyBitmap(pageCount: block.pageCount))
        }
        self.channel = channel
        self.memory = memory
        self.statistics = statistics
        self.received = received
        self.zeroed = zeroed
        decoder = StreamDecoder(.load(blocks: blocks, catalogue: catalogue))
    }

    /// The next item; `nil` at the end of the stream, or when `failure` was found. - Throws: when the connection fails.
    mutating func next() throws(ChannelError) -> StreamItem? {
        while failure == nil {
            do throws(StreamError) {
                if let item = try decoder.next(from: &buffer) {
                    // Whoever acts on the end of a round, or of all, has seen its pages counted.
                    if case .ramSectionEnded = item { count(force: true) }
                    return item
                }
            } catch {
                failure = error
                return nil
            }
            count(force: true)
            if try fill() == 0 {
                decoder.inputHasEnded = true
                defer { count(force: true) }
                do throws(StreamError) {
                    if let item = try decoder.next(from: &buffer) { return item }
                    try decoder.checkEnd(buffer)
                } catch { failure = error }
                return nil
            }
        }
        return nil
    }

    private mutating func fill() throws(ChannelError) -> Int {
        let channel = channel
        let limit = hasBatches ? Self.batchAheadBytes : Self.bulkBytes
        return try unsafe buffer.fill(atLeast: 4096) { (room) throws(ChannelError) in
            try unsafe channel.receive(into: UnsafeMutableRawBufferPointer(rebasing: room.prefix(limit)))
        }
    }

    /// Puts the pages of an item into guest memory.
    mutating func place(_ item: StreamItem) throws(ChannelError) {
        switch item {
        case .page(let block, let offset):
            try place(block, offset: offset, count: Wire.pageSize)
            mark(block, offset: offset, pages: 1)
            pending.normal += 1
        case .zeroPage(let block, let offset):
            clear(block, offset: offset, pages: 1)
            pending.duplicate += 1
        case .pageBatch(let block, let runs): try place(block, runs)
        case .pageDelta(let block, let offset, let count): try applyDelta(block, offset: offset, count: count)
        default: break
        }
        count(force: false)
    }

    private mutating func count(force: Bool) {
        guard isCounted, force || pending.normal + pending.duplicate >= 256 else { return }
        let position = decoder.position
        statistics.received(
            bytes: position - countedBytes, normal: pending.normal, duplicate: pending.duplicate)
        countedBytes = position
        pending = (0, 0)
    }

    /// Payload nobody wants. It may be cut off: then nothing comes after it.
    mutating func skipPayload() throws(ChannelError) {
        while decoder.payloadBytes > 0 {
            if buffer.isEmpty, try fill() == 0 {
                failure = StreamError(.truncated(inside: "the description of the machine"), position: decoder.position)
                return
            }
            let count = min(buffer.count, decoder.payloadBytes)
            buffer.consume(count)
            decoder.payloadConsumed(count)
        }
    }

    // MARK: Contents

    /// One range: first what was read ahead, the rest from the channel.
    private mutating func place(_ block: Int, offset: UInt64, count: Int) throws(ChannelError) {
        let mapping = memory.blocks[block].mapping
        let ahead = min(buffer.count, count)
        take(ahead, into: mapping, at: Int(offset))
        if ahead < count {
            vector.removeAll()
            vector.append(mapping, offset: Int(offset) + ahead, count: count - ahead)
            try channel.receive(&vector)
        }
        decoder.payloadConsumed(count)
    }

    /// A difference to what the page holds: all of it is read and checked before a byte is changed.
    private mutating func applyDelta(_ block: Int, offset: UInt64, count: Int) throws(ChannelError) {
        while buffer.count < count {
            guard try fill() > 0 else {
                failure = StreamError(.truncated(inside: "the delta of a page"), position: decoder.position)
                return
            }
        }
        let name = memory.blocks[block].name
        let page = RAMOffset(offset).page
        let isThere = received[block].contains(page)
        guard isThere || zeroed[block].contains(page) else {
            failure = StreamError(.deltaWithoutPage(block: name, offset: offset), position: decoder.position)
            return
        }
        if let damage = Self.apply(buffer, count, to: memory.blocks[block].mapping, at: Int(offset)) {
            failure = StreamError(.deltaDamaged(block: name, offset: offset, damage), position: decoder.position)
            return
        }
        buffer.consume(count)
        decoder.payloadConsumed(count)
        if !isThere { mark(block, offset: offset, pages: 1) }
    }

    private static func apply(
        _ buffer: borrowing ReceiveBuffer, _ count: Int, to mapping: Mapping, at offset: Int
    ) -> XBZRLE.Damage? {
        let delta = buffer.bytes.extracting(first: count)
        do throws(XBZRLE.Damage) {
            try unsafe mapping.withMutableBytes(at: offset, count: Wire.pageSize) { page throws(XBZRLE.Damage) in
                try unsafe XBZRLE.apply(delta, to: page)
            }
            return nil
        } catch { return error }
    }

    private mutating func take(_ count: Int, into mapping: Mapping, at offset: Int) {
        guard count > 0 else { return }
        unsafe mapping.withMutableBytes(at: offset, count: count) { target in _ = unsafe buffer.move(to: target) }
    }

    private mutating func place(_ block: Int, _ runs: [PageRun]) throws(ChannelError) {
        hasBatches = true
        let mapping = memory.blocks[block].mapping
        let total = decoder.payloadBytes
        vector.removeAll()
        for run in runs {
            guard run.kind == .data else {
                clear(block, offset: run.offset, pages: UInt64(run.pages))
                pending.duplicate += UInt64(run.pages)
                continue
            }
            backWithHugePages(block, run)
            mark(block, offset: run.offset, pages: UInt64(run.pages))
            pending.normal += UInt64(run.pages)
            let ahead = min(buffer.count, Int(run.length))
            take(ahead, into: mapping, at: Int(run.offset))
            vector.append(mapping, offset: Int(run.offset) + ahead, count: Int(run.length) - ahead)
        }
        if vector.byteCount > 0 { try channel.receive(&vector) }
        decoder.payloadConsumed(total)
    }

    /// A run that fills a whole huge page is worth one: the first touch costs a sixth per page then.
    private func backWithHugePages(_ block: Int, _ run: PageRun) {
        guard run.offset % Self.hugePageBytes == 0, run.length >= Self.hugePageBytes,
            received[block].nextRun(
                from: RAMOffset(run.offset).page, limit: 1
            ).map({ $0.lowerBound.offset.value >= run.offset + run.length }) ?? true
        else { return }
        // Only advice: where the host has no huge pages, small ones serve.
        try? memory.blocks[block].mapping.advise(
            .hugePages, at: Int(run.offset), count: Int(run.length / Self.hugePageBytes * Self.hugePageBytes))
    }

    // MARK: What has been received

    private mutating func mark(_ block: Int, offset: UInt64, pages: UInt64) {
        received[block].set(RAMOffset(offset).page..<PageIndex(offset / 4096 + pages))
    }

    private mutating func clear(_ block: Int, offset: UInt64, pages: UInt64) {
        let end = PageIndex(offset / 4096 + pages)
        zeroed[block].set(RAMOffset(offset).page..<end)
        var position = RAMOffset(offset).page
        while let run = received[block].nextRun(from: position, limit: pages), run.lowerBound < end {
            let part = run.clamped(to: position..<end)
            memory.blocks[block].mapping.zero(
                at: Int(part.lowerBound.offset.value), count: Int(part.upperBound.value - part.lowerBound.value) * 4096)
            position = part.upperBound
        }
    }
}
