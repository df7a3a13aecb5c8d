import GuestMemory
import Host
import Transport

/// Sends all that nobody asked for: what will be asked for next, then the rest, behind what was asked for last; and, where there is no
/// channel for that, what is asked for. One screen: `run`.
struct BackgroundSender: ~Copyable {
    let pages: OutgoingPages
    let requests: PageRequests
    var records: RecordWriter
    let pacer: Pacer
    let pace: BackgroundPace
    /// Requested pages go over the same channel, each before the next batch.
    let servesRequests: Bool
    /// Other pages go as batches, to a Godwit: their contents are read where they are placed from.
    let batches: Bool
    private var place = OutgoingPages.Place()

    private static let lookNanoseconds: UInt64 = 10_000_000
    /// So few pages are not worth a write of their own.
    private static let fewPages: UInt64 = 8

    init(
        _ pages: OutgoingPages, _ requests: PageRequests, _ records: consuming RecordWriter, _ pacer: Pacer,
        _ pace: BackgroundPace, servesRequests: Bool, batches: Bool = false
    ) {
        self.pages = pages
        self.requests = requests
        self.records = records
        self.pacer = pacer
        self.pace = pace
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
        if let bytes = pace.socketBytes(roundTrip: channel.roundTripNanoseconds ?? 0) {
            channel.limitUnsent(bytes: bytes)
        }
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
            let limit = pagesAtOnce
            let batch = nextBatch(limit: limit)
            // Others may have taken the last ones just now.
            guard let first = batch.first else { continue }
            if first.pageCount > UInt64(limit) {
                guard try sendWhole(first, over: channel, sent, mustEnd: mustEnd) else { return false }
                continue
            }
            let written = try records.send(batch, batches: batches, to: channel)
            let now = Clock.monotonicNanoseconds
            _ = pacer.sent(written.bytes, at: now)
            pace.sent(written.bytes, at: now)
            sent(written, first)
        }
        return false
    }

    /// Takes what will be asked for next, and if that is little or nothing, what the walk comes to.
    private mutating func nextBatch(limit: Int) -> [OutgoingPages.Piece] {
        let foreseen = requests.prefetch.take(from: pages, limit: limit)
        let end = turn()
        let left = min(UInt64(limit), end - place.page.value)
        guard let first = foreseen.first else { return pages.take(from: &place, limit: left) }
        let count = foreseen.reduce(0) { $0 + $1.pageCount }
        guard count < min(Self.fewPages, left), place.block == first.block else { return foreseen }
        return foreseen + pages.takeMore(from: &place, limit: left - count)
    }

    /// Has the walk go to where a page was asked for last; but not out of what may be a huge page at the destination, which is put together
    /// of pages that come one behind the other. - Returns: the page where that ends.
    private mutating func turn() -> UInt64 {
        let huge = RAMBlock.transparentHugePages
        func start(of page: PageIndex) -> UInt64 { page.value / huge * huge }
        let isInside = place.page.value % huge != 0
        if !isInside || !pages.isAnyLeft(from: place, before: PageIndex(start(of: place.page) + huge)),
            let latest = requests.takePlace()
        {
            place = OutgoingPages.Place(block: latest.block, page: PageIndex(start(of: latest.page.advanced(by: -1))))
        }
        return start(of: place.page) + huge
    }

    private var pagesAtOnce: Int {
        pacer.batchBytes(most: pace.batchBytes, withinMicroseconds: pace.targetMicroseconds) / 4096
    }

    /// A page of the destination's memory that is many of the stream's: nothing may stand between them, a requested page neither.
    /// - Returns: false: `mustEnd` said so.
    private mutating func sendWhole(
        _ piece: OutgoingPages.Piece, over channel: Channel,
        _ sent: (RecordWriter.Sent, OutgoingPages.Piece) -> Void, mustEnd: () -> Bool
    ) throws(ChannelError) -> Bool {
        var start = piece.pages.lowerBound
        while start < piece.pages.upperBound {
            guard !mustEnd() else { return false }
            let due = pacer.sent(0, at: Clock.monotonicNanoseconds)
            guard due == 0 else {
                requests.pause(nanoseconds: min(due, Self.lookNanoseconds), forPiece: false)
                continue
            }
            let end = min(start.advanced(by: pagesAtOnce), piece.pages.upperBound)
            let part = OutgoingPages.Piece(block: piece.block, pages: start..<end)
            let written = try records.send([part], to: channel)
            let now = Clock.monotonicNanoseconds
            _ = pacer.sent(written.bytes, at: now)
            pace.sent(written.bytes, at: now)
            sent(written, part)
            start = end
        }
        return true
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
            requests.sent(piece)
        }
    }
}
