import GuestMemory
import Host
import MigrationStream
import Synchronization

/// The receiving side of `x-verify`: compares each page with the digest that came with it, and in the end all with what the source has sent.
///
/// A page may be written by the guest between the source's look at it and its way into the socket: its contents do not fit their digest
/// then, and as it is dirty again, it comes again. So a page that does not fit is *pending* until it comes again; pages that are pending
/// when the source says its root, with the guest stopped and all sent, are corrupt.
final class IncomingVerification: Sendable {
    let hasher: PageHasher
    private let ledger: PageLedger
    private let names: [String]

    private struct Place: Hashable, Comparable {
        let block: Int
        let page: UInt64
        static func < (left: Place, right: Place) -> Bool { (left.block, left.page) < (right.block, right.page) }
    }
    /// The contents that came, and those that were announced; `former`: the digest before.
    private struct Mismatch {
        let received: UInt64
        let announced: UInt64
        let former: UInt64
        /// How many there were before.
        var number: UInt64 = 0
    }
    private struct Search {
        var groups: [(block: Int, group: UInt64)] = []
        var findings: [PageFinding] = []
        var next = DigestRange(level: .groups, block: 0, first: 0, count: 0)
    }
    private struct State {
        var pending: [Place: Mismatch] = [:]
        var mismatches: UInt64 = 0
        var hasOverflowed = false
        var search: Search?
    }
    private let state = Mutex(State())

    /// So many pages may wait for coming again; a source whose pages all break is not worth more memory.
    private static let pendingLimit = 1 << 20
    /// So many groups that differ are looked into, and so many pages are named in the sentence for the source.
    private static let groupLimit = 64
    private static let namedPages = 8
    /// So many lines of them are for the log: a host whose memory breaks everywhere is found out by fewer.
    private static let mostLogLines = 128

    init(_ memory: GuestMemory, _ migration: MigrationIdentifier) throws(SystemError) {
        hasher = try PageHasher(migration)
        ledger = try PageLedger(pageCounts: memory.blocks.map(\.pageCount))
        names = memory.blocks.map(\.name)
    }

    // MARK: Pages

    /// Pages were placed into memory. - Parameter digests: of all their pages, in order.
    func received(
        _ runs: some Sequence<Range<PageIndex>>, of block: Int, in mapping: Mapping, digests: ArraySlice<UInt64>
    ) {
        var mismatches: [(Place, Mismatch)] = []
        var found: [UInt64] = []
        found.reserveCapacity(digests.count)
        for run in runs {
            let pages = run.lowerBound.value..<run.upperBound.value
            found += hasher.digests(pages, of: block, mapping, at: Int(pages.lowerBound) * PageHasher.pageBytes)
        }
        if !digests.elementsEqual(found) { mismatches = differences(runs, block, announced: digests, found: found) }
        ledger.record(runs, of: block, digests: digests)
        note(mismatches, among: runs, of: block)
    }

    private func differences(
        _ runs: some Sequence<Range<PageIndex>>, _ block: Int, announced: ArraySlice<UInt64>, found: [UInt64]
    ) -> [(Place, Mismatch)] {
        zip(runs.joined(), zip(announced, found)).filter { $1.0 != $1.1 }.map { page, digests in
            let mismatch = Mismatch(
                received: hasher.hash(behind: digests.1, block: block, page: page.value),
                announced: hasher.hash(behind: digests.0, block: block, page: page.value),
                former: ledger.digest(of: page.value, in: block))
            return (Place(block: block, page: page.value), mismatch)
        }
    }

    func receivedZeroes(_ pages: Range<PageIndex>, of block: Int) {
        ledger.record(pages.lowerBound.value..<pages.upperBound.value, of: block) { [hasher] in
            hasher.zeroDigest(block: block, page: $0)
        }
        note([], among: CollectionOfOne(pages), of: block)
    }

    /// Of these pages those are pending, and no others.
    private func note(
        _ mismatches: [(Place, Mismatch)], among runs: some Sequence<Range<PageIndex>>, of block: Int
    ) {
        state.withLock { state in
            if !state.pending.isEmpty {
                for run in runs {
                    for page in run.lowerBound.value..<run.upperBound.value {
                        state.pending[Place(block: block, page: page)] = nil
                    }
                }
            }
            for (place, mismatch) in mismatches {
                guard state.pending.count < Self.pendingLimit else {
                    state.hasOverflowed = true
                    break
                }
                state.pending[place] = mismatch
                state.pending[place]?.number = state.mismatches
                state.mismatches += 1
            }
        }
    }

    // MARK: The end

    /// The source said the root over all it sent; everything before it was placed.
    func compare(root: UInt64) -> RootVerdict {
        state.withLock { state in
            // One that a lost connection ended has nothing to say any more.
            state.search = nil
            if root == ledger.root { return verdict(&state) }
            state.search = Search()
            return nextQuestion(&state)
        }
    }

    /// The source's answer to a question.
    func compare(_ range: DigestRange, _ theirs: [UInt64]) -> RootVerdict {
        state.withLock { state in
            guard var search = state.search, range == search.next, theirs.count == Int(range.count),
                let ours = ledger.values(range)
            else { return .corrupt("x-verify: the source answered with digests that were not asked for") }
            let block = Int(range.block)
            for (index, (our, their)) in zip(ours, theirs).enumerated() where our != their {
                let number = range.first + UInt64(index)
                switch range.level {
                case .groups: if search.groups.count < Self.groupLimit { search.groups.append((block, number)) }
                case .pages, .invalid:
                    let kind: PageFinding.Kind = our == 0 ? .dropped : their == 0 ? .uncalledFor : .outdated
                    search.findings.append(PageFinding(block: block, page: number, kind: kind))
                }
            }
            state.search = search
            return nextQuestion(&state)
        }
    }

    /// First the sums of all groups, then the pages of those that differ.
    private func nextQuestion(_ state: inout State) -> RootVerdict {
        guard var search = state.search else { return verdict(&state) }
        defer { state.search = search }
        if search.next.level == .groups {
            var (block, first) = (Int(search.next.block), search.next.first + UInt64(search.next.count))
            while block < ledger.blockCount, first >= ledger.count(.groups, of: block) {
                (block, first) = (block + 1, 0)
            }
            if block < ledger.blockCount {
                let count = min(ledger.count(.groups, of: block) - first, UInt64(StreamLimit.digests))
                search.next = DigestRange(level: .groups, block: UInt32(block), first: first, count: UInt32(count))
                return .ask(search.next)
            }
        }
        guard !search.groups.isEmpty else { return verdict(&state) }
        let (block, group) = search.groups.removeFirst()
        let first = group * PageLedger.groupPages
        let count = min(ledger.count(.pages, of: block) - first, PageLedger.groupPages)
        search.next = DigestRange(level: .pages, block: UInt32(block), first: first, count: UInt32(count))
        return .ask(search.next)
    }

    /// The first pages that came with contents which do not fit their digest and did not come again; `nil`: none did. The guest may have
    /// written them while they were sent: only where something else is wrong, too, they are worth telling.
    var mismatchesSoFar: String? {
        let first = state.withLock { $0.pending }.sorted { $0.value.number < $1.value.number }.prefix(Self.namedPages)
        guard !first.isEmpty else { return nil }
        return first.map { PageFinding(block: $0.key.block, page: $0.key.page, kind: .damaged).words(names) }
            .joined(separator: ", ")
    }

    /// All pages that are known not to be as they were sent, in order.
    var findings: [PageFinding] { state.withLock { allFindings(of: $0) } }

    private func allFindings(of state: State) -> [PageFinding] {
        var pageOf: [UInt64: Place] = [:]
        for (place, mismatch) in state.pending { pageOf[mismatch.announced] = place }
        var all: [Place: PageFinding.Kind] = [:]
        for finding in state.search?.findings ?? [] {
            all[Place(block: finding.block, page: finding.page)] = finding.kind
        }
        for (place, mismatch) in state.pending { all[place] = kind(of: mismatch, at: place, pageOf) }
        return all.sorted { $0.key < $1.key }.map {
            PageFinding(block: $0.key.block, page: $0.key.page, kind: $0.value)
        }
    }

    private func kind(of mismatch: Mismatch, at place: Place, _ pageOf: [UInt64: Place]) -> PageFinding.Kind {
        if let other = pageOf[mismatch.received] { return .swapped(block: other.block, page: other.page) }
        if mismatch.former != 0,
            hasher.hash(behind: mismatch.former, block: place.block, page: place.page) == mismatch.received
        {
            return .stale
        }
        return hasher.isZero(hash: mismatch.received) ? .zeroed : .damaged
    }

    private func verdict(_ state: inout State) -> RootVerdict {
        let findings = allFindings(of: state)
        if findings.isEmpty, state.search == nil, !state.hasOverflowed { return .same }
        guard !findings.isEmpty else {
            return .corrupt("x-verify: the digests of source and destination differ, and no page could be named")
        }
        let named = findings.prefix(Self.namedPages).map { $0.words(names) }.joined(separator: ", ")
        let more = findings.count - min(findings.count, Self.namedPages)
        let count = findings.count == 1 ? "1 page is" : "\(findings.count) pages are"
        return .corrupt(
            "x-verify: \(count) not here as sent: \(named)\(more > 0 ? ", and \(more) more (see this side's log)" : ""); "
                + "check memory and network of both hosts")
    }

    /// The pages, some on each line, for the log; of very many the first, and how many more there are.
    func logLines() -> [String] {
        let all = findings
        guard all.count > Self.namedPages else { return [] }
        let told = all.prefix(Self.namedPages * Self.mostLogLines)
        let lines = stride(from: 0, to: told.count, by: Self.namedPages).map { start in
            let part = told[start..<min(start + Self.namedPages, told.count)]
            return "x-verify: " + part.map { $0.words(names) }.joined(separator: ", ")
        }
        return told.count == all.count ? lines : lines + ["x-verify: and \(all.count - told.count) more"]
    }
}
