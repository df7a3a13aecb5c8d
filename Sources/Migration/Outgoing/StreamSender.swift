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
        case round(final: Bool, batches: Bool)
        case flush
        case stopTracking
        case close
    }

    private struct Queue {
        var jobs: [Job] = []
    }
    private let queue = Monitor(Queue())
    private let round: Mutex<RoundSender>
    private let tracker: (any DirtyTracker)?
    private let statistics: OutgoingStatistics
    private let interrupted = Atomic<Bool>(false)
    private let waiting = Atomic<Bool>(false)
    private let bandwidth = Atomic<UInt64>(0)
    /// The size the cache of `xbzrle` should have from the next round on; 0: as it is.
    private let xbzrleCache = Atomic<UInt64>(0)

    init(
        _ memory: GuestMemory, blocks: [RAMBlockDescription], tracker: (any DirtyTracker)?,
        bitmaps: sending [any DirtyPages], statistics: OutgoingStatistics, xbzrleCacheBytes: UInt64? = nil
    ) throws(SystemError) {
        self.tracker = tracker
        self.statistics = statistics
        round = Mutex(
            try RoundSender(memory, blocks: blocks, bitmaps: bitmaps, xbzrleCacheBytes: xbzrleCacheBytes))
    }

    /// Events wait for the core: a round that is not the last one ends at the next batch.
    var eventsWait: Bool {
        get { waiting.load(ordering: .relaxed) }
        set { waiting.store(newValue, ordering: .relaxed) }
    }

    func interruptRound() { interrupted.store(true, ordering: .relaxed) }

    func setBandwidth(_ bytesPerSecond: UInt64) { bandwidth.store(bytesPerSecond, ordering: .relaxed) }

    func setXBZRLECache(_ byteCount: UInt64) { xbzrleCache.store(byteCount, ordering: .relaxed) }

    func enqueue(_ job: Job) { queue.withLock { $0.jobs.append(job) } }

    /// Merges what the tracker reports into what is to be sent; without a tracker all allocated pages are dirty, once.
    ///
    /// Called while no round is under way. - Returns: the pages to be sent.
    func collect() throws(AcceleratorError) -> UInt64 {
        try round.withLock { (round) throws(AcceleratorError) in try round.collect(with: tracker) }
    }

    /// Starts the thread; `post` gets what the core wants to know.
    func attach(_ channel: Channel, post: @escaping @Sendable (SourceEvent) -> Void) {
        do throws(SystemError) {
            _ = try HostThread(name: "migration-send") { [self] in run(channel, post) }
        } catch { post(.disconnected(error.description)) }
    }

    // MARK: The thread

    private func run(_ channel: Channel, _ post: @escaping @Sendable (SourceEvent) -> Void) {
        while let job = queue.wait(until: { $0.jobs.isEmpty ? nil : $0.jobs.removeFirst() }) {
            do throws(ChannelError) {
                switch job {
                case .bytes(let bytes):
                    try channel.send(bytes)
                    statistics.sent(bytes: UInt64(bytes.count))
                case .round(let final, let batches): try send(channel, final: final, batches: batches, post)
                case .flush: post(.flushed)
                case .stopTracking: tracker?.stop()
                case .close:
                    end(channel, post)
                    return
                }
            } catch {
                post(.disconnected(error.description))
                drain(channel, post)
                return
            }
        }
    }

    private func send(
        _ channel: Channel, final: Bool, batches: Bool, _ post: @escaping @Sendable (SourceEvent) -> Void
    )
        throws(ChannelError)
    {
        interrupted.store(false, ordering: .relaxed)
        let began = Clock.monotonicNanoseconds
        var progress = Progress(post: post)
        var failure: ChannelError?
        var report = round.withLock { round -> RoundReport in
            round.prepareDeltas(cacheBytes: xbzrleCache.load(ordering: .relaxed), isFinal: final)
            do throws(RoundSender.Failure) {
                return try round.send(
                    to: channel, batches: batches, tracker: tracker,
                    pacer: Pacer(bytesPerSecond: final ? 0 : bandwidth.load(ordering: .relaxed))
                ) { bytes, normal, duplicate, deltas in
                    statistics.sent(bytes: bytes, normal: normal, duplicate: duplicate)
                    statistics.encoded(deltas)
                    progress.note()
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
        report.nanoseconds = Clock.monotonicNanoseconds - began
        post(.roundSent(report))
        if let failure { throw failure }
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

    private func end(_ channel: Channel, _ post: @Sendable (SourceEvent) -> Void) {
        do throws(ChannelError) {
            try channel.finish()
            post(.closed(error: nil))
        } catch { post(.closed(error: error.description)) }
        // Reading ends too: the return path's thread goes.
        if channel.kind == .socket { channel.cancel() }
    }

    /// The connection is dead: jobs are dropped, what has an answer is answered.
    private func drain(_ channel: Channel, _ post: @Sendable (SourceEvent) -> Void) {
        while let job = queue.wait(until: { $0.jobs.isEmpty ? nil : $0.jobs.removeFirst() }) {
            switch job {
            case .bytes: break
            case .round: post(.roundSent(RoundReport(pages: 0, bytes: 0, nanoseconds: 0, interrupted: true)))
            case .flush: break
            case .stopTracking: tracker?.stop()
            case .close:
                channel.cancel()
                post(.closed(error: nil))
                return
            }
        }
    }
}
