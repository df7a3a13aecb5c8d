import Glibc
import GuestMemory
import Host
import MigrationStream
import Testing
import Transport

@testable import Migration

/// A verified stream, made by the code that sends, and read by the code that receives; damaged in between.
private struct VerifiedStream {
    static let pages = 48
    static let migration = MigrationIdentifier(high: 0x1234, low: 0x9876_5432_10)
    let blocks = [RAMBlockDescription(name: "ram", length: UInt64(VerifiedStream.pages) * 4096)]
    let sent: OutgoingVerification
    /// The rounds' bytes: header and BEGIN come before.
    let opening: [UInt8]
    let batches: [Batch]
    let packets: [[UInt8]]

    struct Batch {
        var bytes: [UInt8]
        /// Pages of data in their order; their contents end the bytes, their digests stand before.
        let pages: [Int]
        let isLast: [Bool]

        func contents(_ index: Int) -> Range<Int> {
            let start = bytes.count - (pages.count - index) * 4096
            return start..<start + 4096
        }
        func digest(_ index: Int) -> Range<Int> {
            let start = bytes.count - pages.count * 4096 - (pages.count - index) * 8
            return start..<start + 8
        }
    }

    static func memory() throws -> GuestMemory {
        GuestMemory(blocks: [try RAMBlock(name: "ram", byteCount: UInt64(pages) * 4096)])
    }

    static func fill(_ memory: GuestMemory, _ page: Int, _ random: inout SplitMix64) {
        for word in 0..<512 { memory.blocks[0].mapping.store(random.next(), at: page * 4096 + word * 8) }
    }

    /// Two rounds: all pages, eight a batch, then a half of them with new contents.
    init(seed: UInt64) throws {
        var random = SplitMix64(state: seed)
        let memory = try Self.memory()
        sent = try OutgoingVerification(memory, Self.migration)
        var records = try RecordWriter(memory, blocks: blocks, verification: sent)
        var writer = StreamWriter()
        writer.header()
        writer.configuration(machine: "m")
        writer.command(.begin(Self.migration, FeatureSet.all.union(.verification)))
        writer.ramSetup(id: 2, blocks: blocks)
        writer.ramRound(final: false, id: 2)
        opening = writer.bytes
        var batches: [Batch] = []
        let path = temporaryPath("verified-\(seed)")
        defer { Descriptor.remove(path) }
        for round in 0..<2 {
            for first in stride(from: 0, to: Self.pages, by: 8) where round == 0 || first % 16 == 0 {
                for page in first..<first + 8 { Self.fill(memory, page, &random) }
                Descriptor.remove(path)
                let channel = try Connector().connect(to: .file(path: path, offset: 0))
                let run = PageIndex(UInt64(first))..<PageIndex(UInt64(first + 8))
                _ = try records.send([run], of: 0, batches: true, findsZeroes: true, to: channel)
                try channel.finish()
                let bytes = try Descriptor.open(path, O_RDONLY).read(upTo: 1 << 20) ?? []
                batches.append(
                    Batch(
                        bytes: bytes, pages: Array(first..<first + 8),
                        isLast: [Bool](repeating: round == 1 || first % 16 != 0, count: 8)))
            }
        }
        self.batches = batches
        // What a channel of multifd would carry, of memory as it is now.
        let (codec, digests) = (MultifdCodec(blocks: blocks), sent)
        packets = stride(from: 0, to: Self.pages, by: 8).map { first in
            let offsets = (first..<first + 8).map { UInt64($0) * 4096 }
            var bytes = codec.head(of: MultifdPacket(number: UInt64(first), normal: offsets))
            for offset in offsets {
                let digest = digests.digest(memory.blocks[0].mapping, at: Int(offset), block: 0, page: offset / 4096)
                for shift in stride(from: 56, through: 0, by: -8) {
                    bytes.append(UInt8(truncatingIfNeeded: digest >> shift))
                }
            }
            for offset in offsets { bytes += memory.blocks[0].mapping.read(at: Int(offset), count: 4096) }
            return bytes
        }
    }

    /// Receives it, and asks the source until it is clear what differs.
    func findings(_ pieces: [[UInt8]], nothing: Channel) throws -> (findings: [PageFinding], verdict: RootVerdict) {
        let memory = try Self.memory()
        let verification = try IncomingVerification(memory, Self.migration)
        var receiver = PageReceiver(
            nothing, behind: opening + pieces.joined(), memory: memory, blocks: blocks, catalogue: SectionCatalogue(),
            received: try ReceivedPages(memory), statistics: IncomingStatistics(totalBytes: 0, listening: []))
        receiver.verification = verification
        while let item = try receiver.next() { try receiver.place(item) }
        return narrowed(verification)
    }

    func findings(packets: [[UInt8]], nothing: Channel) throws -> (findings: [PageFinding], verdict: RootVerdict) {
        let memory = try Self.memory()
        let verification = try IncomingVerification(memory, Self.migration)
        var buffer = ReceiveBuffer()
        buffer.append(Array(packets.joined()))
        var receiver = try ChannelReceiver(
            nothing, behind: buffer, memory: memory, blocks: blocks, received: try ReceivedPages(memory),
            statistics: IncomingStatistics(totalBytes: 0, listening: []), mayMix: true, verification: verification)
        while let packet = try receiver.next() { try receiver.place(packet) }
        return narrowed(verification)
    }

    private func narrowed(_ verification: IncomingVerification) -> (findings: [PageFinding], verdict: RootVerdict) {
        var verdict = verification.compare(root: sent.ledger.root)
        while case .ask(let range) = verdict, case .digests(_, let values) = sent.answer(range) {
            verdict = verification.compare(range, values)
        }
        return (verification.findings, verdict)
    }

    /// A file that holds nothing: everything was read ahead.
    static func nothing() throws -> Channel {
        let path = temporaryPath("nothing-\(UInt64.random(in: 0...UInt64.max))")
        try Descriptor.create(path).writeAll([])
        defer { Descriptor.remove(path) }
        return try Listener(on: .file(path: path, offset: 0)).accept()
    }
}

@Suite("verified streams")
struct VerifiedStreamTests {
    @Test("what arrives as it was sent is found to be the same, also when pages came twice")
    func clean() throws {
        let stream = try VerifiedStream(seed: 1)
        let nothing = try VerifiedStream.nothing()
        let main = try stream.findings(stream.batches.map(\.bytes), nothing: nothing)
        #expect(main.verdict == .same && main.findings.isEmpty)
        let channel = try stream.findings(packets: stream.packets, nothing: nothing)
        #expect(channel.verdict == .same && channel.findings.isEmpty)
        // A page that was written while it was sent comes again.
        var raced = stream.batches.map(\.bytes)
        raced[0][stream.batches[0].contents(3).lowerBound + 77] ^= 1
        let cleared = try stream.findings(raced, nothing: nothing)
        #expect(cleared.verdict == .same && cleared.findings.isEmpty)
    }

    @Test("10,000 corruptions of the main stream are all found, and nothing else is", .timeLimit(.minutes(10)))
    func corruptions() throws {
        let nothing = try VerifiedStream.nothing()
        let stream = try VerifiedStream(seed: 2)
        var random = SplitMix64(state: 20_261_121)
        var (injected, found, invented, unknown) = (0, 0, 0, 0)
        while injected < 10_000 {
            var batches = stream.batches
            var expected: [UInt64: String] = [:]
            for _ in 0..<12 { Self.corrupt(&batches, stream.batches, &expected, &random) }
            if Int.random(in: 0..<4, using: &random) == 0 {
                Self.dropOrReplay(&batches, stream.batches, &expected, &random)
            }
            let outcome = try stream.findings(batches.map(\.bytes), nothing: nothing)
            let named = Dictionary(uniqueKeysWithValues: outcome.findings.map { ($0.page, $0) })
            injected += expected.count
            found += expected.keys.count { named[$0] != nil }
            invented += named.keys.count { expected[$0] == nil }
            for (page, kind) in expected {
                guard let finding = named[page] else { continue }
                let told = "\(finding.words(["ram"]))"
                if kind != "" && !told.contains(kind) { unknown += 1 }
            }
            guard case .corrupt(let sentence) = outcome.verdict else {
                Issue.record("no verdict: \(outcome.verdict)")
                return
            }
            if injected == expected.count { #expect(sentence.contains("ram 0x"), "\(sentence)") }
        }
        #expect(found == injected, "\(injected - found) of \(injected) were not named")
        #expect(invented == 0, "\(invented) pages were named that are as they were sent")
        #expect(unknown == 0, "of \(unknown) pages the kind was not told")
    }

    /// Corrupts a page that nothing comes after.
    private static func corrupt(
        _ batches: inout [VerifiedStream.Batch], _ clean: [VerifiedStream.Batch], _ expected: inout [UInt64: String],
        _ random: inout SplitMix64
    ) {
        let batch = Int.random(in: 0..<batches.count, using: &random)
        let (index, other) = (Int.random(in: 0..<8, using: &random), Int.random(in: 0..<8, using: &random))
        let pages = batches[batch].pages.map { UInt64($0) }
        guard batches[batch].isLast[index], expected[pages[index]] == nil else { return }
        let place = batches[batch].contents(index)
        switch Int.random(in: 0..<5, using: &random) {
        case 0:
            for _ in 0..<Int.random(in: 1...3, using: &random) {
                batches[batch].bytes[Int.random(in: place, using: &random)] ^=
                    UInt8(1) << UInt8.random(in: 0..<8, using: &random)
            }
            guard batches[batch].bytes[place] != clean[batch].bytes[place] else { return }
            expected[pages[index]] = "do not fit"
        case 1:
            batches[batch].bytes.replaceSubrange(place, with: [UInt8](repeating: 0, count: 4096))
            expected[pages[index]] = "zeros came"
        case 2:
            // The contents of the round before.
            guard let first = clean.firstIndex(where: { $0.pages == clean[batch].pages }), first != batch else {
                return
            }
            batches[batch].bytes.replaceSubrange(place, with: clean[first].bytes[clean[first].contents(index)])
            expected[pages[index]] = "stale"
        case 3:
            guard other != index, expected[pages[other]] == nil else { return }
            batches[batch].bytes.replaceSubrange(place, with: clean[batch].bytes[clean[batch].contents(other)])
            batches[batch].bytes.replaceSubrange(
                batches[batch].contents(other), with: clean[batch].bytes[clean[batch].contents(index)])
            expected[pages[index]] = "swapped"
            expected[pages[other]] = "swapped"
        default:
            // The digest itself: the page cannot be told from a damaged one.
            batches[batch].bytes[Int.random(in: batches[batch].digest(index), using: &random)] ^= 0x10
            expected[pages[index]] = ""
        }
    }

    /// A record of pages vanishes, or an older one comes after it.
    private static func dropOrReplay(
        _ batches: inout [VerifiedStream.Batch], _ clean: [VerifiedStream.Batch], _ expected: inout [UInt64: String],
        _ random: inout SplitMix64
    ) {
        let candidates = clean.indices.filter { batch in
            clean[batch].isLast[0] && clean[batch].pages.allSatisfy { expected[UInt64($0)] == nil }
        }
        guard let batch = candidates.randomElement(using: &random) else { return }
        let earlier = clean.indices.first { $0 != batch && clean[$0].pages == clean[batch].pages }
        for page in clean[batch].pages { expected[UInt64(page)] = "dropped" }
        if let earlier, Bool.random(using: &random) {
            batches.append(clean[earlier])
        } else {
            batches[batch].bytes = []
        }
    }

    @Test("corrupted packets of a channel are found just so", arguments: [7, 8, 9] as [UInt64])
    func channels(seed: UInt64) throws {
        let nothing = try VerifiedStream.nothing()
        let stream = try VerifiedStream(seed: seed)
        var random = SplitMix64(state: seed)
        for _ in 0..<40 {
            var packets = stream.packets
            let (packet, page) = (
                Int.random(in: 0..<packets.count, using: &random), Int.random(in: 0..<8, using: &random)
            )
            let start = MultifdWire.headBytes + 64 + page * 4096
            let number = UInt64(packet * 8 + page)
            let kind = Int.random(in: 0..<4, using: &random)
            switch kind {
            case 0: packets[packet][start + Int.random(in: 0..<4096, using: &random)] ^= 4
            case 1: packets[packet].replaceSubrange(start..<start + 4096, with: [UInt8](repeating: 0, count: 4096))
            case 2: packets[packet][MultifdWire.headBytes + page * 8] ^= 1
            default: packets.remove(at: packet)
            }
            let outcome = try stream.findings(packets: packets, nothing: nothing)
            let expected = kind == 3 ? (0..<8).map { UInt64(packet * 8 + $0) } : [number]
            #expect(outcome.findings.map(\.page) == expected, "kind \(kind)")
            if kind == 3 { #expect(outcome.findings.allSatisfy { $0.kind == .dropped }) }
            if kind == 1 { #expect(outcome.findings.first?.kind == .zeroed) }
        }
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
        var random = SplitMix64(state: 4)
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
        var random = SplitMix64(state: 5)
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
}
