import Accelerator
import GuestMemory
import Host
import MigrationStream
import Synchronization
import Transport

/// The thread that writes to the destination: stream bytes and rounds of pages, in the order in which they are asked for.
final class StreamSender: Sendable {
    enum Job: Sendable {
        case bytes([UInt8])
        /// So many bytes further in the file.
        case skip(UInt64)
        case round(final: Bool, batches: Bool, keepsPages: Bool)
        case flush
        /// SYNC on all other channels.
        case synchronize
        /// ROOT, and DIGESTS: what `x-verify` has to say.
        case root
        case digests(DigestRange)
        /// Postcopy: what is to be forgotten, the guest's state, and the pages that follow it.
        case discards
        case package([UInt8])
        case serveRequests
        case servePages
        case stopTracking
        case close
    }

    private struct Queue {
        var jobs: [Job] = []
    }
    private let queue = Monitor(Queue())
    let round: Mutex<RoundSender>
    private let tracker: (any DirtyTracker)?
    let statistics: OutgoingStatistics
    private let interrupted = Atomic<Bool>(false)
    private let waiting = Atomic<Bool>(false)
    /// Of all rounds but the last one; also for channels beside this one.
    let pacer = Pacer(bytesPerSecond: 0)
    /// The size the cache of `xbzrle` should have from the next round on; 0: as it is.
    private let xbzrleCache = Atomic<UInt64>(0)
    /// The channels for pages, if the migration has any, while they are open.
    private let group = Mutex<ChannelGroup?>(nil)
    /// The file in which pages have their places, while it is open.
    private let file = Mutex<MappedRAMWriter?>(nil)
    private let mode: MultifdMode?
    /// What the operator wants; `nil`: what the peer is known to understand.
    private let zeroPages: ZeroPageDetection?
    private let verification: OutgoingVerification?
    /// With the capability `postcopy-ram`.
    let postcopy: PostcopySource?
    private let peerIsGodwit = Atomic<Bool>(false)
    private let isResumable = Atomic<Bool>(false)
    private let marks = MarkBoard()
    /// Whether a thread takes jobs.
    private let isRunning = Monitor(false)

    init(
        _ memory: GuestMemory, blocks: [RAMBlockDescription], tracker: (any DirtyTracker)?,
        bitmaps: sending [any DirtyPages], statistics: OutgoingStatistics, mode: MultifdMode? = nil,
        zeroPages: ZeroPageDetection? = nil, xbzrleCacheBytes: UInt64? = nil,
        verification: OutgoingVerification? = nil, postcopy: PostcopySource? = nil
    ) throws(SystemError) {
        self.verification = verification
        self.postcopy = postcopy
        self.mode = mode
        self.zeroPages = zeroPages
        self.tracker = tracker
        self.statistics = statistics
        round = Mutex(
            try RoundSender(
                memory, blocks: blocks, bitmaps: bitmaps, xbzrleCacheBytes: xbzrleCacheBytes,
                verification: verification, postcopy: postcopy))
    }

    var isInterrupted: Bool { interrupted.load(ordering: .relaxed) }

    /// Events wait for the core: a round that is not the last one ends at the next batch.
    var eventsWait: Bool {
        get { waiting.load(ordering: .relaxed) }
        set { waiting.store(newValue, ordering: .relaxed) }
    }

    func interruptRound() {
        interrupted.store(true, ordering: .relaxed)
        group.withLock { $0 }?.hurry()
    }

    /// An older QEMU would miss zero pages that are not told on the main channel: only of a Godwit it is known that it does not.
    func agreed(_ features: FeatureSet) {
        postcopy?.agreed(features)
        peerIsGodwit.store(features.contains(.multifd), ordering: .relaxed)
        postcopy?.agreed(features)
        isResumable.store(features.contains(.resumption), ordering: .relaxed)
    }

    /// - Returns: whether such a mark was awaited.
    func acknowledged(_ mark: ResumptionMark) -> Bool { marks.acknowledged(mark) }

    /// What the destination did not acknowledge is dirty again. Waits for a round that is under way.
    func rewind() { statistics.resumed(repeatedPages: round.withLock { round in round.rewind(marks) }) }

    /// Waits until the thread of the connection before is gone: two must not take jobs.
    func waitUntilClosed() { isRunning.wait { $0 ? nil : () } }

    /// Ends the channels for pages, whatever their threads are doing.
    func endChannels() {
        group.withLock { $0.take() }?.end()
        file.withLock { $0.take() }?.end()
        postcopy?.end()
    }

    func setBandwidth(_ bytesPerSecond: UInt64) {
        guard pacer.bytesPerSecond != bytesPerSecond else { return }
        pacer.bytesPerSecond = bytesPerSecond
        group.withLock { $0 }?.rateChanged()
    }

    func setXBZRLECache(_ byteCount: UInt64) { xbzrleCache.store(byteCount, ordering: .relaxed) }

    func enqueue(_ job: Job) {
        // Not when the round begins: it may be ended while it still waits behind bytes that the peer does not take.
        switch job {
        case .round, .servePages: interrupted.store(false, ordering: .relaxed)
        default: break
        }
        queue.withLock { $0.jobs.append(job) }
        postcopy?.requests.nudge()
    }

    var hasJobs: Bool { queue.wait { .some(!$0.jobs.isEmpty) } ?? false }

    /// Merges what the tracker reports into what is to be sent; without a tracker all allocated pages are dirty, once.
    ///
    /// Called while no round is under way. - Returns: the pages to be sent.
    func collect() throws(AcceleratorError) -> UInt64 {
        try round.withLock { (round) throws(AcceleratorError) in try round.collect(with: tracker) }
    }

    /// Starts the threads; `post` gets what the core wants to know.
    /// - Parameter answers: the return path is read by somebody else; without, the peer's end of the connection says that it read all.
    /// - Throws: `SystemError`; no thread is left then, and nothing was posted.
    func attach(
        _ channel: Channel, _ group: ChannelGroup?, _ file: MappedRAMWriter?, answers: Bool,
        post: @escaping @Sendable (SourceEvent) -> Void
    ) throws(SystemError) {
        marks.startOver()
        self.group.withLock { $0 = group }
        self.file.withLock { $0 = file }
        do throws(SystemError) {
            try group?.start()
            try file?.start()
            isRunning.withLock { $0 = true }
            _ = try HostThread(name: "migration-send") { [self] in
                run(channel, answers: answers, post)
                isRunning.withLock { $0 = false }
            }
        } catch {
            endChannels()
            isRunning.withLock { $0 = false }
            throw error
        }
    }

    // MARK: The thread

    private func run(_ channel: Channel, answers: Bool, _ post: @escaping @Sendable (SourceEvent) -> Void) {
        HostThread.sleepExactly()
        while let job = queue.wait(until: { $0.jobs.isEmpty ? nil : $0.jobs.removeFirst() }) {
            do throws(ChannelError) {
                switch job {
                case .bytes(let bytes):
                    file.withLock { $0 }?.noteBytes()
                    try send(bytes, to: channel)
                case .root: if let verification { try send(.root(verification.ledger.root), to: channel) }
                case .digests(let range): if let verification { try send(verification.answer(range), to: channel) }
                case .round(let final, let batches, let keepsPages):
                    try send(channel, final: final, batches: batches, keepsPages: keepsPages, post)
                case .skip(let count): try channel.skip(count)
                case .flush:
                    try file.withLock { $0 }?.seal { post(.progressed) }
                    post(.flushed)
                case .discards: try sendDiscards(to: channel, post)
                case .package(let bytes): try sendPackage(bytes, to: channel, post)
                case .serveRequests: try serveRequests(over: channel)
                case .servePages: try servePages(over: channel, post)
                case .synchronize: if let group = group.withLock({ $0 }) { _ = try group.synchronize() }
                case .stopTracking: tracker?.stop()
                case .close:
                    end(channel, answers: answers, post)
                    return
                }
            } catch {
                post(.disconnected(error.description))
                drain(channel, post)
                return
            }
        }
    }

    func send(_ bytes: [UInt8], to channel: Channel) throws(ChannelError) {
        try channel.send(bytes)
        statistics.sent(bytes: UInt64(bytes.count))
    }

    private func send(_ command: ForwardCommand, to channel: Channel) throws(ChannelError) {
        var writer = StreamWriter()
        writer.command(command)
        try send(writer.bytes, to: channel)
    }

    private func send(
        _ channel: Channel, final: Bool, batches: Bool, keepsPages: Bool,
        _ post: @escaping @Sendable (SourceEvent) -> Void
    )
        throws(ChannelError)
    {
        let began = Clock.monotonicNanoseconds
        var progress = Progress(post: post)
        var failure: ChannelError?
        var report = round.withLock { round -> RoundReport in
            round.prepareDeltas(cacheBytes: xbzrleCache.load(ordering: .relaxed), keepsPages: keepsPages)
            do throws(RoundSender.Failure) {
                return try round.send(
                    over: route(channel, batches: batches), tracker: tracker, pacer: final ? .unlimited : pacer
                ) { sent in
                    if let sent {
                        statistics.sent(bytes: sent.bytes, normal: sent.normal, duplicate: sent.zero)
                        statistics.encoded(sent.deltas)
                        progress.note()
                    }
                    return interrupted.load(ordering: .relaxed) || (!final && waiting.load(ordering: .relaxed))
                }
            } catch {
                switch error {
                case .channel(let error): failure = error
                case .tracking(let sentence): post(.trackingFailed(sentence))
                }
                return RoundReport(pages: 0, bytes: 0, nanoseconds: 0, interrupted: true)
            }
        }
        // What is on the disk before the guest stops need not be waited for while it stands still.
        if !final, failure == nil, !report.interrupted, let file = file.withLock({ $0 }) {
            do throws(ChannelError) { try file.waitForDisk { post(.progressed) } } catch { failure = error }
        }
        report.nanoseconds = Clock.monotonicNanoseconds - began
        post(.roundSent(report))
        if let failure { throw failure }
    }

    private func route(_ channel: Channel, batches: Bool) -> RoundSender.Route {
        let group = group.withLock { $0 }
        let file = file.withLock { $0 }
        let understood: ZeroPageDetection = group != nil && peerIsGodwit.load(ordering: .relaxed) ? .multifd : .legacy
        return RoundSender.Route(
            channel: channel, group: group, batches: batches || file != nil, zeroPages: zeroPages ?? understood,
            mayGoPlain: peerIsGodwit.load(ordering: .relaxed), file: file, marksEnd: mode == .flush,
            marks: isResumable.load(ordering: .relaxed) ? marks : nil)
    }

    /// Tells the core at most once per second that the peer takes data.
    private struct Progress {
        let post: @Sendable (SourceEvent) -> Void
        private var last = Clock.monotonicNanoseconds

        init(post: @escaping @Sendable (SourceEvent) -> Void) { self.post = post }

        mutating func note() {
            let now = Clock.monotonicNanoseconds
            guard now - last >= 1_000_000_000 else { return }
            last = now
            post(.progressed)
        }
    }

    private func end(_ channel: Channel, answers: Bool, _ post: @Sendable (SourceEvent) -> Void) {
        do throws(ChannelError) {
            try channel.finish()
            if channel.kind == .socket, !answers { try channel.awaitEnd() }
            post(.closed(error: nil))
        } catch { post(.closed(error: error.description)) }
        endChannels()
        // Reading ends too: the return path's thread goes.
        if channel.kind == .socket { channel.cancel() }
    }

    /// The connection is dead: jobs are dropped, what has an answer is answered.
    private func drain(_ channel: Channel, _ post: @Sendable (SourceEvent) -> Void) {
        endChannels()
        while let job = queue.wait(until: { $0.jobs.isEmpty ? nil : $0.jobs.removeFirst() }) {
            switch job {
            case .bytes, .skip: break
            case .round: post(.roundSent(RoundReport(pages: 0, bytes: 0, nanoseconds: 0, interrupted: true)))
            case .flush, .synchronize, .root, .digests, .discards, .serveRequests, .servePages: break
            case .package: post(.packageCut("the connection was lost"))
            case .stopTracking: tracker?.stop()
            case .close:
                channel.cancel()
                post(.closed(error: nil))
                return
            }
        }
    }
}
