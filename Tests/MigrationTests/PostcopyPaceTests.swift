import GuestMemory
import Testing

@testable import Migration

@Suite("what may stand in front of a requested page, and what follows it")
struct PostcopyPaceTests {
    // MARK: Pace

    private static let millisecond: UInt64 = 1_000_000

    /// So many bytes a second, in writes of 100 microseconds' worth.
    private static func send(_ bytesPerSecond: UInt64, to pace: BackgroundPace, milliseconds: UInt64) {
        for step in 0...milliseconds * 10 { pace.sent(bytesPerSecond / 10_000, at: 1_000_000 + step * 100_000) }
    }

    @Test("a write is what the link carries in the time that is allowed, neither tiny nor huge")
    func batches() {
        let pace = BackgroundPace(targetMicroseconds: 100)
        // Not measured yet: 10 Gb/s.
        #expect(pace.batchBytes == 125_000)
        Self.send(2_000_000_000, to: pace, milliseconds: 150)
        #expect(abs(pace.batchBytes - 200_000) <= 400)
        pace.targetMicroseconds = 10_000
        #expect(pace.batchBytes == 256 << 10)
        pace.targetMicroseconds = 1
        #expect(pace.batchBytes == 64 << 10)
        pace.targetMicroseconds = 0
        #expect(pace.batchBytes == 64 << 10)
    }

    @Test("sockets hold what the link carries in that time and two round trips, and are let alone where that is much")
    func sockets() {
        let pace = BackgroundPace(targetMicroseconds: 200)
        #expect(pace.socketBytes(roundTrip: 0) == 250_000)
        #expect(pace.socketBytes(roundTrip: 100_000) == 500_000)
        // A brake over a long way would cost more than it gains.
        #expect(pace.socketBytes(roundTrip: 10 * Self.millisecond) == nil)
        Self.send(10_000_000, to: pace, milliseconds: 150)
        #expect(pace.socketBytes(roundTrip: 0) == 128 << 10)
        pace.targetMicroseconds = 0
        #expect(pace.socketBytes(roundTrip: 0) == nil)
    }

    @Test("any target and any round trip make some bound", arguments: [1, 200, UInt64(UInt32.max), .max])
    func extremes(target: UInt64) {
        let pace = BackgroundPace(targetMicroseconds: target)
        #expect((64 << 10...256 << 10).contains(pace.batchBytes))
        for roundTrip: UInt64 in [0, 1, 1 << 40, .max] {
            #expect((pace.socketBytes(roundTrip: roundTrip) ?? 1 << 20) >= 128 << 10)
        }
    }

    @Test("under a limit of bandwidth a write is a millisecond's worth at most, and the target's if that is less")
    func limited() {
        let pacer = Pacer(bytesPerSecond: 100_000_000)
        #expect(pacer.batchBytes(most: 1 << 20) == 100_000)
        #expect(pacer.batchBytes(most: 1 << 20, withinMicroseconds: 200) == 20_000)
        #expect(pacer.batchBytes(most: 1 << 20, withinMicroseconds: 5000) == 100_000)
        #expect(pacer.batchBytes(most: 1 << 20, withinMicroseconds: 1) == 4096)
        #expect(Pacer(bytesPerSecond: 0).batchBytes(most: 65_536, withinMicroseconds: 200) == 65_536)
    }

    // MARK: Strides

    private static let pageCount: UInt64 = 1 << 18

    private static func follow(
        _ watch: inout StrideWatch, _ page: UInt64, of block: Int = 0, _ count: Int = 8
    ) -> [UInt64] {
        watch.asked(PageIndex(page), of: block, pageCount: pageCount, count: count).map(\.value)
    }

    @Test(
        "pages in equal steps are foreseen from the third on, and what was foreseen is part of the walk",
        arguments: [1, 7, -5])
    func strides(step: Int64) {
        var watch = StrideWatch()
        func page(_ number: Int64) -> UInt64 { UInt64(100_000 + number * step) }
        #expect(Self.follow(&watch, page(0)).isEmpty && Self.follow(&watch, page(1)).isEmpty)
        #expect(Self.follow(&watch, page(2)) == (3...10).map(page))
        // Nobody asks for those any more.
        #expect(Self.follow(&watch, page(11)) == (12...19).map(page))
    }

    @Test("several walks at once, in several blocks, do not disturb each other")
    func walks() {
        var watch = StrideWatch()
        var foreseen: [[UInt64]] = [[], [], []]
        let starts: [(page: UInt64, step: UInt64, block: Int)] = [(1000, 3, 0), (200_000, 64, 0), (1000, 5, 1)]
        for round in 0..<3 as Range<UInt64> {
            for (index, walk) in starts.enumerated() {
                foreseen[index] = Self.follow(&watch, walk.page + round * walk.step, of: walk.block, 2)
            }
        }
        #expect(foreseen == [[1009, 1012], [200_192, 200_256], [1015, 1020]])
    }

    @Test("pages in no order are not foreseen, the memory's ends are not passed, and the record stays small")
    func limits() {
        var watch = StrideWatch()
        var random = SystemRandomNumberGenerator()
        var guesses = 0
        for _ in 0..<20_000 {
            guesses += Self.follow(&watch, UInt64.random(in: 0..<Self.pageCount, using: &random)).count
        }
        // Equal steps come by chance, seldom.
        #expect(guesses < 2000)
        watch = StrideWatch()
        for page in [Self.pageCount - 6, Self.pageCount - 4] { #expect(Self.follow(&watch, page).isEmpty) }
        #expect(Self.follow(&watch, Self.pageCount - 2).isEmpty)
        for page: UInt64 in [6, 4] { #expect(Self.follow(&watch, page).isEmpty) }
        #expect(Self.follow(&watch, 2) == [0])
        // The same page again is no step.
        watch = StrideWatch()
        for _ in 0..<4 { #expect(Self.follow(&watch, 50).isEmpty) }
    }
}
