import GuestMemory
import MigrationStream
import Testing

@testable import Migration

@Suite("what may stand in front of a requested page")
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

    // MARK: Pages on their way

    private static func outgoing(repeats: Bool) throws -> OutgoingPages {
        let block = RAMBlockDescription(name: "ram", length: 64 * 4096)
        let bitmap = try DirtyBitmap(pageCount: 64)
        bitmap.set(PageIndex(0)..<PageIndex(32))
        let known = try AtomicPages(pageCount: 64)
        known.insert(PageIndex(0)..<PageIndex(32))
        return try OutgoingPages(of: [block], taking: [bitmap], known: [known], repeats: repeats)
    }

    private static func request(_ page: UInt64) -> PageRequest {
        PageRequest(block: "ram", offset: page * 4096, length: 4096)
    }

    @Test(
        "a page that went with the rest goes once more when a Godwit asks for it, and then never; a QEMU never gets it twice",
        arguments: [true, false])
    func repeated(repeats: Bool) throws {
        let pages = try Self.outgoing(repeats: repeats)
        var place = OutgoingPages.Place()
        #expect(pages.take(from: &place, limit: 4).count == 1 && pages.count == 28)
        let again = pages.take(Self.request(2))
        #expect(
            again.map(\.pages) == (repeats ? [PageIndex(2)..<PageIndex(3)] : []) && !again.contains(where: \.isHole))
        #expect(pages.take(Self.request(2)).isEmpty)
        // One that is left is taken as ever, and only once.
        #expect(pages.take(Self.request(9)).count == 1 && pages.count == 27)
        #expect(pages.take(Self.request(9)).isEmpty && pages.count == 27)
        // A hole is zeroes, once.
        #expect(pages.take(Self.request(40)).map(\.isHole) == [true])
        #expect(pages.take(Self.request(40)).isEmpty && pages.count == 27)
    }
}
