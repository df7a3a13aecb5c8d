import GuestMemory
import Host
import MigrationStream
import Transport

/// Writes records of RAM to the main channel: heads from a buffer of ours, contents straight from guest memory, in one gathering write.
struct RecordWriter: ~Copyable {
    let memory: GuestMemory
    private let blocks: [RAMBlockDescription]
    var encoder: RAMRecordEncoder
    /// Where record heads, and deltas with them, stand while they are sent.
    let heads: Mapping
    var headBytes = 0
    var vector = IOVector()
    /// With the capability `xbzrle`.
    var deltas: XBZRLESender?
    /// Whether pages that are sent go into the cache of `deltas`.
    var keepsPages = true
    /// With the capability `x-verify`.
    let verification: OutgoingVerification?

    /// Runs of one vector: each may alternate between pages of data and of zeros, and a record's head stands before it.
    static let batchRuns = StreamLimit.batchRuns / 2
    /// A classic record needs two entries of the vector.
    static let classicPages: UInt64 = 256
    /// In a search for zeros the beginnings of pages come from memory one after the other, unless they are fetched before.
    static let fetchedAheadBytes = 8 * Wire.pageSize
    /// Zero records of one write.
    private static let zeroRecords = 4096

    init(
        _ memory: GuestMemory, blocks: [RAMBlockDescription], xbzrleCacheBytes: UInt64? = nil,
        verification: OutgoingVerification? = nil
    ) throws(SystemError) {
        // With deltas among them: as many as a batch has pages, each little longer than a page at worst.
        let heads = try Mapping(anonymousByteCount: xbzrleCacheBytes == nil ? 256 << 10 : 4 << 20)
        if let xbzrleCacheBytes { deltas = try XBZRLESender(cacheBytes: xbzrleCacheBytes) } else { deltas = nil }
        self.heads = heads
        self.verification = verification
        self.memory = memory
        self.blocks = blocks
        encoder = RAMRecordEncoder(blocks: blocks)
    }

    /// Another stream begins, to a destination of which it is not known exactly what it has.
    mutating func startOver() {
        encoder = RAMRecordEncoder(blocks: blocks)
        // Without memory for another cache pages go whole from here on.
        if deltas?.forget() == false { deltas = nil }
    }

    /// What one write carried.
    struct Sent {
        var bytes: UInt64 = 0
        var normal: UInt64 = 0
        var zero: UInt64 = 0
        var deltas = XBZRLECounts()
    }

    /// Sends the pages of some runs: as one batch, or as classic records.
    mutating func send(
        _ runs: [Range<PageIndex>], of block: Int, batches: Bool, findsZeroes: Bool, to channel: Channel
    ) throws(ChannelError) -> Sent {
        vector.removeAll()
        headBytes = 0
        var sent = Sent()
        if deltas?.isActive == true {
            writeDeltas(block, runs, batches: batches, findsZeroes, &sent)
        } else if batches {
            writeBatch(block, runs, findsZeroes, &sent)
        } else {
            writeClassic(block, runs, findsZeroes, &sent)
        }
        sent.bytes = UInt64(vector.byteCount)
        // Nothing is sent of pages that are as they were.
        if sent.bytes > 0 { try channel.send(&vector) }
        return sent
    }

    /// Sends zero records for pages that the threads of other channels found.
    mutating func sendZeroes(_ offsets: [UInt64], of block: Int, to channel: Channel) throws(ChannelError) -> Sent {
        var sent = Sent(zero: UInt64(offsets.count))
        for start in stride(from: 0, to: offsets.count, by: Self.zeroRecords) {
            var bytes: [UInt8] = []
            for offset in offsets[start..<min(start + Self.zeroRecords, offsets.count)] {
                encoder.zeroPage(block: block, offset: offset, into: &bytes)
            }
            sent.bytes += UInt64(bytes.count)
            try channel.send(bytes)
        }
        verification?.sentZeroes(offsets.lazy.map { $0 / 4096 }, of: block)
        return sent
    }

    private mutating func writeBatch(
        _ block: Int, _ ranges: [Range<PageIndex>], _ findsZeroes: Bool, _ sent: inout Sent
    ) {
        let mapping = memory.blocks[block].mapping
        var runs: [PageRun] = []
        // Of the pages of data, in order.
        var digests: [UInt64] = []
        if verification != nil { digests.reserveCapacity(StreamLimit.batchDataBytes / Wire.pageSize) }
        for range in ranges {
            // Whoever looks at all of a page need not look for zeros before.
            let looked = verification?.digests(of: range, in: block, mapping, findsZeroes: findsZeroes)
            for (index, page) in range.enumerated() {
                let isZero: Bool
                if let looked {
                    isZero = looked[index] == 0
                    if !isZero { digests.append(looked[index]) }
                } else {
                    let offset = Int(page.offset.value)
                    isZero = findsZeroes && mapping.isZeroPage(at: offset, fetching: offset + Self.fetchedAheadBytes)
                }
                let kind: PageRunKind = isZero ? .zero : .data
                if isZero { sent.zero += 1 } else { sent.normal += 1 }
                if let last = runs.last, last.kind == kind, last.offset + last.length == page.offset.value {
                    runs[runs.count - 1] = PageRun(kind: kind, offset: last.offset, pages: last.pages + 1)
                } else {
                    runs.append(PageRun(kind: kind, offset: page.offset.value, pages: 1))
                }
            }
        }
        // Alternating contents could make more runs than a record holds: then it takes several records.
        var left = digests[...]
        for start in stride(from: 0, to: runs.count, by: StreamLimit.batchRuns) {
            let part = runs[start..<min(start + StreamLimit.batchRuns, runs.count)]
            var head: [UInt8] = []
            encoder.batch(block: block, runs: part, into: &head)
            append(head)
            appendDigests(of: part, of: block, from: &left)
            for run in part where run.kind == .data {
                vector.append(mapping, offset: Int(run.offset), count: Int(run.length))
            }
        }
    }

    private mutating func writeClassic(
        _ block: Int, _ ranges: [Range<PageIndex>], _ findsZeroes: Bool, _ sent: inout Sent
    ) {
        let mapping = memory.blocks[block].mapping
        for range in ranges {
            for page in range {
                var head: [UInt8] = []
                if findsZeroes, mapping.isZero(at: Int(page.offset.value), count: 4096) {
                    encoder.zeroPage(block: block, offset: page.offset.value, into: &head)
                    append(head)
                    sent.zero += 1
                } else {
                    encoder.page(block: block, offset: page.offset.value, into: &head)
                    append(head)
                    vector.append(mapping, offset: Int(page.offset.value), count: 4096)
                    sent.normal += 1
                }
            }
        }
    }

    /// With `x-verify`: the digests of all pages of the data runs, which are the first of `left` and go from there. All runs are recorded.
    mutating func appendDigests(of runs: ArraySlice<PageRun>, of block: Int, from left: inout ArraySlice<UInt64>) {
        guard let verification else { return }
        var pageCount = 0
        for run in runs {
            let pages = run.offset / 4096..<run.offset / 4096 + UInt64(run.pages)
            if run.kind == .data { pageCount += pages.count } else { verification.sentZeroes(pages, of: block) }
        }
        let digests = left.prefix(pageCount)
        left = left.dropFirst(pageCount)
        let sent = runs.lazy.filter { $0.kind == .data }.map {
            RAMOffset($0.offset).page..<RAMOffset($0.offset + $0.length).page
        }
        verification.sent(sent, of: block, digests: digests)
        heads.storeBigEndian(digests, at: headBytes)
        vector.append(heads, offset: headBytes, count: 8 * digests.count)
        headBytes += 8 * digests.count
    }

    mutating func append(_ head: [UInt8]) {
        heads.write(head, at: headBytes)
        vector.append(heads, offset: headBytes, count: head.count)
        headBytes += head.count
    }
}
