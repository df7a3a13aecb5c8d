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
    private let received: ReceivedPages
    /// What the decoder rejected; no item comes after it.
    private(set) var failure: StreamError?
    /// The stream carries batches: read little ahead, so that most page contents go to guest memory without a stop here.
    private var hasBatches = false
    private var vector = IOVector()
    private var pending = (normal: UInt64(0), duplicate: UInt64(0))
    /// Where the pages of blocks stand in the file (`mapped-ram`), as far as it was read.
    private(set) var regions: [MappedRegion] = []
    /// Whether this connection is the source's: a stranger's bytes do not count.
    var isCounted = false
    /// Digests come with the pages.
    var verification: IncomingVerification?
    /// Pages go where they are missing, and nowhere else (postcopy).
    var placer: PagePlacer?
    private let populating: PopulateAhead?
    /// Single pages that came one behind the other, up to this one.
    private var single: (block: Int, pages: UInt64, end: UInt64) = (0, 0, 0)
    /// Bytes of the stream that were told to `statistics`.
    private var countedBytes: UInt64 = 0

    private static let bulkBytes = 512 << 10
    private static let batchAheadBytes = 4 << 10
    private static let hugePageBytes: UInt64 = 2 << 20

    /// - Parameter ahead: what was read before it was known what the connection is.
    init(
        _ channel: Channel, behind ahead: [UInt8], memory: GuestMemory, blocks: [RAMBlockDescription],
        catalogue: SectionCatalogue, received: ReceivedPages, statistics: IncomingStatistics,
        populating: PopulateAhead? = nil
    ) {
        var decoder = StreamDecoder(.load(blocks: blocks, catalogue: catalogue))
        decoder.tellsEndOfRecords = true
        decoder.allowsPostcopy = true
        // Channels begin where the stream does; part of it was read already. (A device like /dev/null always says 0.)
        if let position = try? channel.filePosition(), position >= UInt64(ahead.count) {
            decoder.fileOffset = position - UInt64(ahead.count)
        }
        self.init(
            channel, behind: ahead, memory: memory, decoder: decoder, received: received, statistics: statistics,
            populating: populating)
    }

    /// - Parameter decoder: of what comes on the connection.
    init(
        _ channel: Channel, behind ahead: [UInt8], memory: GuestMemory, decoder: StreamDecoder, received: ReceivedPages,
        statistics: IncomingStatistics, populating: PopulateAhead? = nil
    ) {
        self.channel = channel
        self.memory = memory
        self.statistics = statistics
        self.received = received
        self.populating = populating
        self.decoder = decoder
        countedBytes = decoder.position
        buffer.append(ahead)
    }

    deinit { try? placer?.close() }

    /// For the next connection, which goes on at a section's head.
    var decoderForRecovery: StreamDecoder {
        var next = decoder
        next.connectionReplaced()
        return next
    }

    /// The next item; `nil` at the end of the stream, or when `failure` was found. - Throws: when the connection fails.
    mutating func next() throws(ChannelError) -> StreamItem? {
        while failure == nil {
            let item: StreamItem?
            do throws(StreamError) { item = try decoder.next(from: &buffer) } catch {
                failure = error
                try closePlacer()
                return nil
            }
            if case .mappedBlock(let region)? = item {
                regions.append(region)
                try jump()
                continue
            }
            if let item {
                if !item.isPages { try closePlacer() }
                // Whoever acts on the end of a round, or of all, has seen its pages counted.
                if case .ramSectionEnded = item { count(force: true) }
                return item
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

    /// Over a block's bitmap and pages.
    private mutating func jump() throws(ChannelError) {
        let ahead = min(buffer.count, decoder.payloadBytes)
        buffer.consume(ahead)
        try channel.skip(UInt64(decoder.payloadBytes - ahead))
        decoder.payloadConsumed(decoder.payloadBytes)
        // What was jumped over comes from elsewhere.
        countedBytes = decoder.position
    }

    private mutating func fill() throws(ChannelError) -> Int {
        // What is here does not wait for what is not.
        try flush()
        let channel = channel
        let limit = hasBatches ? Self.batchAheadBytes : Self.bulkBytes
        return try unsafe buffer.fill(atLeast: 4096) { (room) throws(ChannelError) in
            try unsafe channel.receive(into: UnsafeMutableRawBufferPointer(rebasing: room.prefix(limit)))
        }
    }

    /// Postcopy: what came whole is placed, whatever becomes of the connection. Nobody else would do it: it is claimed.
    private func flush() throws(ChannelError) {
        if let placer { try Self.placing { () throws(SystemError) in try placer.flush() } }
    }

    /// The same, also of a huge page that is not whole: nothing more may come here.
    private func closePlacer() throws(ChannelError) {
        if let placer { try Self.placing { () throws(SystemError) in try placer.close() } }
    }

    /// Puts the pages of an item into guest memory.
    mutating func place(_ item: StreamItem) throws(ChannelError) {
        if let placer {
            try place(item, with: placer)
            return count(force: false)
        }
        switch item {
        case .page(let block, let offset):
            // Before its contents: if these are cut off, zeros that come later must clear what is there.
            received.mark(Self.range(offset, 1), of: block)
            noteSingle(block, offset)
            try place(block, offset: offset, count: Wire.pageSize)
            pending.normal += 1
        case .zeroPage(let block, let offset):
            received.clear(Self.range(offset, 1), of: block)
            verification?.receivedZeroes(Self.range(offset, 1), of: block)
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
            bytes: position - countedBytes, normal: pending.normal, duplicate: pending.duplicate,
            inPostcopy: placer != nil)
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

    // MARK: Postcopy

    /// The package that was announced just now, read whole before it is looked at; empty when it is cut off or makes no sense.
    mutating func package() throws(ChannelError) -> [StreamItem] {
        var inner = decoder.packageDecoder()
        var package = ReceiveBuffer()
        while decoder.payloadBytes > 0 {
            if buffer.isEmpty, try fill() == 0 {
                failure = StreamError(.truncated(inside: "a package"), position: decoder.position)
                return []
            }
            let count = min(buffer.count, decoder.payloadBytes)
            _ = unsafe package.fill(atLeast: count) { room in
                unsafe buffer.move(to: UnsafeMutableRawBufferPointer(rebasing: room.prefix(count)))
            }
            decoder.payloadConsumed(count)
        }
        do throws(StreamError) {
            var items: [StreamItem] = []
            while let item = try inner.next(from: &package) {
                guard items.count < StreamLimit.packageItems else {
                    throw StreamError(.postcopy(.packageItems), position: inner.position)
                }
                items.append(item)
            }
            try inner.checkEnd(package)
            return items
        } catch {
            failure = error
            return []
        }
    }

    private mutating func place(_ item: StreamItem, with placer: PagePlacer) throws(ChannelError) {
        switch item {
        case .page(let block, let offset):
            // Whole, before it is anybody's: a page whose rest may never come is still missing.
            guard try readAhead(Wire.pageSize) else { return }
            let page = RAMOffset(offset).page
            let room = try Self.placing { () throws(SystemError) in try placer.room(for: page, of: block) }
            take(Wire.pageSize, into: room.mapping, at: room.offset)
            decoder.payloadConsumed(Wire.pageSize)
            try Self.placing { () throws(SystemError) in try placer.came(page, of: block) }
            pending.normal += 1
        case .zeroPage(let block, let offset):
            try Self.placing { () throws(SystemError) in
                try placer.cameAsZeroes(Self.range(offset, 1), of: block)
            }
            pending.duplicate += 1
        case .pageBatch(let block, let runs):
            hasBatches = true
            try Self.placing { () throws(SystemError) in try placer.flush() }
            for run in runs { try place(run, of: block, with: placer) }
        case .pageDelta(let block, let offset, _):
            let name = memory.blocks[block].name
            failure = StreamError(.deltaWithoutPage(block: name, offset: offset), position: decoder.position)
        default: break
        }
    }

    private mutating func place(_ run: PageRun, of block: Int, with placer: PagePlacer) throws(ChannelError) {
        let pages = Self.range(run.offset, UInt64(run.pages))
        guard run.kind == .data else {
            pending.duplicate += UInt64(run.pages)
            return try Self.placing { () throws(SystemError) in
                try placer.cameAsZeroes(pages, of: block)
                try placer.flush()
            }
        }
        var start = pages.lowerBound
        while start < pages.upperBound {
            let room = try Self.placing { () throws(SystemError) in
                try placer.room(for: start..<pages.upperBound, of: block)
            }
            let count = room.pages.count * Wire.pageSize
            let ahead = min(buffer.count, count)
            take(ahead, into: room.mapping, at: room.offset)
            if ahead < count {
                vector.removeAll()
                vector.append(room.mapping, offset: room.offset + ahead, count: count - ahead)
                try channel.receive(&vector)
            }
            decoder.payloadConsumed(count)
            try Self.placing { () throws(SystemError) in try placer.came(room.pages, of: block) }
            start = room.pages.upperBound
        }
        pending.normal += UInt64(run.pages)
    }

    /// - Returns: false, with `failure` set, when the stream ends before.
    private mutating func readAhead(_ count: Int) throws(ChannelError) -> Bool {
        while buffer.count < count {
            guard try fill() > 0 else {
                failure = StreamError(.truncated(inside: "page contents"), position: decoder.position)
                return false
            }
        }
        return true
    }

    private static func placing<R>(_ body: () throws(SystemError) -> R) throws(ChannelError) -> R {
        do throws(SystemError) { return try body() } catch { throw .system(error) }
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
        guard received.holds(RAMOffset(offset).page, of: block) else {
            failure = StreamError(.deltaWithoutPage(block: name, offset: offset), position: decoder.position)
            return
        }
        if let damage = Self.apply(buffer, count, to: memory.blocks[block].mapping, at: Int(offset)) {
            failure = StreamError(.deltaDamaged(block: name, offset: offset, damage), position: decoder.position)
            return
        }
        buffer.consume(count)
        decoder.payloadConsumed(count)
        received.mark(Self.range(offset, 1), of: block)
        verify(CollectionOfOne(Self.range(offset, 1)), of: block)
    }

    /// Compares pages that were placed with the digests of the item.
    private func verify(_ runs: some Sequence<Range<PageIndex>>, of block: Int) {
        verification?.received(
            runs, of: block, in: memory.blocks[block].mapping, digests: decoder.digests[...])
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
                received.clear(Self.range(run.offset, UInt64(run.pages)), of: block)
                verification?.receivedZeroes(Self.range(run.offset, UInt64(run.pages)), of: block)
                pending.duplicate += UInt64(run.pages)
                continue
            }
            backWithHugePages(block, run)
            received.mark(Self.range(run.offset, UInt64(run.pages)), of: block)
            pending.normal += UInt64(run.pages)
            let ahead = min(buffer.count, Int(run.length))
            take(ahead, into: mapping, at: Int(run.offset))
            vector.append(mapping, offset: Int(run.offset) + ahead, count: Int(run.length) - ahead)
        }
        if vector.byteCount > 0 { try channel.receive(&vector) }
        decoder.payloadConsumed(total)
        verify(runs.lazy.filter { $0.kind == .data }.map { Self.range($0.offset, UInt64($0.pages)) }, of: block)
    }

    /// Sources other than ours send each page by itself.
    private mutating func noteSingle(_ block: Int, _ offset: UInt64) {
        let goesOn = single.block == block && single.end == offset
        single = (block, goesOn ? single.pages + 1 : 1, offset + UInt64(Wire.pageSize))
        if offset % Self.hugePageBytes == 0, single.pages > Self.hugePageBytes / UInt64(Wire.pageSize) {
            populating?.reached(offset, of: block)
        }
    }

    /// A run that fills a whole huge page is worth one: the first touch costs a sixth per page then.
    private func backWithHugePages(_ block: Int, _ run: PageRun) {
        guard run.offset % Self.hugePageBytes == 0, run.length >= Self.hugePageBytes,
            received.isFresh(Self.range(run.offset, UInt64(run.pages)), of: block)
        else { return }
        populating?.reached(run.offset + run.length - Self.hugePageBytes, of: block)
        // Only advice: where the host has no huge pages, small ones serve.
        try? memory.blocks[block].mapping.advise(
            .hugePages, at: Int(run.offset), count: Int(run.length / Self.hugePageBytes * Self.hugePageBytes))
    }

    private static func range(_ offset: UInt64, _ pages: UInt64) -> Range<PageIndex> {
        RAMOffset(offset).page..<PageIndex(offset / 4096 + pages)
    }
}
