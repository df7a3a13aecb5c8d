import GuestMemory
import Host
import Testing

@testable import Migration

@Suite("memory taken ahead of the stream") struct PopulateAheadTests {
    private static let granule = PopulateAhead.granuleBytes
    private static let granules: UInt64 = 40

    private struct Subject {
        let memory: GuestMemory
        let received: ReceivedPages
        let ahead: PopulateAhead
        var block: RAMBlock { memory.blocks[0] }

        init(threads: Int = 1) throws {
            memory = GuestMemory(blocks: [
                try RAMBlock(name: "ram", byteCount: PopulateAheadTests.granules * PopulateAheadTests.granule)
            ])
            received = try ReceivedPages(memory)
            ahead = PopulateAhead(memory, received: received, threads: threads)
        }

        func reach(_ granules: some Sequence<UInt64>) {
            for number in granules { ahead.reached(number * PopulateAheadTests.granule, of: 0) }
        }

        func isResident(_ granule: UInt64) throws -> Bool {
            let count = Int(PopulateAheadTests.granule)
            return try block.mapping.residentPrefix(at: Int(granule) * count, count: count) == count
        }

        /// Waits until that granule has memory, at most 20 s.
        func waits(for granule: UInt64) throws -> Bool {
            let deadline = Deadline.after(seconds: 20)
            while try !isResident(granule) {
                if deadline.hasPassed { return false }
                Clock.sleep(nanoseconds: 1_000_000)
            }
            return true
        }
    }

    @Test("granules in a row have those in front of them taken, and nothing behind the window")
    func row() throws {
        let subject = try Subject()
        subject.reach(0...15)
        let reached = try subject.waits(for: 18)
        #expect(reached, "a row of 16 opens a window of 4: 17 to 20")
        Clock.sleep(nanoseconds: 50_000_000)
        for granule in 22..<Self.granules {
            let early = try subject.isResident(granule)
            #expect(!early, "granule \(granule)")
        }
    }

    @Test("channels may bring them in a little disorder")
    func disorder() throws {
        let subject = try Subject()
        subject.reach([1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12])
        let reached = try subject.waits(for: 16)
        #expect(reached)
    }

    @Test("places here and there open no window")
    func scattered() throws {
        let subject = try Subject()
        subject.reach([0, 20, 5, 30, 11, 38, 2, 25, 14, 35])
        Clock.sleep(nanoseconds: 50_000_000)
        #expect(subject.ahead.populatedGranules == 0)
    }

    @Test("a window ends with its block")
    func end() throws {
        let subject = try Subject()
        subject.reach(0..<Self.granules)
        let reached = try subject.waits(for: Self.granules - 1)
        #expect(reached)
    }

    @Test("granules of which something came before are passed over")
    func received() throws {
        let subject = try Subject()
        for granule in 20..<Self.granules {
            let page = RAMOffset(granule * Self.granule).page
            subject.received.mark(page..<page.advanced(by: 1), of: 0)
        }
        subject.reach(0..<Self.granules)
        Clock.sleep(nanoseconds: 50_000_000)
        for granule in 20..<Self.granules {
            let taken = try subject.isResident(granule)
            #expect(!taken, "granule \(granule)")
        }
    }

    @Test("without threads nothing is taken")
    func none() throws {
        let subject = try Subject(threads: 0)
        subject.reach(0..<Self.granules)
        Clock.sleep(nanoseconds: 20_000_000)
        let taken = try subject.isResident(20)
        #expect(!taken && subject.ahead.populatedGranules == 0)
    }
}
