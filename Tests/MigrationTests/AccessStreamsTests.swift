import GuestMemory
import MigrationStream
import Synchronization
import TestSupport
import Testing

@testable import Migration

/// Memory at a source, and guests that touch it: what is missing is asked for, and whatever is foreseen then comes.
private struct Memory {
    var streams = AccessStreams()
    /// By block.
    var left: [Set<Int64>]
    let pageCount: Int64
    /// What was asked for, and what came for having been foreseen, in order.
    var asked: [Int64] = []
    var foreseen: [Int64] = []
    /// So many pages a walk sends behind each that was asked for.
    var walked: Int64 = 0
    var most = 64

    init(pages: Int64, blocks: Int = 1) {
        pageCount = pages
        left = Array(repeating: Set(0..<pages), count: blocks)
    }

    mutating func touch(_ page: Int64, of block: Int = 0, atOnce: Int = 1000) {
        guard left[block].remove(page) != nil else { return }
        asked.append(page)
        streams.asked(UInt64(page), of: block, most: most) { left[block].contains($0) }
        takeAll(atOnce: atOnce)
        left[block].subtract(page..<page + walked)
    }

    mutating func takeAll(atOnce: Int) {
        while true {
            let before = foreseen.count
            streams.takeNext { _ in
                (UInt64(pageCount), atOnce)
            } take: { page, block in
                guard left[block].remove(Int64(page)) != nil else { return false }
                foreseen.append(Int64(page))
                return true
            }
            guard foreseen.count > before else { return }
        }
    }
}

@Suite("what a guest will ask for next, by what it asked for")
struct AccessStreamsTests {
    @Test(
        "of a walk in equal steps, forwards or backwards, few pages are asked for, and hardly any other comes",
        arguments: [1, 2, 3, 4, 5, 16, 17, 1000, 16_000, -1, -2, -3, -16, -1000] as [Int64])
    func strides(step: Int64) {
        let count: Int64 = 2000
        let start = step > 0 ? 5000 : 5000 - step * count
        var memory = Memory(pages: 5000 + (count + 100) * abs(step))
        for number in 0..<count { memory.touch(start + number * step) }
        // Windows double up to 64.
        #expect(memory.asked.count <= 2000 / 64 + 14, "\(memory.asked.count)")
        let path = Set((0..<count + 64).map { start + $0 * step })
        #expect(memory.foreseen.count { !path.contains($0) } <= 20)
        #expect(memory.foreseen.count <= 2000 + 64)
    }

    @Test(
        "where much of what lies between comes by the way, the step is still found",
        arguments: [1, 3, 16, -1, -3] as [Int64])
    func walked(step: Int64) {
        let start = step > 0 ? 5000 : 5000 - step * 2000
        var memory = Memory(pages: 5000 + 2100 * abs(step))
        memory.walked = 7
        for number in 0..<2000 as Range<Int64> { memory.touch(start + number * step) }
        #expect(memory.asked.count <= 2000 / 64 + 20, "\(memory.asked.count)")
    }

    @Test("vCPUs whose requests come mixed, in several blocks, do not disturb each other", arguments: [1, 2, 3, 4])
    func mixed(blocks: Int) {
        let walks: [(start: Int64, step: Int64)] = [(100, 1), (400_000, -3), (420_000, 64), (700_000, 5)]
        var memory = Memory(pages: 1 << 20, blocks: blocks)
        var random = SeededRandom(seed: 7)
        var positions = walks.map { $0.start }
        // Random turns, as threads take them.
        for _ in 0..<8000 {
            let number = Int(random.next() % UInt64(walks.count))
            memory.touch(positions[number], of: number % blocks)
            positions[number] += walks[number].step
        }
        #expect(memory.asked.count <= 8000 / 64 + walks.count * 16, "\(memory.asked.count)")
    }

    @Test("a stream outlives a hundred requests of no order between any two of its own")
    func besideNoise() {
        var memory = Memory(pages: 1 << 22)
        var random = SeededRandom(seed: 3)
        var noise = 0
        for number in 0..<4000 as Range<Int64> {
            let before = memory.asked.count
            memory.touch(1 << 20 + number * 9)
            guard memory.asked.count > before, number > 100 else { continue }
            for _ in 0..<100 {
                memory.touch(Int64(random.next() % (1 << 20)))
                noise += 1
            }
        }
        #expect(noise > 1000 && memory.asked.count - noise <= 4000 / 64 + 30, "\(memory.asked.count), \(noise)")
    }

    @Test("of pages in no order nothing is foreseen but a few neighbours, behind each")
    func random() {
        var memory = Memory(pages: 1 << 20)
        var random = SeededRandom(seed: 11)
        for _ in 0..<5000 { memory.touch(Int64(random.next() % (1 << 20))) }
        #expect(Double(memory.foreseen.count) <= 3.1 * Double(memory.asked.count))
        memory = Memory(pages: 1 << 20)
        memory.touch(1000)
        #expect(memory.foreseen == [1001, 1002, 1003])
    }

    @Test("the window grows from two pages on, and a step that is no longer kept is given up")
    func windows() {
        var memory = Memory(pages: 1 << 16)
        for number in 0..<3 as Range<Int64> { memory.touch(1000 + 100 * number, atOnce: 1000) }
        // Neighbours of two single ones, and then a stream on trial.
        #expect(memory.foreseen.suffix(4) == [1300, 1400, 1500, 1600])
        memory.touch(1700)
        #expect(memory.foreseen.suffix(8) == (18...25 as ClosedRange<Int64>).map { $0 * 100 })
        // Another step from here on: little of the old one comes.
        let before = memory.foreseen.count
        for number in 1...500 as ClosedRange<Int64> { memory.touch(2500 + 7 * number) }
        #expect(memory.asked.count <= 4 + 500 / 64 + 14, "\(memory.asked.count)")
        #expect(memory.foreseen[before...].count { $0 > 2500 && ($0 - 2500) % 7 != 0 } <= 20)
    }

    @Test("what is foreseen ends with the block, at both ends", arguments: [1, 3, -1, -3] as [Int64])
    func ends(step: Int64) {
        var memory = Memory(pages: 1000)
        for number in 0..<330 as Range<Int64> { memory.touch(step > 0 ? 5 + number * step : 994 + number * step) }
        #expect(memory.foreseen.allSatisfy { (0..<1000).contains($0) })
        let last = step > 0 ? 999 : 0
        memory.touch(Int64(last))
        let before = memory.foreseen.count
        memory.takeAll(atOnce: 100)
        #expect(memory.foreseen.count == before)
        // No page so far that it could not be reckoned with.
        memory.streams.asked(.max, of: 0, most: 64) { _ in true }
        memory.streams.asked(UInt64(Int64.max), of: 0, most: 64) { _ in true }
        memory.takeAll(atOnce: 100)
        #expect(memory.foreseen.count == before)
    }

    @Test("a page that is asked for again, or overtaken by those behind it, changes nothing")
    func again() {
        var memory = Memory(pages: 1 << 16)
        for _ in 0..<5 { memory.streams.asked(50, of: 0, most: 64) { _ in true } }
        memory.takeAll(atOnce: 100)
        #expect(memory.foreseen == [51, 52, 53])
        for number in 0..<4 as Range<Int64> { memory.touch(2000 + number * 20) }
        let before = memory.streams
        for page in [2040, 2020, 2000, 2040] as [UInt64] { memory.streams.asked(page, of: 0, most: 64) { _ in true } }
        let count = memory.foreseen.count
        memory.takeAll(atOnce: 100)
        #expect(memory.foreseen.count == count)
        var (one, other) = (memory, memory)
        other.streams = before
        one.touch(2000 + 20 * 7)
        other.touch(2000 + 20 * 7)
        #expect(one.foreseen == other.foreseen && one.foreseen.count > count)
    }
}

@Suite("what is taken because it will be asked for")
struct PrefetchTests {
    private static func outgoing(pageBytes: UInt64 = 4096, dirty: [Range<UInt64>]) throws -> OutgoingPages {
        let bitmap = try DirtyBitmap(pageCount: 8192)
        let known = try AtomicPages(pageCount: 8192)
        for run in dirty {
            let pages = PageIndex(run.lowerBound)..<PageIndex(run.upperBound)
            bitmap.set(pages)
            known.insert(pages)
        }
        let block = RAMBlockDescription(name: "ram", length: 8192 << 12, pageSize: pageBytes)
        return try OutgoingPages(of: [block], taking: [bitmap], known: [known])
    }

    private static func request(_ page: UInt64, length: UInt32 = 4096) -> PageRequest {
        PageRequest(block: "ram", offset: page << 12, length: length)
    }

    private static func ask(_ pages: [UInt64], _ requests: PageRequests) throws {
        for page in pages {
            let pieces = try requests.claim(request(page))
            #expect(pieces.count == 1)
            requests.answered(request(page))
        }
    }

    @Test("pages come in the stream's order, as many as fit; side by side they are one piece, also backwards")
    func pieces() throws {
        let all = try Self.outgoing(dirty: [0..<8192])
        let requests = PageRequests()
        requests.open(all)
        try Self.ask([1000, 1100, 1200], requests)
        let single = requests.prefetch.take(from: all, limit: 3)
        #expect(single.map(\.pages.lowerBound.value) == [1300, 1400, 1500])
        try Self.ask([5000, 4999, 4998], requests)
        #expect(
            requests.prefetch.take(from: all, limit: 4)
                == [.init(block: 0, pages: PageIndex(4994)..<PageIndex(4998))])
        #expect(all.count == 8192 - 6 - 7)
    }

    @Test("what went before, or is not to be sent, is passed over, and never a hole comes by itself")
    func passedOver() throws {
        let all = try Self.outgoing(dirty: [100..<105, 110..<300])
        let requests = PageRequests()
        requests.open(all)
        var place = OutgoingPages.Place(block: 0, page: PageIndex(112))
        #expect(all.take(from: &place, limit: 2).count == 1)
        try Self.ask([102, 103, 104], requests)
        let next = requests.prefetch.take(from: all, limit: 64)
        #expect(next.first?.pages == PageIndex(110)..<PageIndex(112) && !next.contains { $0.isHole })
        #expect(next.dropFirst().first?.pages.lowerBound == PageIndex(114))
    }

    @Test("a destination of large pages gets one of them at a time, whole, in steps of such pages")
    func whole() throws {
        let all = try Self.outgoing(pageBytes: 2 << 20, dirty: [0..<8192])
        let requests = PageRequests()
        requests.open(all)
        // Parts of the pages 1, 4 and 7.
        try Self.ask([515, 2049, 3600], requests)
        let next = requests.prefetch.take(from: all, limit: 16)
        #expect(next == [.init(block: 0, pages: PageIndex(5120)..<PageIndex(5632))])
        #expect(all.count == 8192 - 4 * 512)
    }

    @Test("switched off it takes nothing; forgotten, it knows nothing")
    func off() throws {
        let all = try Self.outgoing(dirty: [0..<8192])
        let requests = PageRequests(prefetch: Prefetch(isOn: false))
        requests.open(all)
        try Self.ask([1000, 1100, 1200], requests)
        #expect(requests.prefetch.take(from: all, limit: 64).isEmpty)
        requests.prefetch.isOn = true
        #expect(requests.prefetch.take(from: all, limit: 1).map(\.pages.lowerBound.value) == [1300])
        requests.prefetch.forget()
        #expect(requests.prefetch.take(from: all, limit: 64).isEmpty)
    }
}
