import Glibc
import MigrationStream
import TestSupport
import Testing
import Transport

@testable import Migration

/// Something that goes wrong on the way.
private enum Corruption: String, CaseIterable {
    case flip, zeroes, stale, swap, digest, drop, replay, misdirect, compressedBit

    static func all(of vehicle: Vehicle) -> [Corruption] {
        switch vehicle {
        case .batches, .packets: allCases.filter { $0 != .compressedBit }
        // A difference has no contents that could be those of another page, and what came before is what it is to.
        case .deltas: [.flip, .swap, .digest, .drop, .replay, .misdirect]
        case .zlib, .zstd: allCases
        }
    }

    /// Whether nothing behind it may be understood any more: then it is alone.
    func isAlone(in vehicle: Vehicle) -> Bool { self == .compressedBit || (vehicle == .deltas && self == .flip) }
}

/// What was done to a journey.
private struct Damage {
    /// Pages that are wrong by it, as far as it is known beforehand.
    var pages: Set<Int>
    /// Words that the finding of each has; empty: it cannot be told what happened.
    var words = ""
    /// The pages are right and their digests are not.
    var isOfDigests = false
}

/// Damages the pieces of a journey, each page at most once.
private struct Saboteur {
    let journey: VerifiedJourney
    var pieces: [VerifiedJourney.Piece]
    var bit: VerifiedJourney.BrokenBit?
    private var used: Set<Int> = []
    private var dropped: Set<Int> = []

    init(_ journey: VerifiedJourney) {
        self.journey = journey
        pieces = journey.pieces
    }

    /// - Returns: `nil` when it found nothing to do.
    mutating func inflict(_ corruption: Corruption, _ random: inout SeededRandom) -> Damage? {
        let last = journey.pieces.indices.filter { journey.pieces[$0].isLast && !dropped.contains($0) }
        guard let piece = last.randomElement(using: &random) else { return nil }
        let pages = journey.pieces[piece].pages
        let index = Int.random(in: 0..<pages.count, using: &random)
        switch corruption {
        case .drop, .replay, .misdirect:
            guard used.isDisjoint(with: pages) else { return nil }
            return displace(piece, corruption, &random)
        case .compressedBit:
            bit = VerifiedJourney.BrokenBit(
                piece: piece, place: .random(in: 0..<1, using: &random),
                mask: 1 << UInt8.random(in: 0..<8, using: &random))
            return Damage(pages: Set(pages))
        case .swap: return swap(piece, index, last, &random)
        default:
            guard !used.contains(pages[index]) else { return nil }
            return spoil(piece, index, corruption, &random)
        }
    }

    private mutating func spoil(
        _ piece: Int, _ index: Int, _ corruption: Corruption, _ random: inout SeededRandom
    ) -> Damage? {
        let page = pieces[piece].pages[index]
        let contents = journey.vehicle == .deltas ? pieces[piece].contents.indices : pieces[piece].page(index)
        var damage = Damage(pages: [page])
        switch corruption {
        case .zeroes:
            pieces[piece].contents.replaceSubrange(contents, with: repeatElement(0, count: 4096))
            damage.words = "zeros came"
        case .stale:
            guard let first = journey.pieces[..<piece].last(where: { $0.pages == pieces[piece].pages }) else {
                return nil
            }
            pieces[piece].contents.replaceSubrange(contents, with: first.contents[contents])
            damage.words = "stale"
        case .digest:
            pieces[piece].digests[index * 8 + .random(in: 0..<8, using: &random)] ^=
                1 << UInt8.random(in: 0..<8, using: &random)
            damage.isOfDigests = true
        default:
            // Different bits, so that none is turned back.
            let place = Int.random(in: contents, using: &random)
            pieces[piece].contents[place] ^= UInt8.random(in: 1...255, using: &random)
            damage.words = journey.vehicle == .deltas ? "" : "do not fit"
        }
        used.insert(page)
        return damage
    }

    /// Two pages come with each other's contents.
    private mutating func swap(
        _ piece: Int, _ index: Int, _ last: [Int], _ random: inout SeededRandom
    ) -> Damage? {
        guard let other = last.randomElement(using: &random) else { return nil }
        let second = Int.random(in: 0..<pieces[other].pages.count, using: &random)
        let pages = [pieces[piece].pages[index], pieces[other].pages[second]]
        guard pages[0] != pages[1], used.isDisjoint(with: pages) else { return nil }
        if journey.vehicle == .deltas {
            // The encodings change places, each with the length that stands in its head.
            let (left, right) = (pieces[piece], pieces[other])
            pieces[piece].contents = right.contents
            pieces[other].contents = left.contents
            pieces[piece].head.replaceSubrange(9..<11, with: right.head[9..<11])
            pieces[other].head.replaceSubrange(9..<11, with: left.head[9..<11])
        } else {
            let (left, right) = (pieces[piece].page(index), pieces[other].page(second))
            let contents = Array(pieces[piece].contents[left])
            pieces[piece].contents.replaceSubrange(left, with: pieces[other].contents[right])
            pieces[other].contents.replaceSubrange(right, with: contents)
        }
        used.formUnion(pages)
        return Damage(pages: Set(pages), words: journey.vehicle == .deltas ? "" : "swapped")
    }

    /// A whole piece vanishes, is followed by an older one, or goes to the place of another.
    private mutating func displace(
        _ piece: Int, _ corruption: Corruption, _ random: inout SeededRandom
    ) -> Damage? {
        let pages = journey.pieces[piece].pages
        var damage = Damage(pages: Set(pages), words: "dropped")
        switch corruption {
        case .replay:
            guard
                let older = journey.pieces[..<piece].last(where: { Set($0.pages).isSuperset(of: pages) }),
                used.isDisjoint(with: older.pages)
            else { return nil }
            damage.pages = Set(older.pages)
            pieces.append(older)
        case .misdirect:
            let targets = journey.pieces.filter { $0.pages.count == pages.count && used.isDisjoint(with: $0.pages) }
            guard let target = targets.randomElement(using: &random), target.pages != pages else { return nil }
            misdirect(piece, to: target.pages)
            damage.pages.formUnion(target.pages)
            damage.words = ""
        default: pieces[piece] = VerifiedJourney.Piece(pages: [], head: [], digests: [], contents: [])
        }
        dropped.insert(piece)
        used.formUnion(damage.pages)
        return damage
    }

    private mutating func misdirect(_ piece: Int, to pages: [Int]) {
        let moved = pieces[piece]
        var head = moved.head
        // Offsets stand in the upper bits of words: a difference begins with one, a batch has that of its only run near its end.
        let place = journey.vehicle == .deltas ? 0 : head.count - 12
        if !head.isEmpty {
            let low = head[place + 6] & 0x0f
            let offset = UInt64(pages[0]) * 4096
            for byte in 0..<7 { head[place + byte] = UInt8(truncatingIfNeeded: offset >> UInt64(56 - 8 * byte)) }
            head[place + 6] |= low
        }
        pieces[piece] = VerifiedJourney.Piece(
            pages: pages, head: head, digests: moved.digests, contents: moved.contents)
    }
}

@Suite("corrupted verified streams")
struct CorruptionTests {
    /// All together, over all ways in which pages travel. `GODWIT_CORRUPTIONS=10000` for the whole number; `GODWIT_CORRUPTION_SEED` replays.
    private static let (count, seed) = (
        environment("GODWIT_CORRUPTIONS") ?? 1500, environment("GODWIT_CORRUPTION_SEED") ?? 20_261_121
    )

    private static func environment(_ name: String) -> UInt64? {
        unsafe getenv(name).flatMap { UInt64(unsafe String(cString: $0)) }
    }

    private struct Tally {
        var injected: [Corruption: Int] = [:]
        var named = 0
        var failures: [String] = []

        var total: Int { injected.values.reduce(0, +) }
    }

    @Test(
        "every flipped, dropped, stale, swapped or misdirected page is named, and no other", .timeLimit(.minutes(10)),
        arguments: Vehicle.allCases)
    func corruptions(vehicle: Vehicle) throws {
        let share = Int(Self.count) / Vehicle.allCases.count
        var random = SeededRandom(seed: Self.seed &+ UInt64(vehicle.rawValue.utf8.reduce(0) { $0 * 31 + Int($1) }))
        let nothing = try VerifiedJourney.nothing()
        var tally = Tally()
        while tally.total < share {
            // Other contents now and then.
            let journey = try VerifiedJourney(vehicle, seed: random.next())
            let clean = try journey.outcome(of: journey.pieces, nothing: nothing)
            #expect(clean.sentence == nil && clean.findings.isEmpty && clean.differing.isEmpty, "\(clean)")
            for _ in 0..<20 where tally.total < share {
                try Self.trial(journey, nothing, &tally, &random)
            }
        }
        let kinds = tally.injected.sorted { $0.key.rawValue < $1.key.rawValue }
            .map { "\($0.key) \($0.value)" }.joined(separator: ", ")
        print("corruptions, \(vehicle): \(tally.named) of \(tally.total) named (\(kinds))")
        #expect(
            tally.failures.isEmpty && tally.named == tally.total,
            """
            \(tally.failures.prefix(5).joined(separator: "\n"))
            replay: GODWIT_CORRUPTION_SEED=\(Self.seed) GODWIT_CORRUPTIONS=\(Self.count) swift test --filter CorruptionTests
            """)
    }

    private static func trial(
        _ journey: VerifiedJourney, _ nothing: Channel, _ tally: inout Tally, _ random: inout SeededRandom
    ) throws {
        var saboteur = Saboteur(journey)
        var damages: [(Corruption, Damage)] = []
        let kinds = Corruption.all(of: journey.vehicle)
        // All pages may be used up before there are six.
        for _ in 0..<30 where damages.count < 6 {
            guard let kind = kinds.randomElement(using: &random) else { break }
            let isAlone = kind.isAlone(in: journey.vehicle)
            if isAlone, !damages.isEmpty { break }
            if let damage = saboteur.inflict(kind, &random) { damages.append((kind, damage)) }
            if isAlone { break }
        }
        let outcome = try journey.outcome(of: saboteur.pieces, breaking: saboteur.bit, nothing: nothing)
        for (kind, _) in damages { tally.injected[kind, default: 0] += 1 }
        let what = damages.map { "\($0.0) of \($0.1.pages.sorted())" }.joined(separator: ", ")
        guard !outcome.isBroken else {
            // What could not be understood is told at once.
            let wrong = damages[0].1.pages.intersection(outcome.differing)
            // What breaks at the very end of a packet is met in the next one, and it is this one's pages that do not arrive.
            let candidates = wrong.isEmpty ? outcome.differing : damages[0].1.pages
            let isNamed = candidates.contains {
                outcome.sentence?.contains("0x\(String($0 * 4096, radix: 16)) ") == true
            }
            tally.named += isNamed ? 1 : 0
            if !isNamed || damages.count > 1 { tally.failures.append("\(what): \(outcome.sentence ?? "")") }
            return
        }
        judge(damages, outcome, what, &tally)
    }

    private static func judge(
        _ damages: [(Corruption, Damage)], _ outcome: VerifiedJourney.Outcome, _ what: String, _ tally: inout Tally
    ) {
        let named = Dictionary(uniqueKeysWithValues: outcome.findings.map { (Int($0.page), $0.words(["ram"])) })
        var expected = outcome.differing
        for (_, damage) in damages where damage.isOfDigests { expected.formUnion(damage.pages) }
        if Set(named.keys) != expected {
            tally.failures.append("\(what): \(named.keys.sorted()) are named, \(expected.sorted()) are wrong")
        }
        for (kind, damage) in damages {
            // Of a misdirected piece's target only what does not come again stays wrong; a broken bit may hit what nobody looks at.
            let wrong = damage.pages.intersection(expected)
            let isRight = wrong.allSatisfy {
                named[$0]?.contains(damage.words) == true || (named[$0] != nil && damage.words.isEmpty)
            }
            let isHarmless = wrong.isEmpty && kind == .compressedBit && expected.isEmpty
            if isRight, !wrong.isEmpty || isHarmless {
                tally.named += 1
            } else {
                tally.failures.append(
                    "\(kind) of \(damage.pages.sorted()): \(wrong.sorted()) are wrong, named are \(named)")
            }
        }
        // A broken bit that changed nothing is the only thing that may pass.
        guard !expected.isEmpty else { return }
        let sentence = outcome.sentence ?? ""
        let isTold =
            expected.count > 8
            ? sentence.contains("more")
            : expected.allSatisfy { page in
                sentence.contains("ram 0x\(String(page * 4096, radix: 16)) ")
            }
        if !isTold { tally.failures.append("\(what): \(sentence)") }
    }
}
