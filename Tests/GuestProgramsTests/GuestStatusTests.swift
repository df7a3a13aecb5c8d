import Testing

@testable import GuestPrograms

@Suite("Status and histogram of a guest")
struct GuestStatusTests {
    @Test("each word of a status block arrives in its field")
    func words() throws {
        let model = try GuestModel(
            "dirty,fill=none,working-set=32K", memoryBytes: 4 << 20, lowMemoryBytes: 4 << 20, cpus: 2)
        let fields: [(offset: UInt64, value: UInt64)] = [
            (0x10, 3), (0x18, 4), (0x20, 0x35), (0x28, 41), (0x30, 42), (0x40, 44), (0x48, 45), (0x50, 46), (0x58, 47),
            (0x60, 48), (0x78, 4),
        ]
        for (offset, value) in fields { model.store(value, at: model.status(1, offset)) }
        model.store(1, at: 0xF020)
        let status = try unsafe GuestStatus(read: model.reader)
        #expect(status.kind == .dirty && status.isReady && status.cpusActive == 2 && status.tscKilohertz == 2_000_000)
        let cpu = status.cpus[1]
        #expect(cpu.phase == .running && cpu.filledPages == 4 && cpu.passes == 3 && cpu.touches == 41)
        #expect(cpu.heartbeats == 42 && cpu.longestGapTicks == 44 && cpu.tscBackwards == 45 && cpu.lateSlices == 46)
        #expect(cpu.longestAccessTicks == 47 && cpu.lastTSC == 48)
        #expect(status.cpus[0].phase == .filling)
        #expect(status.touches == 41 && status.heartbeats == 42 && status.longestGapTicks == 44 && status.passes == 3)
    }

    @Test("the last long gaps are told in order, and how many there were")
    func longGaps() throws {
        let model = try GuestModel(
            "dirty,fill=none,working-set=32K", memoryBytes: 4 << 20, lowMemoryBytes: 4 << 20, cpus: 1)
        func gaps() throws -> GuestStatus.CPU { try unsafe GuestStatus(read: model.reader).cpus[0] }
        #expect(try gaps().longGaps == 0 && gaps().latestLongGaps.isEmpty)
        for number in 0..<18 as Range<UInt64> {
            model.store(number, at: model.status(0, 0xD8 + number % 16 * 16))
            model.store(1000 + number, at: model.status(0, 0xE0 + number % 16 * 16))
        }
        model.store(3, at: model.status(0, 0xD0))
        #expect(try gaps().latestLongGaps.map(\.ticks) == [16, 17, 2])
        model.store(18, at: model.status(0, 0xD0))
        #expect(try gaps().longGaps == 18)
        #expect(try gaps().latestLongGaps.map(\.ticks) == Array(2..<18))
        #expect(try gaps().latestLongGaps.allSatisfy { $0.end == 1000 + $0.ticks && $0.start == 1000 })
        // A number that no guest counts to.
        model.store(.max, at: model.status(0, 0xD0))
        #expect(try gaps().latestLongGaps.count == 16)
    }

    @Test("the histograms of all vCPUs are added up")
    func histogram() throws {
        let model = try GuestModel("probe,fill=none", memoryBytes: 4 << 20, lowMemoryBytes: 4 << 20, cpus: 3)
        for cpu in 0..<3 as Range<UInt64> { model.store(cpu + 1, at: 0x50000 + cpu * 4096 + 80 * 8) }
        model.store(94, at: 0x50000 + 40 * 8)
        let histogram = try unsafe GuestHistogram(read: model.reader)
        #expect(histogram.total == 100 && histogram.counts[80] == 6)
        // Bucket 40 is 32 to 36 ticks of half a nanosecond, bucket 80 is 1024 to 1152.
        #expect(histogram.nanoseconds(quantile: 0.5) == 18)
        #expect(histogram.nanoseconds(quantile: 0.94) == 18)
        #expect(histogram.nanoseconds(quantile: 0.95) == 576)
        #expect(histogram.nanoseconds(quantile: 1) == 576)
    }

    @Test("an empty histogram has no quantile, and only a probe has a histogram")
    func noHistogram() throws {
        let empty = GuestHistogram(counts: [UInt64](repeating: 0, count: 512), tscKilohertz: 1)
        #expect(empty.nanoseconds(quantile: 0.5) == nil)
        let model = try GuestModel(
            "dirty,fill=none,working-set=32K", memoryBytes: 4 << 20, lowMemoryBytes: 4 << 20, cpus: 1)
        #expect(throws: GuestProgramError.self) { try unsafe GuestHistogram(read: model.reader) }
    }
}
