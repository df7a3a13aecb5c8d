import GuestMemory
import Host
import MigrationStream
import Synchronization

/// What a destination asked for and nobody has sent: the thread that reads its answers fills it, one thread empties it.
///
/// Pages in it were taken out of `OutgoingPages`, so none is in it twice however often it is asked for; and there are so many pieces at most:
/// who asks faster than pages go waits in its socket.
final class PageRequests: Sendable {
    typealias Piece = OutgoingPages.Piece

    private struct State {
        /// `nil`: nobody may ask yet.
        var pages: OutgoingPages?
        var pieces: [Piece] = []
        /// How many of them were taken.
        var taken = 0
        /// Pieces taken by the one who sends, and not told as sent; and requests whose pages were taken out of what is left, and are not
        /// among the pieces yet.
        var underWay = 0
        var isOver = false
        /// Who waits for requests has something else to look at.
        var isNudged = false
        /// The guest did not move after all: what was asked for before that was known does not count.
        var isWithdrawn = false
        /// Pages that were asked for though they were sent, or asked for, before.
        var vain: UInt64 = 0
        /// What was asked for last, as long as the walk over the rest has not gone there.
        var latest: OutgoingPages.Place?

        var isEmpty: Bool { taken == pieces.count }

        mutating func removeFirst() -> Piece? {
            guard taken < pieces.count else { return nil }
            defer {
                taken += 1
                underWay += 1
                // The front is given up now and then, not each time.
                if taken == pieces.count || taken >= PageRequests.mostPieces {
                    pieces.removeFirst(taken)
                    taken = 0
                }
            }
            return pieces[taken]
        }
    }
    private let state = Monitor(State())
    /// What will be asked for next.
    let prefetch: Prefetch
    /// From when a request was read until its page had left.
    let latency = PageLatency()
    /// Requests that threads are answering by themselves.
    private let answering = Atomic<Int>(0)

    /// So many pieces wait at most.
    private static let mostPieces = 4096
    /// A destination asks once for each page, which may be on its way just then; it may ask again for some, for each thread that waits there.
    /// So many beyond the pages there are. Counted by pages, so that one request of many costs as much as they.
    static let mostVain: UInt64 = 1 << 19

    enum Refusal: Error, CustomStringConvertible {
        case tooEarly(PageRequest)
        case endless
        case bitmapUnasked(block: String)

        var description: String {
            switch self {
            case .tooEarly(let request):
                "the destination asks for a page at offset \(RAMOffset(request.offset)) of RAM block '\(request.block)' before it "
                    + "has the guest"
            case .endless: "the destination asks without end for pages that it was sent"
            case .bitmapUnasked(let block):
                "the destination tells which pages of RAM block '\(block)' it received, and was not asked"
            }
        }
    }

    /// - Parameter isWithdrawn: requests may still come that are of no use any more.
    init(isWithdrawn: Bool = false, prefetch: Prefetch = Prefetch()) {
        self.prefetch = prefetch
        if isWithdrawn { state.withLock { $0.isWithdrawn = true } }
    }

    /// Requests may come.
    func open(_ pages: OutgoingPages) { state.withLock { $0.pages = pages } }

    // MARK: The thread that reads answers

    /// Takes a request up. Waits while too many are waiting. - Throws: what is wrong with it; the connection is of no use then.
    func add(_ request: PageRequest) throws(Refusal) {
        let (open, isWithdrawn) =
            state.wait { state in
                state.underWay += 1
                return .some((state.pages, state.isWithdrawn))
            } ?? (nil, false)
        guard open != nil || isWithdrawn else { throw .tooEarly(request) }
        let pieces = open?.take(request) ?? []
        defer { if let open { prefetch.asked(request, of: open) } }
        let isEndless = isEndless(request, pieces, of: open)
        guard !isEndless, let last = pieces.indices.last else {
            state.withLock { $0.underWay -= 1 }
            if isEndless { throw .endless }
            return
        }
        for (index, piece) in pieces.enumerated() {
            latency.asked(Self.place(of: piece))
            state.wait { $0.isOver || $0.pieces.count - $0.taken < Self.mostPieces ? () : nil }
            state.withLock { state in
                if index == last { state.underWay -= 1 }
                guard !state.isOver else { return }
                state.pieces.append(piece)
                state.latest = OutgoingPages.Place(block: piece.block, page: piece.pages.upperBound)
            }
        }
    }

    /// Nobody waits for this, and nobody is woken.
    private func isEndless(_ request: PageRequest, _ pieces: [Piece], of pages: OutgoingPages?) -> Bool {
        let vain = pages?.countOfVain(request, pieces) ?? 1
        guard vain > 0 else { return false }
        let all = state.wait { state -> UInt64? in
            state.vain += vain
            return state.vain
        }
        return all ?? 0 > Self.mostVain + (pages?.hostPageCount ?? 0)
    }

    // MARK: Threads that answer by themselves

    /// Takes out what is asked for, to be sent at once by the caller, who then says ``answered()``. - Throws: what is wrong with it.
    func claim(_ request: PageRequest) throws(Refusal) -> [Piece] {
        // Before its pages are taken: who then finds that none is left must not find nothing under way either.
        answering.wrappingAdd(1, ordering: .sequentiallyConsistent)
        let (open, isWithdrawn) =
            state.wait { .some(($0.isOver ? nil : $0.pages, $0.isWithdrawn || $0.isOver)) } ?? (nil, false)
        guard let open else {
            guard isWithdrawn else {
                endAnswer()
                throw .tooEarly(request)
            }
            return []
        }
        let pieces = open.take(request)
        for piece in pieces { latency.asked(Self.place(of: piece)) }
        if let last = pieces.last {
            // Nobody waits for this, and nobody is woken.
            _ = state.wait { state in
                state.latest = OutgoingPages.Place(block: last.block, page: last.pages.upperBound)
                return .some(())
            }
        }
        if isEndless(request, pieces, of: open) {
            endAnswer()
            throw .endless
        }
        return pieces
    }

    /// A claimed piece is on its way.
    func left(_ piece: Piece) { latency.arrived(Self.place(of: piece)) }

    /// What was claimed last, for this, is on its way.
    func answered(_ request: PageRequest) {
        endAnswer()
        // Not before: somebody was waiting.
        let open = state.wait { .some($0.pages) } ?? nil
        if let open { prefetch.asked(request, of: open) }
    }

    private func endAnswer() { answering.wrappingSubtract(1, ordering: .sequentiallyConsistent) }

    // MARK: The thread that sends them

    /// The next piece, waiting for it. - Returns: `nil`: there will be none.
    func next() -> Piece? {
        state.wait { state -> Piece?? in
            if let piece = state.removeFirst() { return .some(piece) }
            return state.isOver ? .some(nil) : nil
        } ?? nil
    }

    /// The next piece, if there is one.
    func nextNow() -> Piece? { state.wait { .some($0.removeFirst()) } ?? nil }

    /// The piece taken last is on its way: that one.
    func sent(_ piece: Piece) {
        latency.arrived(Self.place(of: piece))
        sent()
    }

    private static func place(of piece: Piece) -> PageLatency.Place {
        PageLatency.Place(block: piece.block, page: piece.pages.lowerBound)
    }

    /// The piece taken last is on its way.
    func sent() { state.withLock { $0.underWay -= 1 } }

    // MARK: The thread that sends the rest

    /// Where a request was since this was asked before.
    func takePlace() -> OutgoingPages.Place? {
        state.wait { state in
            defer { state.latest = nil }
            return .some(state.latest)
        } ?? nil
    }

    /// Waits for something to be asked for, for the end, or for a nudge.
    func waitForPiece() {
        state.wait { state -> Void? in
            guard state.isNudged || state.isOver || !state.isEmpty else { return nil }
            state.isNudged = false
            return ()
        }
    }

    /// Ends such a wait, also one that begins later.
    func nudge() { state.withLock { $0.isNudged = true } }

    /// Waits that long, or until the end; or, where `forPiece`, until something is asked for.
    func pause(nanoseconds: UInt64, forPiece: Bool) {
        state.wait(deadline: .after(nanoseconds: nanoseconds)) { state in
            state.isOver || forPiece && !state.isEmpty ? () : nil
        }
    }

    /// Waits until all that was asked for is on its way, at most that long. - Returns: whether it is.
    /// - Parameter servesItself: who asks is also who sends: it does not wait for what it has to send itself.
    func settle(nanoseconds: UInt64, servesItself: Bool = false) -> Bool {
        let isSettled =
            state.wait(deadline: .after(nanoseconds: nanoseconds)) { state -> Bool? in
                if state.isEmpty, state.underWay == 0 { return true }
                return servesItself && !state.isEmpty ? false : nil
            } ?? false
        guard isSettled, answering.load(ordering: .sequentiallyConsistent) > 0 else { return isSettled }
        // Those threads wake nobody.
        Clock.sleep(nanoseconds: min(nanoseconds, 100_000))
        return false
    }

    var isOver: Bool { state.wait { .some($0.isOver) } ?? true }

    /// The guest did not move: nothing is taken up any more, and what waits is not sent.
    func withdraw() {
        state.withLock { state in
            state.isOver = true
            state.pieces = []
            state.taken = 0
        }
    }

    /// Nothing is taken up any more, and who waits goes on. What waits is sent before ``next()`` says that it was all.
    func close() { state.withLock { $0.isOver = true } }
}
