import Accelerator
import GuestMemory
import Host
import MigrationStream
import Transport

/// Sends the dirty pages of a machine, straight from guest memory. One screen: `send`; the records it writes are below.
///
/// Pages go out in order, in chunks: each chunk is watched afresh (`DirtyTracker.willSend`) just before it is read, so that a page
/// written while it is sent is sent again. What was not sent stays dirty.
struct RoundSender: ~Copyable {
    enum Failure: Error {
        case channel(ChannelError)
        case tracking(String)
    }

    private let memory: GuestMemory
    private let bitmaps: [any DirtyPages]
    private var encoder: RAMRecordEncoder
    private var firstCollect = true
    /// Where record heads stand while they are sent.
    private let heads: Mapping
    private var headBytes = 0
    private var vector = IOVector()
    /// With the capability `xbzrle`.
    private var deltas: XBZRLESender?
    private var keepsPages = true

    /// 64 MiB of guest memory are write-protected at a time.
    private static let chunkPages: UInt64 = 1 << 14
    /// One batch: 2 MiB of guest memory, aligned, so that the destination can back it with a huge page.
    private static let batchPages: UInt64 = 512
    /// A classic record needs two entries of the vector.
    private static let classicPages: UInt64 = 256

    /// - Parameter bitmaps: empty records of dirty pages, one per block.
    init(
        _ memory: GuestMemory, blocks: [RAMBlockDescription], bitmaps: sending [any DirtyPages],
        xbzrleCacheBytes: UInt64? = nil
    ) throws(SystemError) {
        // With deltas among them: at most `batchPages`, each little longer than a page at worst.
        let heads = try Mapping(anonymousByteCount: xbzrleCacheBytes == nil ? 256 << 10 : 4 << 20)
        if let xbzrleCacheBytes { deltas = try XBZRLESender(cacheBytes: xbzrleCacheBytes) } else { deltas = nil }
        self.memory = memory
        self.bitmaps = bitmaps
        self.heads = heads
        encoder = RAMRecordEncoder(blocks: blocks)
    }

    /// - Returns: the pages to be sent.
    mutating func collect(with tracker: (any DirtyTracker)?) throws(AcceleratorError) -> UInt64 {
        if let tracker {
            try tracker.collect(into: bitmaps)
        } else if firstCollect {
            try markAllocated()
        }
        firstCollect = false
        let pages = bitmaps.reduce(0) { $0 + $1.count }
        deltas?.roundBegins(pages: pages)
        return pages
    }

    /// A machine without vCPUs: whatever is allocated, once.
    private func markAllocated() throws(AcceleratorError) {
        do throws(SystemError) {
            for (block, bitmap) in zip(memory.blocks, bitmaps) {
                for run in try block.allocatedRuns(in: block.pages) { bitmap.set(run) }
            }
        } catch { throw AcceleratorError(error.description) }
    }

    /// Before a round: the cache's size (0: as it is), and whether this is the last round, whose pages need not be kept.
    mutating func prepareDeltas(cacheBytes: UInt64, isFinal: Bool) {
        if cacheBytes > 0 { deltas?.resize(to: cacheBytes) }
        keepsPages = !isFinal
    }

    /// Sends all dirty pages. `sent` is told of every batch (bytes, normal pages, zero pages, deltas) and returns whether to end early.
    mutating func send(
        to channel: Channel, batches: Bool, tracker: (any DirtyTracker)?, pacer: consuming Pacer,
        sent: (UInt64, UInt64, UInt64, XBZRLECounts) -> Bool
    ) throws(Failure) -> RoundReport {
        var report = RoundReport(pages: 0, bytes: 0, nanoseconds: 0)
        let most = UInt64(pacer.batchBytes(most: Int(batches ? Self.batchPages : Self.classicPages) * 4096) / 4096)
        for block in bitmaps.indices {
            var chunk: UInt64? = nil
            var position = PageIndex(0)
            while let run = bitmaps[block].nextRun(from: position, limit: most) {
                let start = run.lowerBound.value / Self.chunkPages * Self.chunkPages
                if chunk != start {
                    try watch(block, chunk: start, tracker)
                    chunk = start
                }
                let end = min(run.upperBound.value, (run.lowerBound.value / Self.batchPages + 1) * Self.batchPages)
                let batch = gather(block, from: run.lowerBound, to: end, limit: most, batches: batches)
                let bytes = UInt64(vector.byteCount)
                // Nothing is sent of pages that are as they were.
                if bytes > 0 { do throws(ChannelError) { try channel.send(&vector) } catch { throw .channel(error) } }
                for pages in batch.runs { bitmaps[block].clear(pages) }
                let encoded = deltas?.takeCounts() ?? XBZRLECounts()
                report.pages += batch.normal + batch.zero + encoded.deltasAndUnchanged
                report.bytes += bytes
                position = batch.end
                let wait = pacer.sent(bytes, at: Clock.monotonicNanoseconds)
                let mustEnd = sent(bytes, batch.normal, batch.zero, encoded)
                if mustEnd {
                    report.interrupted = bitmaps.contains { !$0.isEmpty }
                    deltas?.roundEnded(pages: report.pages, isInterrupted: report.interrupted)
                    return report
                }
                if wait > 0 { Clock.sleep(nanoseconds: wait) }
            }
        }
        deltas?.roundEnded(pages: report.pages, isInterrupted: false)
        return report
    }

    private func watch(_ block: Int, chunk: UInt64, _ tracker: (any DirtyTracker)?) throws(Failure) {
        guard let tracker else { return }
        let pages = PageIndex(chunk)..<PageIndex(min(chunk + Self.chunkPages, bitmaps[block].pageCount))
        do throws(AcceleratorError) {
            try tracker.willSend(pages, of: block, marked: bitmaps[block])
        } catch { throw .tracking(error.description) }
    }

    // MARK: Records

    private struct Batch {
        var runs: [Range<PageIndex>] = []
        var normal: UInt64 = 0
        var zero: UInt64 = 0
        var end: PageIndex
    }

    /// Fills the vector with the next pages: the run given, and the runs behind it inside the same 2 MiB (or, for classic records,
    /// wherever they are in the chunk) as far as they fit.
    private mutating func gather(
        _ block: Int, from first: PageIndex, to end: UInt64, limit: UInt64, batches: Bool
    ) -> Batch {
        vector.removeAll()
        headBytes = 0
        var batch = Batch(end: first)
        // Random writes leave many short runs: they share a batch as long as they stay inside the chunk that is watched.
        let chunkEnd = (first.value / Self.chunkPages + 1) * Self.chunkPages
        var run: Range<PageIndex>? = first..<PageIndex(end)
        var pages: UInt64 = 0
        while let current = run, pages < limit, batch.runs.count < (batches ? StreamLimit.batchRuns / 2 : 256) {
            batch.runs.append(current)
            pages += current.upperBound.value - current.lowerBound.value
            batch.end = current.upperBound
            guard pages < limit else { break }
            guard let next = bitmaps[block].nextRun(from: batch.end, limit: limit - pages),
                next.lowerBound.value < chunkEnd,
                // What goes on behind a 2 MiB boundary begins a batch of its own, so that batches stay aligned.
                next.lowerBound != batch.end
            else { break }
            run = next.lowerBound..<min(next.upperBound, PageIndex(chunkEnd))
        }
        if deltas?.isActive == true {
            writeDeltas(block, &batch, batches: batches)
        } else if batches {
            writeBatch(block, &batch)
        } else {
            writeClassic(block, &batch)
        }
        return batch
    }

    private mutating func writeBatch(_ block: Int, _ batch: inout Batch) {
        let mapping = memory.blocks[block].mapping
        var runs: [PageRun] = []
        for range in batch.runs {
            for page in range {
                let isZero = mapping.isZero(at: Int(page.offset.value), count: 4096)
                let kind: PageRunKind = isZero ? .zero : .data
                if isZero { batch.zero += 1 } else { batch.normal += 1 }
                if let last = runs.last, last.kind == kind, last.offset + last.length == page.offset.value {
                    runs[runs.count - 1] = PageRun(kind: kind, offset: last.offset, pages: last.pages + 1)
                } else {
                    runs.append(PageRun(kind: kind, offset: page.offset.value, pages: 1))
                }
            }
        }
        // Alternating contents could make more runs than a record holds: then it takes several records.
        for start in stride(from: 0, to: runs.count, by: StreamLimit.batchRuns) {
            let part = runs[start..<min(start + StreamLimit.batchRuns, runs.count)]
            var head: [UInt8] = []
            encoder.batch(block: block, runs: part, into: &head)
            append(head)
            for run in part where run.kind == .data {
                vector.append(mapping, offset: Int(run.offset), count: Int(run.length))
            }
        }
    }

    private mutating func writeClassic(_ block: Int, _ batch: inout Batch) {
        let mapping = memory.blocks[block].mapping
        for range in batch.runs {
            for page in range {
                var head: [UInt8] = []
                if mapping.isZero(at: Int(page.offset.value), count: 4096) {
                    encoder.zeroPage(block: block, offset: page.offset.value, into: &head)
                    append(head)
                    batch.zero += 1
                } else {
                    encoder.page(block: block, offset: page.offset.value, into: &head)
                    append(head)
                    vector.append(mapping, offset: Int(page.offset.value), count: 4096)
                    batch.normal += 1
                }
            }
        }
    }

    /// From the second round on, with `xbzrle`: pages that changed little go as deltas, one record each; the others as ever, save that
    /// those the cache keeps are sent from it.
    private mutating func writeDeltas(_ block: Int, _ batch: inout Batch, batches: Bool) {
        let mapping = memory.blocks[block].mapping
        var runs: [PageRun] = []
        var contents: [(mapping: Mapping, offset: Int)] = []
        var head: [UInt8] = []
        for page in batch.runs.joined() {
            let offset = page.offset.value
            var kind = PageRunKind.data
            if mapping.isZero(at: Int(offset), count: 4096) {
                deltas?.sentZero(block: block, page: page)
                kind = .zero
                batch.zero += 1
            } else {
                switch deltas?.form(block: block, page: page, in: mapping, keeps: keepsPages) ?? .direct {
                case .unchanged: continue
                case .delta(let byteCount):
                    head.removeAll(keepingCapacity: true)
                    encoder.pageDelta(block: block, offset: offset, byteCount: byteCount, into: &head)
                    append(head)
                    appendDelta(byteCount)
                    continue
                case .copy(let place): if let pages = deltas?.pages { contents.append((pages, place)) }
                case .direct: contents.append((mapping, Int(offset)))
                }
                batch.normal += 1
            }
            if let last = runs.last, last.kind == kind, last.offset + last.length == offset, batches {
                runs[runs.count - 1] = PageRun(kind: kind, offset: last.offset, pages: last.pages + 1)
            } else {
                runs.append(PageRun(kind: kind, offset: offset, pages: 1))
            }
        }
        append(block, runs, contents[...], batches: batches)
    }

    private mutating func appendDelta(_ byteCount: Int) {
        guard let encoding = deltas?.encoding else { return }
        heads.copy(from: encoding, at: 0, count: byteCount, to: headBytes)
        vector.append(heads, offset: headBytes, count: byteCount)
        headBytes += byteCount
    }

    /// Records for runs whose contents stand, page by page, at `contents`.
    private mutating func append(
        _ block: Int, _ runs: [PageRun], _ contents: ArraySlice<(mapping: Mapping, offset: Int)>, batches: Bool
    ) {
        var contents = contents
        for start in stride(from: 0, to: runs.count, by: batches ? StreamLimit.batchRuns : 1) {
            let part = runs[start..<min(start + (batches ? StreamLimit.batchRuns : 1), runs.count)]
            var head: [UInt8] = []
            if batches {
                encoder.batch(block: block, runs: part, into: &head)
            } else if runs[start].kind == .zero {
                encoder.zeroPage(block: block, offset: runs[start].offset, into: &head)
            } else {
                encoder.page(block: block, offset: runs[start].offset, into: &head)
            }
            append(head)
            for run in part where run.kind == .data {
                for content in contents.prefix(Int(run.pages)) {
                    vector.append(content.mapping, offset: content.offset, count: 4096)
                }
                contents = contents.dropFirst(Int(run.pages))
            }
        }
    }

    private mutating func append(_ head: [UInt8]) {
        heads.write(head, at: headBytes)
        vector.append(heads, offset: headBytes, count: head.count)
        headBytes += head.count
    }
}
