import MigrationStream
import TestSupport
import Testing

/// Nothing that comes from outside traps, hangs or grows without bound. A failing run names its seed.
@Suite("Random streams")
struct StreamFuzzTests {
    @Test("mutated streams are decoded or rejected, the same way in any pieces", arguments: 0..<8)
    func mutated(part: Int) {
        let sample = Sample.everything().bytes
        for seed in (part * 100)..<(part * 100 + 100) {
            var generator = SeededRandom(seed: UInt64(seed))
            var bytes = sample
            for _ in 0..<Int.random(in: 1...6, using: &generator) { Self.mutate(&bytes, using: &generator) }
            let whole = Self.outcome(bytes) { Int.max }
            let split = Self.outcome(bytes) { Int.random(in: 1...700, using: &generator) }
            #expect(whole == split, "seed \(seed)")
        }
    }

    @Test("random bytes behind a valid opening are rejected, never trap", arguments: 0..<4)
    func random(part: Int) {
        for seed in (part * 200)..<(part * 200 + 200) {
            var generator = SeededRandom(seed: UInt64(seed) | 1 << 32)
            let openings: [[UInt8]] = [[], Sample.opening().bytes, Sample.setup(), Sample.setup() + [2, 0, 0, 0, 2]]
            let noise = (0..<Int.random(in: 0...300, using: &generator)).map { _ in Self.byte(using: &generator) }
            let bytes = openings[Int.random(in: 0..<4, using: &generator)] + noise
            #expect(Self.outcome(bytes) { Int.max } == Self.outcome(bytes) { 1 }, "seed \(seed)")
            var summary = StreamSummary()
            try? summary.feed(bytes)
            try? summary.finish()
            #expect(summary.byteCount <= UInt64(bytes.count), "seed \(seed)")
            var messages = ReturnPathDecoder()
            var buffer = ReceiveBuffer()
            buffer.append(noise)
            while (try? messages.next(from: &buffer)) ?? nil != nil {}
        }
    }

    @Test("mutated streams are summarised or rejected, the same way in any pieces", arguments: 0..<4)
    func summarised(part: Int) {
        let sample = Sample.everything().bytes
        for seed in (part * 100)..<(part * 100 + 100) {
            var generator = SeededRandom(seed: UInt64(seed) | 1 << 33)
            var bytes = sample
            for _ in 0..<Int.random(in: 0...4, using: &generator) { Self.mutate(&bytes, using: &generator) }
            let whole = Self.summary(bytes, piece: bytes.count)
            let split = Self.summary(bytes, piece: 97)
            #expect(whole == split, "seed \(seed)")
        }
    }

    private static func outcome(_ bytes: [UInt8], pieces: () -> Int) -> String {
        do { return "\(try decode(bytes, pieces: pieces))" } catch { return "\(error)" }
    }

    private static func summary(_ bytes: [UInt8], piece: Int) -> String {
        var summary = StreamSummary()
        do {
            for start in stride(from: 0, to: bytes.count, by: max(piece, 1)) {
                try summary.feed(bytes[start..<min(bytes.count, start + piece)])
            }
            try summary.finish()
            return summary.text
        } catch {
            return summary.text + "\(error)"
        }
    }

    private static func byte(using generator: inout SeededRandom) -> UInt8 {
        let likely: [UInt8] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 0x10, 0x20, 0x7e, 0xff, 0x47]
        return Bool.random(using: &generator)
            ? likely.randomElement(using: &generator) ?? 0 : .random(in: 0...255, using: &generator)
    }

    private static func mutate(_ bytes: inout [UInt8], using generator: inout SeededRandom) {
        guard bytes.count > 2 else { return }
        // Heads matter more than page contents.
        let end = Bool.random(using: &generator) ? min(bytes.count, 500) : bytes.count
        let index = Int.random(in: 0..<end, using: &generator)
        switch Int.random(in: 0..<5, using: &generator) {
        case 0: bytes[index] ^= 1 << UInt8.random(in: 0..<8, using: &generator)
        case 1: bytes[index] = byte(using: &generator)
        case 2: bytes.remove(at: index)
        case 3: bytes.insert(byte(using: &generator), at: index)
        default: bytes.removeLast(Int.random(in: 0..<min(bytes.count, 4000), using: &generator))
        }
    }
}
