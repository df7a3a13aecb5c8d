import GuestMemory
import Host
import Testing

@testable import Migration

@Suite("how long vCPUs stand still for pages is told")
struct BlockTimeTests {
    private static func place(_ page: UInt64, of block: Int = 0) -> PageLatency.Place {
        PageLatency.Place(block: block, page: PageIndex(page))
    }

    private static func pages(_ pages: Range<UInt64>) -> Range<PageIndex> {
        PageIndex(pages.lowerBound)..<PageIndex(pages.upperBound)
    }

    private static func sleep() { Clock.sleep(nanoseconds: 3_000_000) }

    @Test("each vCPU's waits are its own, all stand still only while none runs, and other threads are told apart")
    func sums() {
        let times = BlockTime(threads: [10, 11])
        times.began(Self.place(1), thread: 10)
        Self.sleep()
        times.began(Self.place(2), thread: 11)
        times.began(Self.place(3), thread: 99)
        Self.sleep()
        times.ended(Self.pages(1..<2), of: 0)
        Self.sleep()
        times.ended(Self.pages(0..<8), of: 0)
        let told = times.figures
        #expect(told.cpus.map(\.count) == [1, 1] && told.others.count == 1)
        let (first, second) = (told.cpus[0].nanoseconds, told.cpus[1].nanoseconds)
        #expect(first >= 6_000_000 && second >= 6_000_000)
        // Both stood from the second's fault to the first's page.
        #expect(told.allNanoseconds >= 3_000_000 && told.allNanoseconds < min(first, second))
        #expect(told.others.nanoseconds <= second)
        #expect(told.others.meanNanoseconds == told.others.nanoseconds)
    }

    @Test("a page of another block, or one nobody waits for, ends no wait")
    func strangers() {
        let times = BlockTime(threads: [10])
        times.began(Self.place(1), thread: 10)
        times.ended(Self.pages(1..<2), of: 1)
        times.ended(Self.pages(2..<9), of: 0)
        #expect(times.figures.cpus.map(\.count) == [0] && times.figures.allNanoseconds == 0)
        times.ended(Self.pages(1..<2), of: 0)
        #expect(times.figures.cpus.map(\.count) == [1])
    }

    @Test("a thread that was sent away and comes back for the same page waits once; for another page, twice")
    func again() {
        let times = BlockTime(threads: [10])
        for thread: Int32 in [10, 50] {
            times.began(Self.place(1), thread: thread)
            times.began(Self.place(1), thread: thread)
        }
        times.ended(Self.pages(1..<2), of: 0)
        #expect(times.figures.cpus.map(\.count) == [1] && times.figures.others.count == 1)
        for thread: Int32 in [10, 50] {
            times.began(Self.place(2), thread: thread)
            times.began(Self.place(3), thread: thread)
        }
        // The page it was sent away from ends nothing any more.
        times.ended(Self.pages(2..<3), of: 0)
        #expect(times.figures.cpus.map(\.count) == [2] && times.figures.others.count == 2)
        times.ended(Self.pages(3..<4), of: 0)
        #expect(times.figures.cpus.map(\.count) == [3] && times.figures.others.count == 3)
    }

    @Test("of no waits the mean is nothing, not a fault")
    func none() {
        let told = BlockTime(threads: [10, 11]).figures
        #expect(told.cpus.map(\.meanNanoseconds) == [0, 0] && told.others.meanNanoseconds == 0)
    }
}
