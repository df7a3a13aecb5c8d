//! Postcopy at the source, in the order in which it is met:
//!
//! `OutgoingPages` is what the destination does not have when its guest starts, in bits that are taken one by one. `PageRequests` is what it
//! asked for and waits for, `Prefetch` what it will ask for next. `BackgroundSender` sends that, then the rest, beginning behind what was asked
//! for last, and, where there is one channel alone, also what is asked for; else `UrgentSender` does that, on a thread and a channel of its
//! own. When what happens is decided by `Protocol/SourceCore+Postcopy`.

import GuestMemory
import Host
import MigrationStream
import Synchronization
import Transport

/// What the threads of an outgoing migration share once its guest may move before its memory.
final class PostcopySource: Sendable {
    private let current: Mutex<PageRequests>
    /// What will be asked for next, of all moves: as each has requests of its own, it forgets between them.
    let prefetch: Prefetch
    /// Of all pages that nobody asked for (`max-postcopy-bandwidth`).
    let pacer: Pacer
    let pace: BackgroundPace
    private let memory: GuestMemory
    private let blocks: [RAMBlockDescription]
    let statistics: OutgoingStatistics
    /// So many vCPUs can ask at once.
    private let cpuCount: Int
    /// All pages that were found to be written so far, in any round.
    private let known: [AtomicPages]
    let pages = Mutex<OutgoingPages?>(nil)
    private let takesBatches = Atomic<Bool>(false)
    private let urgent = Mutex<UrgentSender?>(nil)
    /// Those of a Godwit.
    private let channels = Mutex<[UrgentChannel]>([])
    /// As the destination sees them: a Godwit takes pages one by one, a QEMU in the sizes of its memory.
    private let described: Mutex<[RAMBlockDescription]>
    /// With the capability `x-postcopy-safety-net`.
    let keeper: EpochKeeper?
    /// What the destination says it has, while a connection recovers.
    let bitmaps = Mutex<ReceivedBitmaps?>(nil)

    /// Ranges of one DISCARD, and bytes of one write of them.
    private static let discardRanges = 1024
    private static let writeBytes = 256 << 10

    init(
        _ memory: GuestMemory, blocks: [RAMBlockDescription], cpuCount: Int, statistics: OutgoingStatistics,
        _ parameters: MigrationParameters, hasNet: Bool = false
    ) throws(SystemError) {
        self.memory = memory
        keeper = hasNet ? EpochKeeper(memory, blocks) : nil
        self.cpuCount = cpuCount
        self.blocks = blocks
        described = Mutex(blocks)
        self.statistics = statistics
        prefetch = Prefetch(isOn: parameters.prefetchesPostcopy)
        current = Mutex(PageRequests(prefetch: prefetch))
        pacer = Pacer(bytesPerSecond: parameters.maxPostcopyBandwidthBytesPerSecond)
        pace = BackgroundPace(targetMicroseconds: parameters.pageLatencyTargetMicroseconds)
        var known: [AtomicPages] = []
        for block in memory.blocks { known.append(try AtomicPages(pageCount: block.pageCount)) }
        self.known = known
    }

    /// Before the first round.
    func agreed(_ features: FeatureSet) {
        takesBatches.store(features.contains(.pageBatches), ordering: .relaxed)
        guard features.contains(.twoPhaseHandover) else { return }
        described.withLock { $0 = $0.map(\.uniform) }
    }

    /// Before the first round, and after each collect.
    func collected(_ bitmaps: [any DirtyPages]) {
        for (bitmap, known) in zip(bitmaps, known) {
            var position = PageIndex(0)
            while let run = bitmap.nextRun(from: position, limit: .max) {
                known.insert(run)
                position = run.upperBound
            }
        }
    }

    // MARK: The thread that sends

    /// Takes over what is dirty, and has the destination forget it. Again for what the guest wrote since, as long as nothing was taken back.
    /// - Parameter sent: told of the bytes of each write.
    func discard(
        _ bitmaps: [any DirtyPages], over channel: Channel, sent: (UInt64) -> Void
    ) throws(ChannelError) {
        var fresh: [OutgoingPages.Piece] = []
        do throws(SystemError) {
            if let before = pages.withLock({ $0 }) {
                fresh = try before.add(bitmaps)
            } else {
                let outgoing = try OutgoingPages(
                    of: described.withLock { $0 }, taking: bitmaps, known: known,
                    repeats: takesBatches.load(ordering: .relaxed))
                pages.withLock { $0 = outgoing }
                outgoing.forEachRun { fresh.append(OutgoingPages.Piece(block: $0, pages: $1)) }
            }
        } catch { throw .system(error) }
        var list = DiscardList(channel, blocks)
        for piece in fresh { sent(try list.add(piece.pages, of: piece.block)) }
        sent(try list.flush())
    }

    /// DISCARD commands, many ranges to a command and many commands to a write.
    private struct DiscardList {
        private let channel: Channel
        private let blocks: [RAMBlockDescription]
        private var writer = StreamWriter()
        private var block = 0
        private var ranges: [RAMDiscard.ByteRange] = []

        init(_ channel: Channel, _ blocks: [RAMBlockDescription]) {
            self.channel = channel
            self.blocks = blocks
        }

        mutating func add(_ run: Range<PageIndex>, of index: Int) throws(ChannelError) -> UInt64 {
            if index != block || ranges.count == PostcopySource.discardRanges { encode() }
            block = index
            let start = run.lowerBound.offset.value
            ranges.append(.init(offset: start, length: run.upperBound.offset.value - start))
            return writer.bytes.count >= PostcopySource.writeBytes ? try send() : 0
        }

        mutating func flush() throws(ChannelError) -> UInt64 {
            encode()
            return try send()
        }

        private mutating func encode() {
            guard !ranges.isEmpty else { return }
            writer.command(.postcopy(.discard(RAMDiscard(block: blocks[block].name, ranges: ranges))))
            ranges = []
        }

        private mutating func send() throws(ChannelError) -> UInt64 {
            let bytes = writer.take()
            if !bytes.isEmpty { try channel.send(bytes) }
            return UInt64(bytes.count)
        }
    }

    /// Sends what is asked for, where no other channel does. - Parameter mustEnd: asked whenever nothing is asked for.
    func serveRequests(over channel: Channel, mustEnd: () -> Bool) throws(ChannelError) {
        let requests = requests
        guard let pages = pages.withLock({ $0 }), urgent.withLock({ $0 == nil }) else { return }
        let records: RecordWriter
        do throws(SystemError) { records = try RecordWriter(memory, blocks: blocks) } catch { throw .system(error) }
        var sender = BackgroundSender(pages, requests, records, pacer, pace, servesRequests: true)
        try sender.runRequests(over: channel, sent: count, mustEnd: mustEnd)
    }

    /// Sends all that the destination does not have. - Returns: whether it was all; false: `mustEnd` said so.
    func serve(over channel: Channel, mustEnd: () -> Bool) throws(ChannelError) -> Bool {
        guard let pages = pages.withLock({ $0 }) else { return false }
        let requests = requests
        let urgent = urgent.withLock { $0 }
        let records: RecordWriter
        do throws(SystemError) { records = try RecordWriter(memory, blocks: blocks) } catch { throw .system(error) }
        let awake = pace.targetMicroseconds > 0 ? try? AwakeProcessors() : nil
        defer { extendLifetime(awake) }
        var rest = BackgroundSender(
            pages, requests, records, pacer, pace, servesRequests: urgent == nil,
            batches: takesBatches.load(ordering: .relaxed))
        let all = try rest.run(over: channel, sent: count, mustEnd: mustEnd)
        if all {
            requests.close()
            urgent?.finish()
        }
        return all
    }

    private func count(_ sent: RecordWriter.Sent, _ piece: OutgoingPages.Piece) {
        statistics.sent(
            bytes: sent.bytes, normal: sent.normal, duplicate: piece.isHole ? 0 : sent.zero,
            holes: piece.isHole ? sent.zero : 0)
    }

    // MARK: Other threads

    /// Of the move that is under way.
    var requests: PageRequests { current.withLock { $0 } }

    /// The guest did not move after all. Requests that were not heard of that count for nothing; the channel for requested pages is
    /// closed, so that no page of this attempt can arrive in the next.
    func takeBack(_ body: (OutgoingPages) -> Void) {
        let old = current.withLock { current in
            defer { current = PageRequests(isWithdrawn: true, prefetch: prefetch) }
            return current
        }
        old.withdraw()
        prefetch.forget()
        if let urgent = urgent.withLock({ $0.take() }) {
            urgent.end()
            urgent.finish()
        }
        for channel in channels.withLock({ $0.taken() }) { channel.end() }
        keeper?.end()
        if let outgoing = pages.withLock({ $0.take() }) { body(outgoing) }
    }

    /// Requests count from here on: the package leaves.
    func openForRequests() {
        guard let pages = pages.withLock({ $0 }) else { return }
        statistics.beginPostcopy()
        requests.open(pages)
    }

    /// What the destination asked for. - Throws: why the connection is of no use any more.
    func add(_ request: PageRequest) throws(PageRequests.Refusal) {
        try requests.add(request)
        statistics.requested()
    }

    /// The channel for requested pages is there. Its thread waits for requests.
    /// - Parameter failed: told why it is of no use any more, and whether that still matters when it is asked.
    func open(
        _ channel: Channel, failed: @escaping @Sendable (_ reason: ChannelError, _ matters: () -> Bool) -> Void
    ) throws(SystemError) {
        guard channels.withLock({ $0.isEmpty }) else { return channel.cancel() }
        let sender = UrgentSender(channel, requests, memory: memory, blocks: blocks)
        let (pacer, statistics) = (pacer, statistics)
        try sender.start(
            among: cpuCount,
            sent: { sent, piece in
                // Paid for by the pages that nobody waits for.
                _ = pacer.sent(sent.bytes, at: Clock.monotonicNanoseconds)
                statistics.sent(
                    bytes: sent.bytes, normal: sent.normal, duplicate: piece.isHole ? 0 : sent.zero,
                    holes: piece.isHole ? sent.zero : 0)
            }, failed: failed)
        urgent.withLock { $0 = sender }
    }

    /// The channels of a Godwit are there. - Parameter failed: told why one is of no use any more.
    func open(
        _ opened: [Channel], failed: @escaping @Sendable (UrgentChannel, ChannelError) -> Void
    ) throws(SystemError) {
        let (pacer, statistics, requests) = (pacer, statistics, requests)
        // One that was opened for a QEMU, before it was known that there is none.
        if let mistaken = urgent.withLock({ $0.take() }) { mistaken.end() }
        for (number, channel) in opened.enumerated() {
            let urgent = UrgentChannel(number, channel, requests, memory: memory, blocks: blocks)
            try urgent.start(
                among: cpuCount,
                sent: { sent, piece in
                    _ = pacer.sent(sent.bytes, at: Clock.monotonicNanoseconds)
                    statistics.sent(
                        bytes: sent.bytes, normal: sent.normal, duplicate: piece.isHole ? 0 : sent.zero,
                        holes: piece.isHole ? sent.zero : 0)
                }, asked: { statistics.requested() }, failed: failed)
            channels.withLock { $0.append(urgent) }
        }
    }

    /// The connection is gone, or the migration over: whoever waits here goes on.
    func end() {
        requests.close()
        urgent.withLock { $0 }?.end()
        for channel in channels.withLock({ $0.taken() }) { channel.end() }
        keeper?.end()
    }

    /// Another connection is there, and the threads of the one before are gone or going.
    func startOver() {
        end()
        urgent.withLock { $0.take() }?.finish()
        prefetch.forget()
        current.withLock { $0 = PageRequests(prefetch: prefetch) }
        bitmaps.withLock { $0 = ReceivedBitmaps(blocks) }
    }
}

extension [UrgentChannel] {
    fileprivate mutating func taken() -> [UrgentChannel] {
        defer { removeAll() }
        return self
    }
}
