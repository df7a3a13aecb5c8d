import GuestMemory
import Host
import Machine
import MigrationStream
import TestSupport
import Testing

@testable import Migration

@Suite("xbzrle")
struct XBZRLETests {
    @Test(
        "a contiguous working set as large as the cache fits, save eight pages, and is found where it was put",
        arguments: [1, 4, 8, 64, 1024])
    func fits(pages: UInt64) throws {
        var cache = try XBZRLECache(byteCount: pages * 4096)
        var kept: [UInt64: Int] = [:]
        for page in 1000..<1000 + pages {
            let isNew = cache.find(block: 0, page: page) == nil
            kept[page] = cache.insert(block: 0, page: page)
            #expect(isNew)
        }
        #expect(kept.values.allSatisfy { $0 % 4096 == 0 && $0 < Int(pages) * 4096 })
        #expect(Set(kept.values).count == kept.count && kept.count + 8 >= min(Int(pages), 1016))
        for page in 1000..<1000 + pages {
            let place = cache.find(block: 0, page: page)
            let other = cache.find(block: 1, page: page)
            #expect(place == kept[page])
            // The same number in another block is another page.
            #expect(other == nil)
        }
    }

    @Test("a page keeps its place for four cache sizes and two rounds; one unused for longer makes room")
    func ageing() throws {
        var cache = try XBZRLECache(byteCount: 8 * 4096)
        cache.roundBegins()
        let first = Self.visit(0..<9, &cache)
        #expect(first.found.isEmpty && first.kept == Array(0..<8))
        // Long after, but in the same round and the next: nothing of it may go, it may be on its way to the socket.
        let strangers = UInt64(100)..<200
        let same = Self.visit(strangers, &cache)
        cache.roundBegins()
        let next = Self.visit(strangers, &cache)
        #expect(same.kept.isEmpty && next.kept.isEmpty)
        // Page 3 is used again, the others are not.
        cache.roundBegins()
        let again = Self.visit(3..<4, &cache)
        let others = Self.visit(20..<30, &cache)
        #expect(again.found == [3] && others.kept == Array(20..<27))
        // Rounds alone age nobody.
        for _ in 0..<10 { cache.roundBegins() }
        let young = Self.visit(30..<31, &cache)
        let left = Self.visit(0..<30, &cache)
        #expect(young.kept.isEmpty && left.found == [3] + Array(20..<27))
    }

    @Test(
        "of a working set twice as large as the cache half is found in every cycle, however short the rounds are",
        arguments: [30, 100, 512, 2000])
    func cycles(roundPages: Int) throws {
        var cache = try XBZRLECache(byteCount: 256 * 4096)
        var found = 0
        var looked = 0
        for cycle in 0..<10 {
            for page in 0..<UInt64(512) {
                if looked % roundPages == 0 { cache.roundBegins() }
                looked += 1
                let place = cache.find(block: 0, page: page)
                if place == nil { _ = cache.insert(block: 0, page: page) } else if cycle > 0 { found += 1 }
            }
        }
        #expect(found > 9 * 512 * 45 / 100)
    }

    /// - Returns: the pages that were there, and those that found room.
    private static func visit(_ pages: Range<UInt64>, _ cache: inout XBZRLECache) -> (found: [UInt64], kept: [UInt64]) {
        var result: (found: [UInt64], kept: [UInt64]) = ([], [])
        for page in pages {
            if cache.find(block: 0, page: page) != nil {
                result.found.append(page)
            } else if cache.insert(block: 0, page: page) != nil {
                result.kept.append(page)
            }
        }
        return result
    }

    @Test("what is told to the destination makes its page the source's, whatever the page goes through")
    func forms() throws {
        let memory = try Mapping(anonymousByteCount: 16 * 4096)
        var there = [[UInt8]](repeating: [UInt8](repeating: 0, count: 4096), count: 16)
        // Four places for sixteen pages.
        var sender = try XBZRLESender(cacheBytes: 4 * 4096)
        let wasActive = sender.isActive
        #expect(!wasActive)
        var seen = Set<String>()
        var generator = SeededRandom(seed: 3)
        for round in 0..<60 {
            let dirty = (0..<16).filter { _ in Bool.random(using: &generator) }
            for page in dirty { Self.change(memory, page, using: &generator) }
            sender.roundBegins(pages: UInt64(dirty.count))
            for page in dirty {
                let index = PageIndex(UInt64(page))
                if memory.isZero(at: page * 4096, count: 4096) {
                    if sender.isActive { sender.sentZero(block: 0, page: index) }
                    there[page] = [UInt8](repeating: 0, count: 4096)
                    continue
                }
                let form =
                    sender.isActive ? sender.form(block: 0, page: index, in: memory, keeps: round % 5 != 4) : .direct
                switch form {
                case .unchanged: seen.insert("unchanged")
                case .delta(let count):
                    seen.insert("delta")
                    #expect(count <= XBZRLESender.longestDelta)
                    let encoding = sender.encoding.read(at: 0, count: count)
                    let span = unsafe encoding.span.bytes
                    try unsafe there[page].withUnsafeMutableBytes { page in try unsafe XBZRLE.apply(span, to: page) }
                case .copy(let place):
                    seen.insert("copy")
                    there[page] = sender.pages.read(at: place, count: 4096)
                case .direct:
                    seen.insert("direct")
                    there[page] = memory.read(at: page * 4096, count: 4096)
                }
                #expect(there[page] == memory.read(at: page * 4096, count: 4096), "round \(round), page \(page)")
            }
            sender.roundEnded(pages: UInt64(dirty.count), isInterrupted: false)
        }
        #expect(seen == ["unchanged", "delta", "copy", "direct"])
        let counts = sender.takeCounts()
        #expect(counts.pages > 0 && counts.misses > 0 && counts.overflows > 0 && counts.cacheBytes == 4 * 4096)
        #expect(counts.pages + counts.misses < counts.seen, "zero pages are seen, too")
        let none = sender.takeCounts()
        #expect(none == XBZRLECounts(cacheBytes: 4 * 4096))
    }

    private static func change(_ memory: Mapping, _ page: Int, using generator: inout SeededRandom) {
        let start = page * 4096
        switch generator.next() % 8 {
        case 0: memory.zero(at: start, count: 4096)
        case 1: break
        case 2: for word in 0..<512 { memory.store(generator.next(), at: start + word * 8) }
        default: memory.store(generator.next(), at: start + Int(generator.next() % 512) * 8)
        }
    }

    @Test("a round that is interrupted again and again still counts as a pass when enough pages were sent")
    func passes() throws {
        var sender = try XBZRLESender(cacheBytes: 4096)
        sender.roundBegins(pages: 100)
        var active: [Bool] = []
        for _ in 0..<10 {
            sender.roundEnded(pages: 10, isInterrupted: true)
            active.append(sender.isActive)
            sender.roundBegins(pages: 95)
        }
        #expect(active == [Bool](repeating: false, count: 9) + [true])
    }

    @Test(
        "a guest that writes faster than the link carries arrives, verified, because its pages go as differences",
        .timeLimit(.minutes(10)), .enabled(if: hasKVM, needsKVM))
    func live() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 40) {
                // 16 MiB of pages at 60 MB/s, over 30 MB/s: without xbzrle what remains never gets below 9 MB.
                let source = try Migrator.source("dirty,working-set=16M,fill=24M,rate=60M", cpus: 2)
                try source.set(.xbzrle, true)
                var parameters = MigrationParameters()
                parameters.maxBandwidthBytesPerSecond = 30_000_000
                try source.set(parameters)
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try source.claimArrival(at: destination, "with xbzrle")
                let info = source.info()
                let xbzrle = info.xbzrle ?? MigrationInfo.XBZRLE()
                claim(xbzrle.cacheBytes == 64 << 20, "the cache has \(xbzrle.cacheBytes) bytes")
                claim(xbzrle.pages > 1000, "\(xbzrle.pages) pages were in the cache")
                claim(xbzrle.cacheMisses > 1000, "\(xbzrle.cacheMisses) pages were not")
                claim(xbzrle.encodingRate > 10, "pages shrank \(xbzrle.encodingRate) times")
                claim(xbzrle.bytes < xbzrle.pages * 400, "\(xbzrle.bytes) bytes for \(xbzrle.pages) pages")
                claim(destination.info().xbzrle == nil, "a destination has no cache")
                claim(destination.info().ram?.transferred == info.ram?.transferred, "bytes sent and received")
            }
        }
    }

    @Test("the cache's size is a power of two of at least a page; others are refused in QEMU's words")
    func sizes() throws {
        for size in [0, 1, 4095, 4097, 65537, UInt64.max] as [UInt64] { #expect(!XBZRLECache.isSize(size)) }
        for size in [4096, 8192, 64 << 20, 1 << 40] as [UInt64] { #expect(XBZRLECache.isSize(size)) }
    }
}
