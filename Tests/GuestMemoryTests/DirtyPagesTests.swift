import GuestMemory
import TestSupport
import Testing

/// Both kinds of record, held against a set of integers.
@Suite struct DirtyPagesTests {
    enum Kind: String, CaseIterable, CustomTestStringConvertible {
        case bitmap, set
        var testDescription: String { rawValue }

        func make(_ pageCount: UInt64) throws -> any DirtyPages {
            switch self {
            case .bitmap: try DirtyBitmap(pageCount: pageCount)
            case .set: DirtySet(pageCount: pageCount)
            }
        }
    }

    /// Blocks of less than a region, of some, and above 8 TiB, where the test works at the end.
    static let sizes: [UInt64] = [1, 63, 64, 130, 40_000, 200_001, 1 << 31 | 12_345, 1 << 33]

    private static func pages(_ range: Range<UInt64>) -> Range<PageIndex> {
        PageIndex(range.lowerBound)..<PageIndex(range.upperBound)
    }

    /// What the record holds, by runs; the runs ascend, are apart from each other and as short as asked.
    private static func contents(_ record: any DirtyPages, limit: UInt64, _ what: String) -> Set<UInt64> {
        var found: Set<UInt64> = []
        var position = PageIndex(0)
        var last: Range<PageIndex>?
        while let run = record.nextRun(from: position, limit: limit) {
            let length = run.upperBound.value - run.lowerBound.value
            #expect(length > 0 && length <= limit && run.lowerBound >= position, "\(what): run \(run)")
            if let last, last.upperBound == run.lowerBound {
                #expect(last.upperBound.value - last.lowerBound.value == limit, "\(what): \(last) goes on in \(run)")
            }
            found.formUnion(run.lowerBound.value..<run.upperBound.value)
            (position, last) = (run.upperBound, run)
        }
        return found
    }

    /// A record and what it should hold.
    private struct Model {
        let kind: Kind
        let size: UInt64
        let record: any DirtyPages
        var pages: Set<UInt64> = []

        init(_ kind: Kind, _ size: UInt64) throws {
            (self.kind, self.size) = (kind, size)
            record = try kind.make(size)
        }

        /// A range near the end of the block: of some pages mostly, sometimes of thousands.
        func range(_ random: inout SeededRandom) -> Range<UInt64> {
            let window = min(size, 150_000)
            let start = size - 1 - random.next() % window
            let length = random.next() % 8 == 0 ? random.next() % 50_000 : random.next() % 200
            return start..<min(size, start + length)
        }

        mutating func step(_ random: inout SeededRandom) {
            let range = range(&random)
            switch random.next() % 8 {
            case 0, 1:
                record.set(DirtyPagesTests.pages(range))
                pages.formUnion(range)
            case 2, 3:
                record.clear(DirtyPagesTests.pages(range))
                pages.subtract(range)
            case 4:
                // As rings deliver: no order, many twice, and some that are not in the block.
                var list: [UInt64] = []
                for _ in 0..<random.next() % 3000 {
                    list.append(range.lowerBound + random.next() % (1 + UInt64(range.count) * 2))
                    if random.next() % 4 == 0 { list.append(list[Int(random.next() % UInt64(list.count))]) }
                }
                unsafe list.withUnsafeBufferPointer { unsafe record.insert($0) }
                pages.formUnion(list.filter { $0 < size })
            case 5:
                let page = range.lowerBound
                record.insert(PageIndex(page))
                pages.insert(page)
            case 6:
                merge(&random, at: range)
            default:
                guard random.next() % 16 == 0 else { return }
                record.removeAll()
                pages = []
            }
        }

        /// A report of any alignment; what goes past the end of the block is left out.
        mutating func merge(_ random: inout SeededRandom, at range: Range<UInt64>) {
            let skipped = random.next() % 150
            let reported = UInt64(range.count) + random.next() % 100
            var words: [UInt64] = []
            let density = random.next() % 4
            for _ in 0..<(skipped + reported + 63) / 64 + 1 {
                let word = random.next()
                words.append(
                    density == 0 ? 0 : density == 1 && word % 50 != 0 ? 0 : density == 2 ? word & random.next() : word)
            }
            unsafe words.withUnsafeBufferPointer {
                unsafe record.merge(
                    $0, fromBit: skipped, pageCount: reported, at: PageIndex(range.lowerBound))
            }
            for index in 0..<reported where words[Int((skipped + index) / 64)] >> ((skipped + index) % 64) & 1 != 0 {
                if range.lowerBound + index < size { pages.insert(range.lowerBound + index) }
            }
        }

        func check(_ random: inout SeededRandom, _ what: String) {
            #expect(record.count == UInt64(pages.count), "\(what): count")
            #expect(record.isEmpty == pages.isEmpty, "\(what): emptiness")
            let limit = [1, 7, 512, .max][Int(random.next() % 4)] as UInt64
            #expect(DirtyPagesTests.contents(record, limit: limit, what) == pages, "\(what): contents")
            let probe = range(&random).lowerBound
            #expect(record.contains(PageIndex(probe)) == pages.contains(probe), "\(what): page \(probe)")
        }
    }

    @Test(
        "whatever is done to a record, it holds what a set of integers holds", arguments: Kind.allCases, sizes)
    func model(kind: Kind, size: UInt64) throws {
        for seed in [1, 2, 3] as [UInt64] {
            var random = SeededRandom(seed: seed &* 0x9E37 &+ size)
            var model = try Model(kind, size)
            for step in 0..<60 {
                model.step(&random)
                if step % 4 == 0 || size < 1000 { model.check(&random, "seed \(seed), size \(size), step \(step)") }
            }
            model.check(&random, "seed \(seed), size \(size)")
        }
    }

    @Test(
        "what one record takes from another is dirty there and clean here, and nothing else changes",
        arguments: Kind.allCases, Kind.allCases)
    func take(from: Kind, into: Kind) throws {
        for size in Self.sizes {
            for seed in [4, 5] as [UInt64] {
                var random = SeededRandom(seed: seed &* 0x51 &+ size)
                let what = "seed \(seed), size \(size)"
                var (one, other) = (try Model(from, size), try Model(into, size))
                for _ in 0..<12 {
                    for _ in 0..<4 {
                        one.step(&random)
                        other.step(&random)
                    }
                    let range = random.next() % 4 == 0 ? 0..<size : one.range(&random)
                    one.record.take(Self.pages(range), into: other.record)
                    let moved = one.pages.filter(range.contains)
                    one.pages.subtract(moved)
                    other.pages.formUnion(moved)
                    one.check(&random, "\(what), source")
                    other.check(&random, "\(what), target")
                }
            }
        }
    }

    @Test(
        "a union holds both records' pages, and the other record stays as it is", arguments: Kind.allCases,
        Kind.allCases)
    func union(from: Kind, into: Kind) throws {
        for size in Self.sizes {
            var random = SeededRandom(seed: size &+ 6)
            var (one, other) = (try Model(from, size), try Model(into, size))
            for round in 0..<6 {
                for _ in 0..<4 {
                    one.step(&random)
                    other.step(&random)
                }
                other.record.formUnion(one.record)
                other.pages.formUnion(one.pages)
                one.check(&random, "size \(size), round \(round), source")
                other.check(&random, "size \(size), round \(round), target")
            }
        }
    }

    @Test("the words of a range hold its pages", arguments: Kind.allCases)
    func words(kind: Kind) throws {
        for size in Self.sizes {
            var random = SeededRandom(seed: size &+ 7)
            var model = try Model(kind, size)
            for _ in 0..<20 {
                model.step(&random)
                let range = model.range(&random)
                let start = range.lowerBound / 64 * 64
                let end = max(start, range.upperBound)
                var found: Set<UInt64> = []
                unsafe model.record.withWords(of: Self.pages(start..<end)) { words in
                    #expect(words.count == Int((end + 63) / 64 - start / 64))
                    for page in start..<end {
                        if unsafe words[Int((page - start) / 64)] >> (page % 64) & 1 != 0 { found.insert(page) }
                    }
                }
                #expect(found == model.pages.filter { (start..<end).contains($0) }, "size \(size)")
            }
        }
    }

    @Test("a set is as large as what is dirty, however large the block, and nothing is left of it when it is clean")
    func size() throws {
        let pageCount: UInt64 = 1 << 34
        let set = DirtySet(pageCount: pageCount)
        var random = SeededRandom(seed: 8)
        var pages: [UInt64] = []
        for _ in 0..<60_000 { pages.append(random.next() % pageCount) }
        unsafe pages.withUnsafeBufferPointer { unsafe set.insert($0) }
        #expect(set.byteCount < 60_000 * 80, "\(set.byteCount) bytes for scattered pages")
        set.removeAll()
        #expect(set.byteCount == 0)
        set.set(Self.pages(pageCount - (1 << 20)..<pageCount))
        #expect(set.byteCount < (1 << 20) / 4, "\(set.byteCount) bytes for a million pages in a row")
        // A region with many pages is bits, and offsets again when few are left.
        set.clear(Self.pages(pageCount - (1 << 20)..<pageCount - 20))
        #expect(set.count == 20 && set.byteCount < 4096, "\(set.byteCount) bytes for the last 20 pages")
        set.clear(Self.pages(0..<pageCount))
        #expect(set.byteCount < 1024 && set.isEmpty)
    }

    @Test("the only pages of a block of 16 TiB that are dirty are taken from one bitmap into another")
    func huge() throws {
        let pageCount: UInt64 = 1 << 32
        let (one, other) = (try DirtyBitmap(pageCount: pageCount), try DirtyBitmap(pageCount: pageCount))
        one.set(Self.pages(1 << 31..<1 << 31 + 70))
        one.clear(Self.pages(0..<1 << 31))
        one.takeAll(into: other)
        #expect(one.isEmpty && one.count == 0 && other.count == 70)
        one.clear(one.allPages)
        other.removeAll()
        #expect(other.nextRun(from: PageIndex(0), limit: 1) == nil)
    }
}
