import GuestMemory
import Host
import Synchronization
import Testing

/// The record that many threads share, held against a set of integers.
@Suite struct AtomicPagesTests {
    private static func pages(_ range: Range<UInt64>) -> Range<PageIndex> {
        PageIndex(range.lowerBound)..<PageIndex(range.upperBound)
    }

    private static func contents(
        _ record: AtomicPages, limit: UInt64, without others: AtomicPages? = nil
    ) -> Set<UInt64> {
        var found: Set<UInt64> = []
        var position = PageIndex(0)
        while let run = record.nextRun(from: position, limit: limit, missingFrom: others) {
            #expect(run.lowerBound >= position && run.upperBound.value - run.lowerBound.value <= limit, "\(run)")
            found.formUnion(run.lowerBound.value..<run.upperBound.value)
            position = run.upperBound
        }
        return found
    }

    @Test("pages and ranges are set and unset as in a set, and walked in order", arguments: [1, 63, 64, 130, 40_001])
    func asASet(pageCount: UInt64) throws {
        var random = SystemRandomNumberGenerator()
        let record = try AtomicPages(pageCount: pageCount)
        let others = try AtomicPages(pageCount: pageCount)
        var model: Set<UInt64> = []
        for step in 0..<200 {
            let start = UInt64.random(in: 0..<pageCount, using: &random)
            let end = min(pageCount, start + UInt64.random(in: 1...200, using: &random))
            let range = start..<end
            switch step % 4 {
            case 0:
                #expect(record.insert(Self.pages(range)) == UInt64(Set(range).subtracting(model).count))
                model.formUnion(range)
            case 1:
                #expect(record.remove(Self.pages(range)) == UInt64(model.intersection(range).count))
                model.subtract(range)
            case 2: #expect(record.insert(PageIndex(start)) == model.insert(start).inserted)
            default: #expect(record.remove(PageIndex(start)) == (model.remove(start) != nil))
            }
            #expect(record.contains(PageIndex(start)) == model.contains(start))
            #expect(record.count(in: Self.pages(range)) == UInt64(model.intersection(range).count))
        }
        for limit: UInt64 in [1, 7, 64, .max] { #expect(Self.contents(record, limit: limit) == model) }
        let half = pageCount / 2
        others.insert(Self.pages(0..<half))
        #expect(Self.contents(record, limit: .max, without: others) == model.filter { $0 >= half })
        let first = record.nextRun(from: PageIndex(0), before: PageIndex(half))
        #expect(first?.lowerBound.value == model.filter { $0 < half }.min())
    }

    @Test("of several threads that insert the same pages, each page is one's alone", .timeLimit(.minutes(10)))
    func alone() throws {
        let pageCount: UInt64 = 10_000
        let record = try AtomicPages(pageCount: pageCount)
        let won = Mutex<[UInt64]>([])
        let threads = try (0..<4).map { number in
            try HostThread(name: "insert\(number)") {
                var mine: [UInt64] = []
                for step in 0..<pageCount {
                    // Each in an order of its own.
                    let page = step &* [1, 3, 7, 9][number] % pageCount
                    if record.insert(PageIndex(page)) { mine.append(page) }
                }
                won.withLock { $0 += mine }
            }
        }
        for thread in threads { thread.join() }
        #expect(won.withLock { $0.sorted() } == Array(0..<pageCount))
        #expect(record.count(in: Self.pages(0..<pageCount)) == pageCount)
    }
}
