import TestSupport
import Testing

@testable import MigrationStream

@Suite("XBZRLE")
struct XBZRLETests {
    private static func encode(_ old: [UInt8], _ new: [UInt8], room: Int = XBZRLE.longestEncoding) -> [UInt8]?? {
        var bytes = [UInt8](repeating: 0xee, count: room)
        let outcome = unsafe old.withUnsafeBytes { old in
            unsafe new.withUnsafeBytes { new in
                unsafe bytes.withUnsafeMutableBytes { unsafe XBZRLE.encode(from: old, to: new, into: $0) }
            }
        }
        switch outcome {
        case .unchanged: return .some(nil)
        case .bytes(let count): return .some(Array(bytes[..<count]))
        case .tooLong: return nil
        }
    }

    private static func apply(_ encoding: [UInt8], to page: inout [UInt8]) throws(XBZRLE.Damage) {
        let span = unsafe encoding.span.bytes
        var damage: XBZRLE.Damage?
        unsafe page.withUnsafeMutableBytes { page in
            do throws(XBZRLE.Damage) { try unsafe XBZRLE.apply(span, to: page) } catch { damage = error }
        }
        if let damage { throw damage }
    }

    /// The encoding as its definition says it, byte by byte.
    private static func plainEncoding(_ old: [UInt8], _ new: [UInt8]) -> [UInt8] {
        var bytes: [UInt8] = []
        var position = 0
        func number(_ value: Int) {
            bytes += value < 0x80 ? [UInt8(value)] : [UInt8(value & 0x7f | 0x80), UInt8(value >> 7)]
        }
        while let start = (position..<4096).first(where: { old[$0] != new[$0] }) {
            let end = (start..<4096).first { old[$0] == new[$0] } ?? 4096
            number(start - position)
            number(end - start)
            bytes += new[start..<end]
            position = end
        }
        return bytes
    }

    private static func changed(_ old: [UInt8], using generator: inout SeededRandom) -> [UInt8] {
        var new = old
        switch Int.random(in: 0..<4, using: &generator) {
        case 0:
            for _ in 0..<Int.random(in: 1...40, using: &generator) {
                new[Int.random(in: 0..<4096, using: &generator)] = .random(in: 0...255, using: &generator)
            }
        case 1:
            let start = Int.random(in: 0..<4096, using: &generator)
            let end = Int.random(in: start..<4096, using: &generator)
            for index in start...end { new[index] = .random(in: 0...255, using: &generator) }
        case 2:
            // Counters side by side, whose low bytes change.
            for index in stride(from: Int.random(in: 0..<8, using: &generator), to: 4096, by: 8) { new[index] &+= 1 }
        default:
            let step = Int.random(in: 1...9, using: &generator)
            for index in stride(from: 0, to: 4096, by: step) { new[index] ^= 0x55 }
        }
        return new
    }

    private static func noise(using generator: inout SeededRandom) -> [UInt8] {
        (0..<4096).map { _ in .random(in: 0...255, using: &generator) }
    }

    @Test("the definition's examples have the definition's bytes")
    func examples() {
        let zero = [UInt8](repeating: 0, count: 4096)
        func page(_ bytes: (Int, UInt8)...) -> [UInt8] {
            var page = zero
            for (index, byte) in bytes { page[index] = byte }
            return page
        }
        #expect(Self.encode(zero, zero) == .some(nil))
        #expect(Self.encode(zero, page((0, 7))) == [0, 1, 7])
        #expect(Self.encode(zero, page((5, 7))) == [5, 1, 7])
        #expect(Self.encode(zero, page((4095, 7))) == [0xff, 0x1f, 1, 7])
        #expect(Self.encode(zero, page((300, 1), (301, 2), (305, 3))) == [0xac, 2, 2, 1, 2, 3, 1, 3])
        // Two equal bytes between two runs cost as much as the numbers they save.
        #expect(Self.encode(zero, page((8, 1), (11, 2))) == [8, 4, 1, 0, 0, 2])
        let ones = [UInt8](repeating: 1, count: 4096)
        #expect(Self.encode(zero, ones, room: 4096) == nil)
        #expect(Self.encode(zero, Array(ones[..<4000] + zero[4000...])) == [0, 0xa0, 0x1f] + ones[..<4000])
    }

    @Test("what was encoded makes the old page the new one, and is no longer than the plain encoding", arguments: 0..<4)
    func roundTrips(part: Int) throws {
        for seed in (part * 60)..<(part * 60 + 60) {
            var generator = SeededRandom(seed: UInt64(seed))
            let old = Self.noise(using: &generator)
            let new = Self.changed(old, using: &generator)
            let plain = Self.plainEncoding(old, new)
            var page = old
            try Self.apply(plain, to: &page)
            #expect(page == new, "seed \(seed): the plain encoding")
            switch Self.encode(old, new) {
            case .some(.some(let encoding)):
                #expect(encoding.count <= plain.count, "seed \(seed)")
                page = old
                try Self.apply(encoding, to: &page)
                #expect(page == new, "seed \(seed)")
                // One byte less is too little room, and the byte behind the room is left alone.
                #expect(Self.encode(old, new, room: encoding.count) == .some(encoding), "seed \(seed)")
                #expect(Self.encode(old, new, room: encoding.count - 1) == nil, "seed \(seed)")
            case .some(nil): #expect(old == new, "seed \(seed)")
            case nil: #expect(plain.count > XBZRLE.longestEncoding - 4, "seed \(seed)")
            }
        }
    }

    @Test(
        "a damaged encoding is refused with its reason, and changes nothing",
        arguments: [
            ([5], .truncated), ([5, 2, 1], .truncated), ([0x80], .truncated), ([5, 0x80], .truncated),
            ([0x80, 0x80, 1, 1], .number), ([0, 0xff, 0xff], .number), ([5, 0], .emptyRun),
            ([5, 1, 9, 0, 1, 9], .emptyRun),
            ([0xff, 0x1f, 2, 1, 1], .outside), ([0x81, 0x20, 1, 1], .outside), ([0x80, 0x20, 1, 1], .outside),
            ([0, 1, 9, 0xff, 0x1f, 1, 1], .outside), ([0xff, 0x7f, 1, 1], .outside), ([1, 1, 9, 1], .truncated),
        ] as [([UInt8], XBZRLE.Damage)])
    func damaged(encoding: [UInt8], damage: XBZRLE.Damage) {
        let before = [UInt8](repeating: 3, count: 4096)
        var page = before
        #expect(throws: damage) { try Self.apply(encoding, to: &page) }
        #expect(page == before)
    }

    @Test("random and mutated encodings change the page as far as they say, or nothing", arguments: 0..<4)
    func fuzz(part: Int) {
        for seed in (part * 2000)..<(part * 2000 + 2000) {
            var generator = SeededRandom(seed: UInt64(seed) | 1 << 34)
            let before = [UInt8](repeating: 3, count: 4096)
            var encoding = (0..<Int.random(in: 0...64, using: &generator)).map { _ -> UInt8 in
                .random(in: 0...(Bool.random(using: &generator) ? 8 : 255), using: &generator)
            }
            if Bool.random(using: &generator) {
                encoding = Self.plainEncoding(before, Self.changed(before, using: &generator))
                for _ in 0..<Int.random(in: 0...3, using: &generator) where !encoding.isEmpty {
                    encoding[Int.random(in: 0..<encoding.count, using: &generator)] = .random(
                        in: 0...255, using: &generator)
                }
            }
            var page = before
            do throws(XBZRLE.Damage) {
                try Self.apply(encoding, to: &page)
                #expect(page.indices.count(where: { page[$0] != before[$0] }) <= encoding.count, "seed \(seed)")
            } catch {
                #expect(page == before, "seed \(seed)")
            }
        }
    }

    @Test("a record names its page and its length, and its bytes go around the decoder")
    func record() throws {
        var bytes = Sample.setup() + [2, 0, 0, 0, 2]
        var records = RAMRecordEncoder(blocks: [Sample.low, Sample.high])
        records.pageDelta(block: 1, offset: 0x3000, byteCount: 3, into: &bytes)
        bytes += [5, 1, 7]
        records.pageDelta(block: 1, offset: 0x4000, byteCount: 4096, into: &bytes)
        bytes += [UInt8](repeating: 0, count: 4096)
        bytes += [0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 2]
        for piece in [1, 7, 5000] {
            var decoder = Sample.decoder
            var buffer = ReceiveBuffer()
            var items: [StreamItem] = []
            for start in stride(from: 0, to: bytes.count, by: piece) {
                buffer.append(bytes[start..<min(bytes.count, start + piece)])
                while true {
                    let taken = min(decoder.payloadBytes, buffer.count)
                    buffer.consume(taken)
                    decoder.payloadConsumed(taken)
                    guard decoder.payloadBytes == 0, let item = try decoder.next(from: &buffer) else { break }
                    items.append(item)
                }
            }
            #expect(
                items.suffix(4) == [
                    .ramRound(final: false), .pageDelta(block: 1, offset: 0x3000, byteCount: 3),
                    .pageDelta(block: 1, offset: 0x4000, byteCount: 4096), .ramSectionEnded(.part),
                ], "in pieces of \(piece)")
        }
        var summary = StreamSummary()
        try summary.feed(bytes)
        #expect(summary.blocks.map(\.deltaPages) == [0, 2] && summary.blocks.map(\.dataPages) == [0, 0])
        #expect(summary.text.contains("delta pages"))
    }
}
