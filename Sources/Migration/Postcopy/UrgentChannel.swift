import GuestMemory
import Host
import MigrationStream
import Synchronization
import Transport

/// One of the channels on which a Godwit destination asks for pages and gets them: a thread of its own, `urgent-N`.
///
/// It reads a request, takes the page out of what is left, and writes it: nothing is handed over between threads, and no other request
/// stands before it but on the same channel. The destination says there what concerns neighbouring pages.
final class UrgentChannel: Sendable {
    let number: Int
    private let channel: Channel
    private let memory: GuestMemory
    private let blocks: [RAMBlockDescription]
    private let requests: PageRequests
    private let isRunning = Monitor(false)
    private let ended = Atomic<Bool>(false)

    init(
        _ number: Int, _ channel: Channel, _ requests: PageRequests, memory: GuestMemory, blocks: [RAMBlockDescription]
    ) {
        self.number = number
        self.channel = channel
        self.requests = requests
        self.memory = memory
        self.blocks = blocks
    }

    /// Nobody wants it any more: its failure is none.
    var isEnded: Bool { ended.load(ordering: .acquiring) }

    /// - Parameters:
    ///   - cpuCount: so many vCPUs ask.
    ///   - sent: told of every write.
    ///   - failed: told why the channel is of no use any more.
    func start(
        among cpuCount: Int,
        sent: @escaping @Sendable (RecordWriter.Sent, OutgoingPages.Piece) -> Void,
        asked: @escaping @Sendable () -> Void, failed: @escaping @Sendable (UrgentChannel, ChannelError) -> Void
    ) throws(SystemError) {
        isRunning.withLock { $0 = true }
        do throws(SystemError) {
            _ = try HostThread(name: "urgent-\(number + 1)") { [self] in
                HostThread.runUrgently(among: cpuCount)
                var failure: ChannelError?
                do throws(ChannelError) { try run(sent, asked) } catch { failure = error }
                isRunning.withLock { $0 = false }
                if let failure, !isEnded { failed(self, failure) }
            }
        } catch {
            isRunning.withLock { $0 = false }
            throw error
        }
    }

    private func run(
        _ sent: (RecordWriter.Sent, OutgoingPages.Piece) -> Void, _ asked: () -> Void
    ) throws(ChannelError) {
        var records: RecordWriter
        do throws(SystemError) { records = try RecordWriter(memory, blocks: blocks) } catch { throw .system(error) }
        var decoder = ReturnPathDecoder(postcopyOf: blocks)
        var buffer = ReceiveBuffer(capacity: 4096)
        while true {
            while let request = try next(&decoder, &buffer) {
                asked()
                let pieces: [OutgoingPages.Piece]
                do throws(PageRequests.Refusal) { pieces = try requests.claim(request) } catch {
                    throw .unusable(error.description)
                }
                defer { requests.answered(request) }
                for piece in pieces {
                    let written = try records.send([piece], to: channel)
                    requests.left(piece)
                    sent(written, piece)
                }
            }
            let count = try unsafe buffer.fill(atLeast: 1024) { (room) throws(ChannelError) in
                try unsafe channel.receive(into: room)
            }
            guard count > 0 else { throw .unusable("the destination closed it") }
        }
    }

    private func next(
        _ decoder: inout ReturnPathDecoder, _ buffer: inout ReceiveBuffer
    ) throws(ChannelError) -> PageRequest? {
        let message: ReturnPathMessage?
        do throws(StreamError) { message = try decoder.next(from: &buffer) } catch {
            throw .unusable(error.description)
        }
        guard let message else { return nil }
        guard case .postcopy(.requestPages(let request)) = message else {
            throw .unusable("the destination says something else there than what it wants")
        }
        return request
    }

    /// Ends it, and waits for its thread.
    func end() {
        ended.store(true, ordering: .releasing)
        channel.cancel()
        isRunning.wait { $0 ? nil : () }
    }
}
