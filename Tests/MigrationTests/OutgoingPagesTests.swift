import GuestMemory
import Host
import MigrationStream
import Synchronization
import TestSupport
import Testing

@testable import Migration

private func pages(_ range: Range<UInt64>) -> Range<PageIndex> {
    PageIndex(range.lowerBound)..<PageIndex(range.upperBound)
}

/// Blocks of the same length, with what is dirty in each and what was written before.
private func outgoing(
    _ blocks: [(pageBytes: UInt64, dirty: [Range<UInt64>], known: [Range<UInt64>])], pageCount: UInt64 = 4096
) throws -> OutgoingPages {
    var (bitmaps, known): ([DirtyBitmap], [AtomicPages]) = ([], [])
    for block in blocks {
        let bitmap = try DirtyBitmap(pageCount: pageCount)
        for run in block.dirty { bitmap.set(pages(run)) }
        bitmaps.append(bitmap)
        let all = try AtomicPages(pageCount: pageCount)
        for run in block.dirty + block.known { all.insert(pages(run)) }
        known.append(all)
    }
    let described = blocks.enumerated().map {
        RAMBlockDescription(name: "ram\($0.offset)", length: pageCount << 12, pageSize: $0.element.pageBytes)
    }
    return try OutgoingPages(of: described, taking: bitmaps, known: known)
}

@Suite("what a destination does not have, where its memory has large pages")
struct OutgoingPagesTests {
    @Test("a large page with one dirty page is forgotten, and sent, as a whole")
    func widened() throws {
        let all = try outgoing([(2 << 20, [700..<701, 1000..<1100], []), (4096, [700..<701], [])])
        var told: [String] = []
        all.forEachRun { block, run in told.append("\(block): \(run.lowerBound.value)..<\(run.upperBound.value)") }
        #expect(told == ["0: 512..<1536", "1: 700..<701"])
        #expect(all.count == 1025)
        var place = OutgoingPages.Place()
        let first = all.take(from: &place, limit: 16)
        #expect(first == [.init(block: 0, pages: pages(512..<1024))])
        #expect(all.take(from: &place, limit: 16) == [.init(block: 0, pages: pages(1024..<1536))])
        #expect(all.take(from: &place, limit: 16) == [.init(block: 1, pages: pages(700..<701))])
        #expect(all.take(from: &place, limit: 16).isEmpty && all.count == 0)
    }

    @Test("what is dirty when the guest stands still is added to what was before it did, and told once")
    func added() throws {
        let all = try outgoing([(4096, [10..<20, 30..<31], [25..<26]), (2 << 20, [0..<1], [])])
        let again = try (0..<2).map { _ in try DirtyBitmap(pageCount: 4096) }
        // What was named is found again as long as it was not sent.
        for run in [10..<22, 25..<26, 29..<32] as [Range<UInt64>] { again[0].set(pages(run)) }
        for run in [511..<514] as [Range<UInt64>] { again[1].set(pages(run)) }
        let fresh = try all.add(again).map {
            "\($0.block): \($0.pages.lowerBound.value)..<\($0.pages.upperBound.value)"
        }
        #expect(fresh == ["0: 20..<22", "0: 25..<26", "0: 29..<30", "0: 31..<32", "1: 512..<1024"])
        #expect(all.count == 16 + 1024)
        #expect(again[0].isEmpty && again[1].isEmpty)
        var discarded: UInt64 = 0
        all.forEachDiscarded { _, run in discarded += UInt64(run.count) }
        #expect(discarded == all.count)
        // And it is sent once.
        #expect(all.take(PageRequest(block: "ram0", offset: 15 << 12, length: 4096)).count == 1)
        #expect(all.take(PageRequest(block: "ram0", offset: 15 << 12, length: 4096)).isEmpty)
    }

    @Test("a request for any part of a large page is answered with all of it, once; a hole with zeros, once")
    func requested() throws {
        let all = try outgoing([(2 << 20, [600..<601], [2100..<2101])])
        let request = PageRequest(block: "ram0", offset: 515 << 12, length: 4096)
        #expect(all.take(request) == [.init(block: 0, pages: pages(512..<1024))])
        #expect(all.take(request).isEmpty)
        let hole = PageRequest(block: "ram0", offset: 1024 << 12, length: 2 << 20)
        #expect(all.take(hole) == [.init(block: 0, pages: pages(1024..<1536), isHole: true)])
        #expect(all.take(hole).isEmpty)
        // Sent before the switch, in part: it is there.
        #expect(all.take(PageRequest(block: "ram0", offset: 2048 << 12, length: 2 << 20)).isEmpty)
    }

    @Test(
        "what is asked for in vain is counted by pages of the destination: a request of many costs as much as many of one"
    )
    func inVain() throws {
        // Of a million times this request, 4096 pages each, as many are borne as of one page at a time.
        let request = PageRequest(block: "ram0", offset: 0, length: 4096 << 12)
        let borne = Int(PageRequests.mostVain) / 4096 + 1
        for isClaimed in [false, true] {
            let requests = PageRequests()
            requests.open(try outgoing([(4096, [0..<16], [16..<4096])]))
            var count = 0
            #expect(throws: PageRequests.Refusal.self) {
                while count < 1_000_000 {
                    if isClaimed {
                        _ = try requests.claim(request)
                        requests.answered(request)
                    } else {
                        try requests.add(request)
                        while requests.nextNow() != nil { requests.sent() }
                    }
                    count += 1
                }
            }
            #expect(count == borne, "\(count), \(isClaimed)")
            // Nothing is left under way that the end would wait for.
            #expect(requests.settle(nanoseconds: 1_000_000))
        }
        let large = try outgoing([(2 << 20, [512..<513], [0..<1])])
        let all = PageRequest(block: "ram0", offset: 0, length: 4 << 20)
        let pieces = large.take(all)
        #expect(pieces.map(\.pages) == [pages(512..<1024)] && large.countOfVain(all, pieces) == 1)
        #expect(large.countOfVain(PageRequest(block: "ram0", offset: 5 << 12, length: 4096), []) == 1)
    }

    @Test("a destination that says it has a part of a large page gets all of it on another connection")
    func partlyReceived() throws {
        let old = try outgoing([(2 << 20, [0..<1536], [])])
        let received = try AtomicPages(pageCount: 4096)
        received.insert(pages(0..<700))
        let all = try OutgoingPages(old, without: [received])
        #expect(all.count == 1024)
        var place = OutgoingPages.Place()
        #expect(all.take(from: &place, limit: 16) == [.init(block: 0, pages: pages(512..<1024))])
        #expect(all.take(from: &place, limit: 16) == [.init(block: 0, pages: pages(1024..<1536))])
        #expect(all.take(from: &place, limit: 16).isEmpty && all.count == 0)
    }

    @Test("nothing dirty at all still leaves one large page to be sent")
    func nothing() throws {
        let all = try outgoing([(2 << 20, [], [])])
        var place = OutgoingPages.Place()
        #expect(all.count == 512)
        #expect(all.take(from: &place, limit: 16) == [.init(block: 0, pages: pages(0..<512))])
    }

    @Test("of many threads that take, each large page is one's alone, and none is lost")
    func contended() throws {
        let count: UInt64 = 64 * 512
        let all = try outgoing([(2 << 20, [0..<count], [])], pageCount: count)
        let taken = Mutex<[PageIndex]>([])
        let threads = try (0..<4).map { number in
            try HostThread(name: "take\(number)") {
                var random = SeededRandom(seed: UInt64(number))
                var place = OutgoingPages.Place()
                while all.count > 0 {
                    let offset = random.next() % count << 12
                    let pieces =
                        random.next() % 2 == 0
                        ? all.take(from: &place, limit: 16)
                        : all.take(PageRequest(block: "ram0", offset: offset, length: 4096))
                    for piece in pieces where !piece.isHole {
                        if piece.pageCount != 512 { Issue.record("\(piece)") }
                        taken.withLock { $0.append(piece.pages.lowerBound) }
                    }
                }
            }
        }
        for thread in threads { thread.join() }
        #expect(taken.withLock { $0.map(\.value).sorted() } == (0..<64).map { $0 * 512 })
    }
}
