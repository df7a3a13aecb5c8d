import GuestMemory
import Host
import MigrationStream
import Synchronization
import Transport

/// Sends requested pages over a channel of their own (`postcopy-preempt`): one thread, `urgent-send`, which waits for nothing but requests.
///
/// The channel begins without a greeting, with the first page's record, and has an encoder of its own. QEMU 7.2 wants EOS at its end.
final class UrgentSender: Sendable {
    private let channel: Channel
    private let memory: GuestMemory
    private let blocks: [RAMBlockDescription]
    private let requests: PageRequests
    /// Whether the thread is there.
    private let isRunning = Monitor(false)
    private let isEnded = Atomic<Bool>(false)

    init(_ channel: Channel, _ requests: PageRequests, memory: GuestMemory, blocks: [RAMBlockDescription]) {
        self.channel = channel
        self.requests = requests
        self.memory = memory
        self.blocks = blocks
    }

    /// - Parameters:
    ///   - cpuCount: so many vCPUs ask.
    ///   - sent: told of every write.
    ///   - failed: told why the channel is of no use any more, and whether that still matters when it is asked.
    func start(
        among cpuCount: Int,
        sent: @escaping @Sendable (RecordWriter.Sent, OutgoingPages.Piece) -> Void,
        failed: @escaping @Sendable (_ reason: ChannelError, _ matters: () -> Bool) -> Void
    ) throws(SystemError) {
        isRunning.withLock { $0 = true }
        do throws(SystemError) {
            _ = try HostThread(name: "urgent-send") { [self] in
                HostThread.runUrgently(among: cpuCount)
                do throws(ChannelError) { try run(sent) } catch {
                    failed(error) { !isEnded.load(ordering: .acquiring) }
                }
                isRunning.withLock { $0 = false }
            }
            // Nothing ever comes back on it but its end, which somebody must notice while nothing is asked for.
            _ = try HostThread.detached(name: "urgent-watch") { [self] in
                var words: [UInt8] = []
                while let count = try? channel.receive(appendingTo: &words, upTo: 64), count > 0 { words = [] }
                failed(.endOfStream(peer: channel.peer, received: 0, wanted: 1)) {
                    !requests.isOver && !isEnded.load(ordering: .acquiring)
                }
            }
        } catch {
            isRunning.withLock { $0 = false }
            throw error
        }
    }

    private func run(_ sent: (RecordWriter.Sent, OutgoingPages.Piece) -> Void) throws(ChannelError) {
        var records: RecordWriter
        do throws(SystemError) { records = try RecordWriter(memory, blocks: blocks) } catch { throw .system(error) }
        while let piece = requests.next() {
            sent(try records.send([piece], to: channel), piece)
            requests.sent(piece)
        }
        var last = StreamWriter()
        last.endOfRecords()
        try channel.send(last.bytes)
    }

    /// Waits until the last word was said; `requests` were closed.
    func finish() { isRunning.wait { $0 ? nil : () } }

    /// Nobody wants it any more: its failure is none.
    func end() {
        isEnded.store(true, ordering: .releasing)
        channel.cancel()
    }
}

extension RecordWriter {
    /// Sends pieces of one block in one write, as records that every destination of postcopy knows, or as a batch.
    /// - Parameter pieces: all of a kind; at most ``classicPages`` pages, but for one piece, which may take several writes.
    mutating func send(
        _ pieces: [OutgoingPages.Piece], batches: Bool = false, to channel: Channel
    ) throws(ChannelError) -> Sent {
        guard let first = pieces.first else { return Sent() }
        if first.isHole {
            return try sendZeroes(first.pages.map { $0.offset.value }, of: first.block, to: channel)
        }
        guard first.pageCount > Self.classicPages else {
            return try send(pieces.map(\.pages), of: first.block, batches: batches, findsZeroes: true, to: channel)
        }
        var all = Sent()
        var start = first.pages.lowerBound
        while start < first.pages.upperBound {
            let end = min(PageIndex(start.value + Self.classicPages), first.pages.upperBound)
            let sent = try send([start..<end], of: first.block, batches: false, findsZeroes: true, to: channel)
            all.bytes += sent.bytes
            all.normal += sent.normal
            all.zero += sent.zero
            start = end
        }
        return all
    }
}
