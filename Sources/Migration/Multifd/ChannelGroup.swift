import GuestMemory
import Host
import MigrationStream
import Synchronization
import Transport

/// The channels of an outgoing migration over which pages go (multifd): one blocking thread each, `multifd-send-N`, which takes the
/// next pages from a short queue, looks for zeros, and sends a packet's head and contents in one gathering write from guest memory; under
/// a bandwidth limit in several, each when its turn has come.
///
/// One thread, that of the main channel, fills the queue and asks for SYNC: what it asks for comes after all it enqueued before.
final class ChannelGroup: Sendable {
    /// Pages for whichever channel is free.
    struct Item: Sendable {
        let block: Int
        let runs: [Range<PageIndex>]
        let zeroPages: ZeroPageDetection
        /// The peer takes plain packets among compressed ones: it is a Godwit.
        let mayGoPlain: Bool
    }

    /// What waits for the threads.
    struct Work {
        var items: [Item] = []
        /// Times that SYNC was asked for.
        var synchronizations: UInt64 = 0
        var isOver = false
    }

    /// What waits for the thread of the main channel.
    struct Progress {
        /// Items that no thread has taken.
        var queued = 0
        /// Threads that sent the last SYNC.
        var synchronized = 0
        /// Sent since the round began.
        var bytes: UInt64 = 0
        /// Of the pages that were compressed, in memory.
        var contentBytes: UInt64 = 0
        /// Threads that wait for their turn: what does not move then is no fault of the peer.
        var paying = 0
        /// Zero pages to be told on the main channel.
        var zeroes: [(block: Int, offsets: [UInt64])] = []
        var failure: ChannelError?
    }

    let channels: [Channel]
    let memory: GuestMemory
    let codec: MultifdCodec
    let statistics: OutgoingStatistics
    /// `nil`: contents go as they are.
    let packing: PacketPacking?
    /// With the capability `x-verify`.
    let verification: OutgoingVerification?
    let work = Monitor(Work())
    let progress = Monitor(Progress())
    /// What those who wait for their turn look at.
    struct Pace {
        /// The round is to end, or everything: bandwidth counts no more.
        var isInHurry = false
        /// How often the rate was changed.
        var changes: UInt64 = 0
    }
    let pace = Monitor(Pace())
    /// One for all channels: together they keep the limit.
    let pacer = Mutex(Pacer.unlimited)
    /// Packets are numbered through all channels.
    let packetNumber = Atomic<UInt64>(0)
    /// The most pages of one item. Few channels take whole huge pages, so that no two of them touch one at the destination at once.
    private let mostItemPages: UInt64
    private let mostQueued: Int

    /// At most so many items wait beside those that are being sent.
    private static let queueLimit = 8
    /// Pages of a packet however slow the channels are: a head has the size of a head of 128 pages. But no packet is to take longer than a
    /// second; and what is queued goes out at once when a round ends early, so that it is to be little beside what a second may hold.
    private static let fewestPages: UInt64 = 16
    private static let packetsPerSecond: UInt64 = 50
    private static let lookMilliseconds: UInt64 = 20

    /// - Parameter channels: connected, and greeted on.
    init(
        _ channels: [Channel], memory: GuestMemory, blocks: [RAMBlockDescription], statistics: OutgoingStatistics,
        packing: PacketPacking?, verification: OutgoingVerification? = nil
    ) {
        self.channels = channels
        self.memory = memory
        self.statistics = statistics
        self.packing = packing
        self.verification = verification
        codec = MultifdCodec(blocks: blocks)
        mostItemPages = channels.count <= Self.queueLimit ? 512 : UInt64(MultifdWire.packetPages)
        mostQueued = min(max(channels.count, 2), Self.queueLimit)
        statistics.sent(bytes: UInt64(channels.count * MultifdGreeting.byteCount), overChannels: true)
    }

    /// - Throws: `SystemError`; no thread of it is left then.
    func start() throws(SystemError) {
        for index in channels.indices {
            do throws(SystemError) {
                _ = try HostThread(name: "multifd-send-\(index + 1)") { [self] in run(index) }
            } catch {
                end()
                throw error
            }
        }
    }

    // MARK: The thread of the main channel

    /// The most pages of an item.
    var itemPages: UInt64 {
        let pacer = pacer.withLock { $0 }
        let most = pacer.batchBytes(most: Int(mostItemPages) * Wire.pageSize)
        let rate = pacer.bytesPerSecond
        guard rate > 0 else { return max(UInt64(most / Wire.pageSize), Self.fewestPages) }
        let second = max(1, rate / UInt64(Wire.pageSize))
        let worthTheHead = min(second / Self.packetsPerSecond, UInt64(MultifdWire.packetPages))
        return max(UInt64(most / Wire.pageSize), worthTheHead, min(Self.fewestPages, second))
    }

    /// The most bytes of one write: packets are larger than what may go out at once.
    var writeBytes: Int { pacer.withLock { $0 }.batchBytes(most: .max) }

    func beginRound(_ pacer: Pacer) {
        self.pacer.withLock { $0 = pacer }
        pace.withLock { $0.isInHurry = false }
        progress.withLock { ($0.bytes, $0.contentBytes) = (0, 0) }
    }

    /// Queues an item when there is room. - Returns: false when `isOver` said so while there was none.
    func enqueue(_ item: Item, unless isOver: () -> Bool) throws(ChannelError) -> Bool {
        while true {
            let room = progress.wait(deadline: .after(milliseconds: Self.lookMilliseconds)) {
                progress -> Result<Void, ChannelError>? in
                if let failure = progress.failure { return .failure(failure) }
                guard progress.queued < mostQueued else { return nil }
                progress.queued += 1
                return .success(())
            }
            if let room {
                try room.get()
                // Whoever waits for work can take it: with 64 channels it matters that the others sleep on.
                work.withLockWakingOne { $0.items.append(item) }
                return true
            }
            if isOver() { return false }
        }
    }

    /// Zero pages found since the last time.
    func takeZeroes() -> [(block: Int, offsets: [UInt64])] {
        progress.wait { progress in
            let zeroes = progress.zeroes
            progress.zeroes = []
            return zeroes
        } ?? []
    }

    /// In memory, of the pages that were compressed since the round began.
    var contentBytes: UInt64 { progress.wait { $0.contentBytes } ?? 0 }

    /// Has every channel send SYNC behind all that was enqueued, and waits until they have.
    /// - Parameter moved: called now and then while bytes go out.
    /// - Returns: the bytes sent since the round began.
    func synchronize(inHurry: Bool = false, moved: () -> Void = {}) throws(ChannelError) -> UInt64 {
        progress.withLock { $0.synchronized = 0 }
        if inHurry { hurry() }
        work.withLock { $0.synchronizations += 1 }
        var seen: UInt64 = 0
        while true {
            let result = progress.wait(deadline: .after(seconds: 1)) { progress -> Result<UInt64, ChannelError>? in
                if let failure = progress.failure { return .failure(failure) }
                return progress.synchronized == channels.count ? .success(progress.bytes) : nil
            }
            if let result { return try result.get() }
            let (bytes, isPaying) = progress.wait { ($0.bytes, $0.paying > 0) } ?? (seen, false)
            if bytes != seen || isPaying { moved() }
            seen = bytes
        }
    }

    // MARK: From any thread

    /// What is queued goes out without regard to the bandwidth limit.
    func hurry() { pace.withLock { $0.isInHurry = true } }

    /// The pacer goes at another rate: who waits by the old one has waited enough.
    func rateChanged() { pace.withLock { $0.changes += 1 } }

    /// Whether channels stand still only because the bandwidth limit says so.
    var isPaying: Bool { progress.wait { $0.paying > 0 } ?? false }

    /// Ends all channels and their threads at once.
    func end() {
        work.withLock { work in
            work.items = []
            work.isOver = true
        }
        hurry()
        for channel in channels { channel.cancel() }
        progress.withLock { $0.failure = $0.failure ?? .cancelled }
    }
}
