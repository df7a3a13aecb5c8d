import Accelerator
public import GuestMemory
import Host
import MigrationStream
public import Transport

/// Rounds of pages over one channel, sent and received by what sends and receives them in a migration, without a migration around it: for
/// benchmarks. Every round sends all pages; with digests (`x-verify`) the end compares both sides' records.
public struct RoundTrial: Sendable {
    private let source: GuestMemory
    private let target: GuestMemory
    private let blocks: [RAMBlockDescription]
    private let migration: MigrationIdentifier
    private let verifies: Bool

    /// - Parameter target: memory with the same blocks.
    public init(from source: GuestMemory, to target: GuestMemory, verifies: Bool) {
        self.source = source
        self.target = target
        self.verifies = verifies
        blocks = source.blocks.map { RAMBlockDescription(name: $0.name, length: $0.byteCount) }
        migration = MigrationIdentifier(high: .random(in: 0...UInt64.max), low: .random(in: 0...UInt64.max))
    }

    /// The source's part, on the calling thread.
    /// - Parameters:
    ///   - bytesPerSecond: the limit to keep; 0: none.
    ///   - wrote: told of each write's bytes; returns whether to end.
    /// - Throws: `ChannelError`, `SystemError`.
    public func send(
        over channel: Channel, rounds: Int, bytesPerSecond: UInt64 = 0, wrote: (UInt64) -> Bool = { _ in false }
    ) throws {
        HostThread.sleepExactly()
        let tracker = AllPages(source)
        let digests = verifies ? try OutgoingVerification(source, migration) : nil
        var sender = try RoundSender(source, blocks: blocks, bitmaps: try tracker.makePages(), verification: digests)
        let route = RoundSender.Route(
            channel: channel, group: nil, batches: true, zeroPages: .legacy, mayGoPlain: true, marksEnd: false)
        let pacer = Pacer(bytesPerSecond: bytesPerSecond)
        try channel.send(opening)
        for _ in 0..<rounds {
            _ = try sender.collect(with: tracker)
            try channel.send(Self.bytes { $0.ramRound(final: false, id: SourceCore.ramSectionID) })
            let report: RoundReport
            do throws(RoundSender.Failure) {
                report = try sender.send(over: route, tracker: tracker, pacer: pacer) { sent in
                    guard let sent, sent.bytes > 0 else { return false }
                    return wrote(sent.bytes)
                }
            } catch {
                switch error {
                case .channel(let error): throw error
                case .tracking(let sentence): throw AcceleratorError(sentence)
                }
            }
            try channel.send(Self.bytes { $0.ramSectionEnd(id: SourceCore.ramSectionID) })
            if report.interrupted { break }
        }
        try channel.send(
            Self.bytes { writer in
                if let digests { writer.command(.root(digests.ledger.root)) }
                writer.command(.ping(0))
            })
    }

    /// The destination's part, on the calling thread, until the source has said all.
    /// - Throws: `ChannelError`, `StreamError`; with digests also `Corruption`.
    public func receive(from channel: Channel) throws {
        var receiver = PageReceiver(
            channel, behind: [], memory: target, blocks: blocks, catalogue: SectionCatalogue(),
            received: try ReceivedPages(target),
            statistics: IncomingStatistics(totalBytes: target.byteCount, listening: []))
        receiver.isCounted = true
        let digests = verifies ? try IncomingVerification(target, migration) : nil
        receiver.verification = digests
        while let item = try receiver.next() {
            switch item {
            case .command(.root(let root)):
                if digests?.compare(root: root) != .same { throw Corruption() }
            case .command(.ping): return
            default: try receiver.place(item)
            }
        }
        if let failure = receiver.failure { throw failure }
    }

    /// The records of both sides differ.
    public struct Corruption: Error, CustomStringConvertible {
        public var description: String { "a trial of rounds: what was received is not what was sent" }
    }

    private var opening: [UInt8] {
        Self.bytes { writer in
            writer.header()
            writer.configuration(machine: "trial")
            writer.command(.begin(migration, verifies ? .all.union(.verification) : .all))
            writer.ramSetup(id: SourceCore.ramSectionID, blocks: blocks)
        }
    }

    private static func bytes(_ write: (inout StreamWriter) -> Void) -> [UInt8] {
        var writer = StreamWriter()
        write(&writer)
        return writer.bytes
    }
}

/// A tracker of memory that nobody else writes: all of it is dirty, again and again.
private final class AllPages: DirtyTracker {
    let client = DirtyClient.migration
    let method = "all"
    let cpuNanoseconds: UInt64 = 0
    private let memory: GuestMemory

    init(_ memory: GuestMemory) { self.memory = memory }

    func makePages() throws(AcceleratorError) -> sending [any DirtyPages] {
        var pages: [any DirtyPages] = []
        do throws(SystemError) {
            for block in memory.blocks { pages.append(try DirtyBitmap(pageCount: block.pageCount)) }
        } catch { throw AcceleratorError(error.description) }
        return pages
    }

    func start() {}
    func stop() {}
    func willSend(_ pages: Range<PageIndex>, of block: Int, marked record: any DirtyPages) {}

    func collect(into pages: [any DirtyPages]) {
        for record in pages { record.set(record.allPages) }
    }
}
