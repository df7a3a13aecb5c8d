import GuestMemory
import Host
import Transport

/// Sends all that nobody asked for, behind what was asked for last; and, where there is no channel for that, what is asked for. One
/// screen: `run`.
struct BackgroundSender: ~Copyable {
    let pages: OutgoingPages
    let requests: PageRequests
    var records: RecordWriter
    let pacer: Pacer
    /// Requested pages go over the same channel, each before the next batch.
    let servesRequests: Bool
    /// Other pages go as batches, to a Godwit: their contents are read where they are placed from.
    let batches: Bool
    private var place = OutgoingPages.Place()

    /// What stands before a requested page in a channel's way is little.
    private static let batchPages: UInt64 = 16
    private static let lookNanoseconds: UInt64 = 10_000_000

    init(
        _ pages: OutgoingPages, _ requests: PageRequests, _ records: consuming RecordWriter, _ pacer: Pacer,
        servesRequests: Bool, batches: Bool = false
    ) {
        self.pages = pages
        self.requests = requests
        self.records = records
        self.pacer = pacer
        self.servesRequests = servesRequests
        self.batches = batches
    }

    /// - Parameters:
    ///   - sent: told of every write.
    ///   - mustEnd: asked before each.
    /// - Returns: whether all pages are on their way, those too that others send.
    mutating func run(
        over channel: Channel, sent: (RecordWriter.Sent, OutgoingPages.Piece) -> Void, mustEnd: () -> Bool
    ) throws(ChannelError) -> Bool {
        while !mustEnd() {
            if servesRequests { try serve(over: channel, sent) }
            if pages.count == 0 {
                if requests.settle(nanoseconds: Self.lookNanoseconds, servesItself: servesRequests) { return true }
                continue
            }
            // What was asked for was paid for as well, but did not wait: the rest does.
            let due = pacer.sent(0, at: Clock.monotonicNanoseconds)
            guard due == 0 else {
                requests.pause(nanoseconds: min(due, Self.lookNanoseconds), forPiece: servesRequests)
                continue
            }
            if let latest = requests.takePlace() { place = latest }
            let limit = UInt64(pacer.batchBytes(most: Int(Self.batchPages) * 4096) / 4096)
            let batch = pages.take(from: &place, limit: limit)
            // Others may have taken the last ones just now.
            guard let first = batch.first else { continue }
            let written = try records.send(batch, batches: batches, to: channel)
            _ = pacer.sent(written.bytes, at: Clock.monotonicNanoseconds)
            sent(written, first)
        }
        return false
    }

    /// Sends what is asked for, and nothing else, until there is something else to do, or nothing can be asked for any more.
    mutating func runRequests(
        over channel: Channel, sent: (RecordWriter.Sent, OutgoingPages.Piece) -> Void, mustEnd: () -> Bool
    ) throws(ChannelError) {
        while true {
            try serve(over: channel, sent)
            if mustEnd() || requests.isOver { return }
            requests.waitForPiece()
        }
    }

    private mutating func serve(
        over channel: Channel, _ sent: (RecordWriter.Sent, OutgoingPages.Piece) -> Void
    ) throws(ChannelError) {
        while let piece = requests.nextNow() {
            let written = try records.send([piece], to: channel)
            _ = pacer.sent(written.bytes, at: Clock.monotonicNanoseconds)
            sent(written, piece)
            requests.sent()
        }
    }
}
