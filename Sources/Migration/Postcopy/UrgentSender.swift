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
    ///   - sent: told of every write.
    ///   - failed: told why the channel is of no use any more.
    func start(
        sent: @escaping @Sendable (RecordWriter.Sent, OutgoingPages.Piece) -> Void,
        failed: @escaping @Sendable (ChannelError) -> Void
    ) throws(SystemError) {
        isRunning.withLock { $0 = true }
        do throws(SystemError) {
            _ = try HostThread(name: "urgent-send") { [self] in
                _ = HostThread.runBeforeOthers()
                do throws(ChannelError) { try run(sent) } catch {
                    if !isEnded.load(ordering: .acquiring) { failed(error) }
                }
                isRunning.withLock { $0 = false }
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
            requests.sent()
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
