import Accelerator
import GuestMemory
import Host
import MigrationStream
import Transport

/// Sends the dirty pages of a machine, straight from guest memory. One screen: `send`.
///
/// Pages go out in order, in chunks: each chunk is watched afresh (`DirtyTracker.willSend`) just before it is read, so that a page
/// written while it is sent is sent again. What was not sent stays dirty. Where the pages go is another matter: to the main channel
/// (`RecordWriter`), or to whichever channel of a group is free (`ChannelGroup`), which may read them a little later.
struct RoundSender: ~Copyable {
    enum Failure: Error {
        case channel(ChannelError)
        case tracking(String)
    }

    /// Where the pages of a round go, and how.
    struct Route: Sendable {
        let channel: Channel
        /// The channels for pages; `nil`: they go over the main one.
        let group: ChannelGroup?
        let batches: Bool
        let zeroPages: ZeroPageDetection
        /// The peer takes plain packets among compressed ones.
        let mayGoPlain: Bool
        /// The file in which pages have places of their own; `nil`: they go elsewhere.
        var file: MappedRAMWriter?
        /// Mark the end of the round in the main stream (`MultifdMode.flush`).
        let marksEnd: Bool
        /// Where marks between pages are acknowledged; `nil`: there are none.
        var marks: MarkBoard?
    }

    private let memory: GuestMemory
    private let bitmaps: [any DirtyPages]
    private var records: RecordWriter
    /// With the capability `postcopy-ram`: has to know what was ever dirty.
    private let postcopy: PostcopySource?
    private var firstCollect = true
    private var unacknowledged = UnacknowledgedPages()
    /// Of the round under way, what its report has of the bytes that went over the group.
    private var groupBytes: UInt64 = 0

    /// 64 MiB of guest memory are write-protected at a time.
    private static let chunkPages: UInt64 = 1 << 14
    /// One batch: 2 MiB of guest memory, aligned, so that the destination can back it with a huge page.
    private static let batchPages: UInt64 = 512

    /// - Parameter bitmaps: empty records of dirty pages, one per block.
    init(
        _ memory: GuestMemory, blocks: [RAMBlockDescription], bitmaps: sending [any DirtyPages],
        xbzrleCacheBytes: UInt64? = nil, verification: OutgoingVerification? = nil, postcopy: PostcopySource? = nil
    ) throws(SystemError) {
        let records = try RecordWriter(
            memory, blocks: blocks, xbzrleCacheBytes: xbzrleCacheBytes, verification: verification)
        self.memory = memory
        self.bitmaps = bitmaps
        self.records = records
        self.postcopy = postcopy
    }

    /// - Returns: the pages to be sent.
    mutating func collect(with tracker: (any DirtyTracker)?) throws(AcceleratorError) -> UInt64 {
        if let tracker {
            try tracker.collect(into: bitmaps)
        } else if firstCollect {
            try markAllocated()
        }
        firstCollect = false
        postcopy?.collected(bitmaps)
        let pages = bitmaps.reduce(0) { $0 + $1.count }
        records.deltas?.roundBegins(pages: pages)
        return pages
    }

    /// Hands everything that is dirty over to what follows the guest. - Parameter sent: told of the bytes of each write.
    func discard(
        _ postcopy: PostcopySource, over channel: Channel, sent: (UInt64) -> Void
    ) throws(ChannelError) { try postcopy.discard(bitmaps, over: channel, sent: sent) }

    /// What was handed over is to be sent here again, and the destination may have forgotten all that it was sent before.
    mutating func takeBack(_ outgoing: OutgoingPages) {
        outgoing.forEachDiscarded { block, run in bitmaps[block].set(run) }
        records.startOver()
    }

    /// Before a round: the size of the cache of `xbzrle` (0: as it is), and whether pages that are not in it are to be kept.
    mutating func prepareDeltas(cacheBytes: UInt64, keepsPages: Bool) {
        if cacheBytes > 0 { records.deltas?.resize(to: cacheBytes) }
        records.keepsPages = keepsPages
    }

    /// A machine without vCPUs: whatever is allocated, once.
    private func markAllocated() throws(AcceleratorError) {
        do throws(SystemError) {
            for (block, bitmap) in zip(memory.blocks, bitmaps) {
                for run in try block.allocatedRuns(in: block.pages) { bitmap.set(run) }
            }
        } catch { throw AcceleratorError(error.description) }
    }

    /// Sends all dirty pages. `sent` is told of every write to the main channel, and asked with `nil` while nothing moves; it returns
    /// whether to end early.
    mutating func send(
        over route: Route, tracker: (any DirtyTracker)?, pacer: Pacer, sent: (RecordWriter.Sent?) -> Bool
    ) throws(Failure) -> RoundReport {
        var report = RoundReport(pages: 0, bytes: 0, nanoseconds: 0)
        route.group?.beginRound(pacer)
        groupBytes = 0
        report.interrupted = try walk(route, tracker, pacer, &report, sent) && bitmaps.contains { !$0.isEmpty }
        records.deltas?.roundEnded(pages: report.pages, isInterrupted: report.interrupted)
        do throws(ChannelError) { try synchronize(route, &report, sent) } catch { throw .channel(error) }
        return report
    }

    /// Goes through the dirty pages. - Returns: whether it was told to end early.
    private mutating func walk(
        _ route: Route, _ tracker: (any DirtyTracker)?, _ pacer: Pacer, _ report: inout RoundReport,
        _ sent: (RecordWriter.Sent?) -> Bool
    ) throws(Failure) -> Bool {
        var most = mostPages(route, pacer)
        for block in bitmaps.indices {
            var chunk: UInt64? = nil
            var position = PageIndex(0)
            while let run = bitmaps[block].nextRun(from: position, limit: most) {
                let start = run.lowerBound.value / Self.chunkPages * Self.chunkPages
                if chunk != start {
                    try watch(block, chunk: start, tracker)
                    chunk = start
                }
                if try waitForMark(route, sent) { return true }
                let end = min(run.upperBound.value, (run.lowerBound.value / Self.batchPages + 1) * Self.batchPages)
                let batch = gather(block, from: run.lowerBound, to: end, limit: most, route)
                let written: RecordWriter.Sent?
                do throws(ChannelError) { written = try hand(batch, of: block, to: route, sent) } catch {
                    throw .channel(error)
                }
                guard let written else { return true }
                for pages in batch.runs { bitmaps[block].clear(pages) }
                if route.marks != nil { unacknowledged.sent(batch.runs, of: block, pages: batch.pages) }
                report.pages += batch.pages
                report.bytes += written.bytes
                position = batch.end
                do throws(ChannelError) { try mark(route, &report, sent) } catch { throw .channel(error) }
                let paid = route.file == nil ? written.bytes : batch.pages * UInt64(Wire.pageSize)
                let wait = route.group == nil ? pacer.sent(paid, at: Clock.monotonicNanoseconds) : 0
                if sent(written) { return true }
                // To wait for its turn is no standstill of the peer.
                pacer.wait(wait) { sent(RecordWriter.Sent()) }
                // The rate may have been changed meanwhile.
                most = mostPages(route, pacer)
            }
        }
        return false
    }

    // MARK: Marks

    /// Between two batches: the destination is asked to say when it has placed what came before.
    private mutating func mark(
        _ route: Route, _ report: inout RoundReport, _ sent: (RecordWriter.Sent?) -> Bool
    ) throws(ChannelError) {
        guard let board = route.marks, unacknowledged.isMarkDue else { return }
        if let mark = board.take(waits: false) { unacknowledged.acknowledged(mark) }
        try synchronize(route, &report, sent)
        board.expect()
        var writer = StreamWriter()
        writer.ramSectionEnd(id: SourceCore.ramSectionID)
        writer.command(.ping(unacknowledged.close().pingValue))
        writer.ramRound(final: false, id: SourceCore.ramSectionID)
        try route.channel.send(writer.bytes)
        report.bytes += UInt64(writer.bytes.count)
        _ = sent(RecordWriter.Sent(bytes: UInt64(writer.bytes.count)))
    }

    /// What is on its way stays bounded. - Returns: whether to end early.
    private mutating func waitForMark(_ route: Route, _ sent: (RecordWriter.Sent?) -> Bool) throws(Failure) -> Bool {
        guard let board = route.marks else { return false }
        while unacknowledged.isFull {
            if let mark = board.take(waits: true) { unacknowledged.acknowledged(mark) }
            if unacknowledged.isFull, sent(nil) { return true }
        }
        return false
    }

    /// What was sent and not acknowledged is to be sent again; the stream begins afresh. Between rounds. - Returns: the pages.
    mutating func rewind(_ board: MarkBoard) -> UInt64 {
        if let mark = board.take(waits: false) { unacknowledged.acknowledged(mark) }
        records.startOver()
        return unacknowledged.putBack(into: bitmaps)
    }

    private func mostPages(_ route: Route, _ pacer: Pacer) -> UInt64 {
        if let group = route.group { return group.itemPages }
        let most = route.batches ? Self.batchPages : RecordWriter.classicPages
        return UInt64(pacer.batchBytes(most: Int(most) * 4096) / 4096)
    }

    private func watch(_ block: Int, chunk: UInt64, _ tracker: (any DirtyTracker)?) throws(Failure) {
        guard let tracker else { return }
        let pages = PageIndex(chunk)..<PageIndex(min(chunk + Self.chunkPages, bitmaps[block].pageCount))
        do throws(AcceleratorError) {
            try tracker.willSend(pages, of: block, marked: bitmaps[block])
        } catch { throw .tracking(error.description) }
    }

    // MARK: Batches

    private struct Batch {
        var runs: [Range<PageIndex>] = []
        var pages: UInt64 = 0
        var end: PageIndex
    }

    /// The next pages: the run given, and the runs behind it inside the same 2 MiB (or, for classic records, wherever they are in
    /// the chunk) as far as they fit.
    private func gather(
        _ block: Int, from first: PageIndex, to end: UInt64, limit: UInt64, _ route: Route
    ) -> Batch {
        var batch = Batch(end: first)
        // Random writes leave many short runs: they share a batch as long as they stay inside the chunk that is watched.
        let chunkEnd = (first.value / Self.chunkPages + 1) * Self.chunkPages
        let mostRuns = route.batches ? RecordWriter.batchRuns : Int(RecordWriter.classicPages)
        var run: Range<PageIndex>? = first..<PageIndex(end)
        while let current = run, batch.pages < limit, batch.runs.count < mostRuns {
            batch.runs.append(current)
            batch.pages += current.upperBound.value - current.lowerBound.value
            batch.end = current.upperBound
            guard batch.pages < limit else { break }
            guard let next = bitmaps[block].nextRun(from: batch.end, limit: limit - batch.pages),
                next.lowerBound.value < chunkEnd,
                // What goes on behind a 2 MiB boundary begins a batch of its own, so that batches stay aligned.
                next.lowerBound != batch.end
            else { break }
            run = next.lowerBound..<min(next.upperBound, PageIndex(chunkEnd))
        }
        return batch
    }

    /// - Returns: what went over the main channel; `nil` when the group takes nothing more and the round is to end.
    private mutating func hand(
        _ batch: Batch, of block: Int, to route: Route, _ sent: (RecordWriter.Sent?) -> Bool
    ) throws(ChannelError) -> RecordWriter.Sent? {
        if let file = route.file {
            let item = MappedRAMWriter.Item(block: block, runs: batch.runs, findsZeroes: route.zeroPages != .none)
            return try file.write(item, unless: { sent(nil) }) ? RecordWriter.Sent() : nil
        }
        guard let group = route.group else {
            return try records.send(
                batch.runs, of: block, batches: route.batches, findsZeroes: route.zeroPages != .none, to: route.channel)
        }
        let item = ChannelGroup.Item(
            block: block, runs: batch.runs, zeroPages: route.zeroPages, mayGoPlain: route.mayGoPlain)
        // To wait for their turn is no standstill of the peer.
        guard try group.enqueue(item, unless: { sent(group.isPaying ? RecordWriter.Sent() : nil) }) else { return nil }
        return try writeZeroes(group, route)
    }

    // MARK: The other channels

    /// The pages that the group's threads found to be zero, and whose receiver wants to hear that on the main channel.
    private mutating func writeZeroes(_ group: ChannelGroup, _ route: Route) throws(ChannelError) -> RecordWriter.Sent {
        var all = RecordWriter.Sent()
        for (block, offsets) in group.takeZeroes() {
            let sent = try records.sendZeroes(offsets, of: block, to: route.channel)
            all.bytes += sent.bytes
            all.zero += sent.zero
        }
        return all
    }

    /// The end of a round, also of one that ended early: no page of a later one may overtake its pages.
    private mutating func synchronize(
        _ route: Route, _ report: inout RoundReport, _ sent: (RecordWriter.Sent?) -> Bool
    ) throws(ChannelError) {
        if let file = route.file { report.bytes += try file.synchronize { _ = sent(RecordWriter.Sent()) } }
        guard let group = route.group else { return }
        let total = try group.synchronize(inHurry: report.interrupted) { _ = sent(RecordWriter.Sent()) }
        report.bytes += total - groupBytes
        groupBytes = total
        report.contentBytes = group.contentBytes
        var written = try writeZeroes(group, route)
        if route.marksEnd {
            var writer = StreamWriter()
            writer.multifdFlush()
            written.bytes += UInt64(writer.bytes.count)
            try route.channel.send(writer.bytes)
        }
        report.bytes += written.bytes
        _ = sent(written)
    }
}
