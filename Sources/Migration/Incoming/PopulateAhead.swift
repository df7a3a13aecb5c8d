import GuestMemory
import Host

/// Takes memory for the pages that are likely to come next, beside the threads that receive: the first touch of a page costs about as
/// much as to copy it.
///
/// Sources send memory in order, the first time. Who receives tells of each *granule* (2 MiB: a huge page where the host has them) of
/// which no page is left out; granules in a row open a window in front of them, the wider the longer the row: at most a quarter of the
/// row and `widestWindow`, so that what is taken in vain at the end of a row stays small beside it. A jump closes the window.
final class PopulateAhead: Sendable {
    static let granuleBytes: UInt64 = 2 << 20
    /// Granules: 32 MiB.
    static let widestWindow: UInt64 = 16
    /// Channels bring granules nearly in order.
    private static let disorder: UInt64 = 8
    static let mostThreads = 4
    /// A thread for which there is nothing to do ends.
    private static let idleMilliseconds: UInt64 = 500

    private struct Row {
        /// Granules in a row, up to and with `last`.
        var length: UInt64 = 0
        var last: UInt64 = 0
        /// The first granule for which nothing was asked yet.
        var frontier: UInt64 = 0
    }

    private struct State {
        var block = -1
        var row = Row()
        /// Granules of `block` to be populated.
        var wanted: Range<UInt64> = 0..<0
        var threads = 0
        var isClosed = false
        var populated: UInt64 = 0
    }

    private let memory: GuestMemory
    private let received: ReceivedPages
    private let state = Monitor(State())
    private let threadLimit: Int

    /// - Parameter threads: 0: nothing is done ahead. On a small host those who receive need the processors themselves: with two of them,
    ///   and the source on the same host, it was measured to gain nothing.
    init(
        _ memory: GuestMemory, received: ReceivedPages, threads: Int = min(mostThreads, HostMemory.processorCount / 4)
    ) {
        self.memory = memory
        self.received = received
        threadLimit = threads
    }

    /// Granules that were populated, for tests and figures.
    var populatedGranules: UInt64 { state.wait { $0.populated } ?? 0 }

    /// The stream has come to that place of a block, and brings all pages there. From any thread; cheap when called for each granule.
    func reached(_ offset: UInt64, of block: Int) {
        guard threadLimit > 0 else { return }
        let granule = offset / Self.granuleBytes
        let isWanted = state.wait { state -> Bool? in
            if state.isClosed || state.block == block && granule == state.row.last { return false }
            return Self.advance(&state, to: granule, of: block, end: memory.blocks[block].byteCount / Self.granuleBytes)
        }
        guard isWanted == true else { return }
        let starts = state.withLock { state in
            guard state.threads < threadLimit, !state.isClosed else { return false }
            state.threads += 1
            return true
        }
        guard starts else { return }
        // Where no thread can be had, pages are touched by those who receive them.
        do { _ = try HostThread.detached(name: "migration-popul") { [self] in populate() } } catch {
            state.withLock { $0.threads -= 1 }
        }
    }

    /// Nothing is populated any more once this returns, nor later: memory that is awaited must stay missing.
    func close() {
        state.withLock { state in
            state.isClosed = true
            state.wanted = 0..<0
        }
        state.wait { $0.threads == 0 ? () : nil }
    }

    /// - Returns: whether there is something to be done.
    private static func advance(_ state: inout State, to granule: UInt64, of block: Int, end: UInt64) -> Bool {
        let row = state.row
        if state.block == block, granule < row.last, row.last - granule <= disorder { return false }
        if state.block == block, granule > row.last, granule - row.last <= disorder {
            state.row.length += granule - row.last
        } else {
            state.block = block
            state.row.length = 1
            state.row.frontier = granule + 1
            state.wanted = 0..<0
        }
        state.row.last = granule
        // The next one is about to be touched by its receiver.
        let window = min(state.row.length / 4, widestWindow)
        let (from, to) = (max(state.row.frontier, granule + 2), min(granule + 2 + window, end))
        guard window > 0, from < to else { return false }
        state.wanted = (state.wanted.isEmpty ? from : max(state.wanted.lowerBound, granule + 2))..<to
        state.row.frontier = to
        return true
    }

    private func populate() {
        while true {
            let next = state.wait(deadline: .after(milliseconds: Self.idleMilliseconds)) { state -> (Int, UInt64)?? in
                if state.isClosed { return .some(nil) }
                guard !state.wanted.isEmpty else { return nil }
                defer { state.wanted = (state.wanted.lowerBound + 1)..<state.wanted.upperBound }
                return (state.block, state.wanted.lowerBound)
            }
            guard case .some(.some((let block, let granule))) = next else { break }
            let start = granule * Self.granuleBytes
            let pages = RAMOffset(start).page..<RAMOffset(start + Self.granuleBytes).page
            // What came before has memory; a later round goes over it again.
            guard received.isFresh(pages, of: block) else { continue }
            let mapping = memory.blocks[block].mapping
            do throws(SystemError) {
                // Only advice: where the host has no huge pages, small ones serve.
                try? mapping.advise(.hugePages, at: Int(start), count: Int(Self.granuleBytes))
                try mapping.advise(.populate, at: Int(start), count: Int(Self.granuleBytes))
            } catch { continue }
            state.withLock { $0.populated += 1 }
        }
        state.withLock { $0.threads -= 1 }
    }
}
