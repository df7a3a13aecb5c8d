import GuestMemory
import Host
import TestSupport
import Testing

@testable import Migration

@Suite struct PendingPagesTests {
    private func page(_ value: UInt64) -> PageIndex { PageIndex(value) }

    private func record(_ pages: UInt64) throws -> (PendingPages, GuestMemory) {
        let memory = GuestMemory(blocks: [try RAMBlock(name: "ram", byteCount: pages << 12)])
        return (try PendingPages(memory), memory)
    }

    @Test("each page is claimed once and asked for once; what was not discarded is a hole, or is here")
    func states() throws {
        let (pending, _) = try record(64)
        pending.expect(page(10)..<page(20), of: 0)
        pending.expect(page(15)..<page(22), of: 0)
        #expect(pending.missingPages == 12)
        #expect(pending.answer(page(9), of: 0) == .hole && pending.answer(page(22), of: 0) == .hole)
        #expect(pending.answer(page(10), of: 0) == .request)
        #expect(pending.answer(page(10), of: 0) == .coming)
        #expect(pending.claim(page(10), of: 0) && !pending.claim(page(10), of: 0) && !pending.claim(page(9), of: 0))
        #expect(pending.surplusPages == 2)
        // It has been read and is about to be placed: nobody is asked.
        #expect(pending.claim(page(11), of: 0))
        #expect(pending.answer(page(11), of: 0) == .coming)
        #expect(pending.latency.openRequests == 1)
        pending.placed(page(10)..<page(12), of: 0)
        #expect(pending.answer(page(11), of: 0) == .here)
        #expect(pending.latency.openRequests == 0 && pending.latency.histogram.count == 1)
        #expect(pending.blocks[0].awaitedRuns(in: page(0)..<page(64)) == [page(12)..<page(22)])
        #expect(pending.blocks[0].awaitedRuns(in: page(13)..<page(15)) == [page(13)..<page(15)])
        #expect(pending.waitUntilComplete(deadline: .after(milliseconds: 5)) == 10)
        for number in 12..<22 as Range<UInt64> { #expect(pending.claim(page(number), of: 0)) }
        pending.placed(page(12)..<page(22), of: 0)
        #expect(pending.waitUntilComplete(deadline: .never) == 0)
        #expect(pending.blocks[0].awaitedRuns(in: page(0)..<page(64)).isEmpty)
    }

    @Test("a page that was placed and not told of yet is waited for; one that is still to come is not")
    func telling() throws {
        let (pending, _) = try record(64)
        pending.expect(page(10)..<page(14), of: 0)
        #expect(try pending.waitUntilTold(page(9), of: 0), "it was always there")
        #expect(try !pending.waitUntilTold(page(10), of: 0), "nobody has it")
        for number in 10..<13 as Range<UInt64> { #expect(pending.claim(page(number), of: 0)) }
        try HostThread.detached(name: "places") {
            Clock.sleep(nanoseconds: 20_000_000)
            pending.placed(PageIndex(10)..<PageIndex(11), of: 0)
            pending.unclaim(PageIndex(11)..<PageIndex(12), of: 0)
        }
        #expect(try pending.waitUntilTold(page(10), of: 0, nanoseconds: 10_000_000_000))
        #expect(try !pending.waitUntilTold(page(11), of: 0, nanoseconds: 10_000_000_000))
        #expect(throws: SystemError.self) { try pending.waitUntilTold(page(12), of: 0, nanoseconds: 1_000_000) }
    }

    @Test("percentiles are exact to a sixteenth, octaves are those of microseconds")
    func histogram() {
        var histogram = LatencyHistogram()
        #expect(histogram.nanoseconds(atMille: 500) == 0 && histogram.meanNanoseconds == 0)
        var values: [UInt64] = []
        var generator = SystemRandomNumberGenerator()
        for _ in 0..<5000 {
            let value = UInt64.random(in: 0...(1 << UInt64.random(in: 0...40, using: &generator)), using: &generator)
            values.append(value)
            histogram.record(value)
        }
        values.sort()
        #expect(histogram.count == 5000 && histogram.longestNanoseconds == values.last)
        #expect(histogram.meanNanoseconds == values.reduce(0, +) / 5000)
        for share: UInt64 in [1, 500, 900, 990, 1000] {
            let exact = values[Int(5 * share) - 1]
            let told = histogram.nanoseconds(atMille: share)
            #expect(told >= exact && told <= exact + exact / 16 + 1, "\(share): \(told), exactly \(exact)")
        }
        let octaves = histogram.octaves(24)
        #expect(octaves.reduce(0, +) == 5000)
        // The buckets' borders are not all those of microseconds: a sixteenth may stand beside.
        for (index, count) in octaves.enumerated().dropLast() {
            let start: UInt64 = index == 0 ? 0 : 1000 << UInt64(index)
            let end: UInt64 = 1000 << UInt64(index + 1)
            let least = values.count { $0 >= start + start / 16 && $0 < end - end / 16 }
            let most = values.count { $0 >= start - start / 16 && $0 < end + end / 16 }
            #expect((least...most).contains(Int(count)), "octave \(index)")
        }
        var huge = LatencyHistogram()
        huge.record(.max)
        #expect(huge.nanoseconds(atMille: 500) == .max && huge.octaves(24).last == 1)
    }
}
