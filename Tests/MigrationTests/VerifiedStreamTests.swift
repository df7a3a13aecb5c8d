import GuestMemory
import Host
import MigrationStream
import TestSupport
import Testing

@testable import Migration

@Suite("verified streams")
struct VerifiedStreamTests {
    @Test(
        "what arrives as it was sent is found to be the same, also when a page was written while it was sent and comes again"
    )
    func clean() throws {
        let nothing = try VerifiedJourney.nothing()
        for vehicle in Vehicle.allCases {
            let journey = try VerifiedJourney(vehicle, seed: 1)
            let outcome = try journey.outcome(of: journey.pieces, nothing: nothing)
            #expect(outcome.sentence == nil && outcome.findings.isEmpty && outcome.differing.isEmpty, "\(outcome)")
            var raced = journey.pieces
            #expect(!raced[0].isLast)
            raced[0].contents[raced[0].page(3).lowerBound + 77] ^= 1
            let cleared = try journey.outcome(of: raced, nothing: nothing)
            #expect(cleared.sentence == nil && cleared.findings.isEmpty && cleared.differing.isEmpty, "\(cleared)")
        }
    }
}

@Suite("what is told of pages that are not as they were sent")
struct VerificationLogTests {
    @Test("the log names up to 1024 pages and counts the others", arguments: [8, 9, 1024, 1025, 4000])
    func logLines(count: UInt64) throws {
        let block = try RAMBlock(name: "ram", byteCount: 4096 * 4096)
        let verification = try IncomingVerification(
            GuestMemory(blocks: [block]), MigrationIdentifier(high: 1, low: 2))
        let pages = PageIndex(0)..<PageIndex(count)
        verification.received(
            CollectionOfOne(pages), of: 0, in: block.mapping, digests: (0..<count).map { $0 &* 7 &+ 1 }[...])
        let lines = verification.logLines()
        // The sentence for the source names eight.
        #expect(lines.isEmpty == (count <= 8))
        let named = lines.reduce(0) { $0 + $1.split(separator: "0x").count - 1 }
        guard count > 8 else { return }
        #expect(named == min(count, 1024))
        #expect(lines.last?.hasSuffix("and \(max(count, 1024) - 1024) more") == (count > 1024))
    }
}

@Suite("the digest of a page")
struct PageHasherTests {
    private let hasher: PageHasher
    private let page: Mapping

    init() throws {
        hasher = try PageHasher(high: 11, low: 12)
        page = try Mapping(anonymousByteCount: 2 * 4096)
    }

    @Test("every flipped bit of an empty page changes the hash, each to another one")
    func flips() {
        var seen: Set<UInt64> = [hasher.hash(page, at: 0)]
        for bit in 0..<4096 * 8 {
            page.store(UInt8(1) << UInt8(bit % 8), at: bit / 8)
            seen.insert(hasher.hash(page, at: 0))
            page.store(UInt8(0), at: bit / 8)
        }
        #expect(seen.count == 4096 * 8 + 1)
    }

    @Test("a flipped bit turns about half of the hash's bits")
    func avalanche() {
        var random = SeededRandom(seed: 4)
        for word in 0..<512 { page.store(random.next(), at: word * 8) }
        let before = hasher.hash(page, at: 0)
        var turned = 0
        for _ in 0..<1000 {
            let (place, mask) = (Int(random.next() % 512) * 8, UInt64(1) << (random.next() % 64))
            let word = page.load(at: place, as: UInt64.self)
            page.store(word ^ mask, at: place)
            turned += (hasher.hash(page, at: 0) ^ before).nonzeroBitCount
            page.store(word, at: place)
        }
        #expect((31_000...33_000).contains(turned), "\(Double(turned) / 1000) bits on average")
    }

    @Test("words that change places, and contents that move by bytes, have another hash")
    func places() {
        var random = SeededRandom(seed: 5)
        for word in 0..<1024 { page.store(UInt64(word) + random.next() % 3, at: word * 8) }
        let before = hasher.hash(page, at: 0)
        for _ in 0..<2000 {
            let (left, right) = (Int(random.next() % 512) * 8, Int(random.next() % 512) * 8)
            let (one, two) = (page.load(at: left, as: UInt64.self), page.load(at: right, as: UInt64.self))
            guard one != two else { continue }
            page.store(two, at: left)
            page.store(one, at: right)
            #expect(hasher.hash(page, at: 0) != before)
            page.store(one, at: left)
            page.store(two, at: right)
        }
        for shift in 1..<256 { #expect(hasher.hash(page, at: shift) != before, "moved by \(shift) bytes") }
    }

    @Test("the same contents have other digests elsewhere and under another key, and the hash is found again")
    func digests() throws {
        let other = try PageHasher(high: 11, low: 13)
        let hash = hasher.hash(page, at: 0)
        #expect(other.hash(page, at: 0) != hash)
        var seen: Set<UInt64> = []
        for number in 0..<1000 as Range<UInt64> {
            for block in 0..<3 {
                let digest = hasher.digest(hash: hash, block: block, page: number)
                seen.insert(digest)
                #expect(hasher.hash(behind: digest, block: block, page: number) == hash)
            }
        }
        #expect(seen.count == 3000)
        #expect(hasher.zeroDigest(block: 1, page: 3) == hasher.digest(page, at: 0, block: 1, page: 3))
    }

    @Test("pages looked at together have the digests they have alone; zeros have none where they are looked for")
    func together() throws {
        var random = SeededRandom(seed: 7)
        let memory = try Mapping(anonymousByteCount: 7 * 4096)
        for word in 512..<4 * 512 { memory.store(random.next(), at: word * 8) }
        memory.store(UInt8(1), at: 7 * 4096 - 1)
        for loop in PageHash.allCases where loop <= .best {
            var hashes = [UInt64](repeating: 0, count: 7)
            loop(memory, at: 0, key: memory, ahead: 8192, into: &hashes)
            #expect(hashes == (0..<7).map { loop(memory, at: $0 * 4096, key: memory) })
        }
        let alone = (0..<7).map { hasher.digest(memory, at: $0 * 4096, block: 2, page: 40 + UInt64($0)) }
        #expect(hasher.digests(40..<47, of: 2, memory, at: 0) == alone)
        let found = hasher.digests(40..<47, of: 2, memory, at: 0, findsZeroes: true)
        #expect(found == alone.enumerated().map { [0, 4, 5].contains($0) ? 0 : $1 })
        for page in 0..<7 {
            #expect(memory.isZeroPage(at: page * 4096, fetching: (page + 3) * 4096) == [0, 4, 5].contains(page))
        }
    }

    @Test("every loop finds the hash that plain arithmetic finds, at every alignment", arguments: PageHash.allCases)
    func loops(loop: PageHash) throws {
        guard loop <= .best else { return }
        let key = try Mapping(anonymousByteCount: 2 * 4096)
        var random = SeededRandom(seed: 6)
        for round in 0..<40 {
            for word in 0..<1024 {
                page.store(round == 0 ? UInt64.max : random.next(), at: word * 8)
                key.store(round == 1 ? 0 : random.next(), at: word * 8)
            }
            for offset in [0, 8, 1, 4096 - round] {
                var (products, sums) = ([UInt64](repeating: 0, count: 8), [UInt64](repeating: 0, count: 8))
                for index in 0..<512 {
                    let word = page.load(at: offset + index * 8, as: UInt64.self)
                    let mixed = word ^ key.load(at: index * 8, as: UInt64.self)
                    products[index % 8] &+= (mixed & 0xffff_ffff) &* (mixed >> 32)
                    sums[index % 8] &+= word
                }
                let hash = (0..<8).reduce(UInt64(0)) { hash, lane in
                    let product = products[lane] ^ key.load(at: (512 + lane) * 8, as: UInt64.self)
                    return hash &+ PageHash.scatter(product &* 0x9FB2_1C65_1E98_DF25 &+ sums[lane])
                }
                #expect(loop(page, at: offset, key: key) == hash)
                #expect(loop(page, at: offset, key: key) == hash)
            }
        }
        for value in [0, 1, 2, .max, 1 << 63, random.next()] as [UInt64] {
            #expect(PageHash.gather(PageHash.scatter(value)) == value)
        }
    }
}
