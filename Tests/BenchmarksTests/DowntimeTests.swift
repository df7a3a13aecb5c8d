import CommandLineKit
import QMP
import Testing

@testable import Benchmarks

@Suite("the benchmark of the downtime contract")
struct DowntimeTests {
    /// A guest's answer; its clock runs at 1 MHz, so that a tick is a microsecond. Gaps by start and length.
    private static func guest(
        lastLook: UInt64, count: Int, longest: UInt64 = 0, _ gaps: [(start: UInt64, ticks: UInt64)] = []
    ) -> JSON {
        [
            "tsc-kilohertz": 1000,
            "cpus": [
                [
                    "last-tsc": JSON(lastLook), "long-gaps": JSON(count), "longest-gap-ticks": JSON(longest),
                    "latest-long-gaps": .array(
                        gaps.map { ["ticks": JSON($0.ticks), "end": JSON($0.start + $0.ticks)] }),
                ]
            ],
        ]
    }

    private static func gap(
        _ gaps: [(start: UInt64, ticks: UInt64)], count: Int, longest: UInt64 = 99_000
    ) throws -> SwitchoverGap {
        try SwitchoverGap(
            from: guest(lastLook: 500_000, count: 7), to: guest(lastLook: 900_000, count: count, longest: longest, gaps)
        )
    }

    @Test("the gap is the one that began with the last look at the source, whichever was longer before and after")
    func spans() throws {
        let gap = try Self.gap([(400_000, 30_000), (500_000, 12_350), (513_000, 40_000)], count: 9)
        #expect(gap.span == 500...512.35)
        #expect(gap.milliseconds == 12.35 && gap.isCertain && gap.laterMilliseconds == 40)
    }

    @Test("a guest that was stopped between a look and its note is told by the gap that began just behind")
    func between() throws {
        let gap = try Self.gap([(400_000, 30_000), (500_200, 8000)], count: 8)
        #expect(gap.milliseconds == 8 && gap.isCertain && gap.laterMilliseconds == 0)
    }

    @Test("without a gap that began there, the standstill was shorter than what is kept")
    func short() throws {
        let gap = try Self.gap([(400_000, 30_000), (505_000, 70_000)], count: 8)
        #expect(gap.milliseconds == 1 && gap.isCertain && gap.laterMilliseconds == 70)
        #expect(try Self.gap([(400_000, 30_000)], count: 7).milliseconds == 1)
    }

    @Test("a gap that is not kept any more is at most the longest, and that is not certain")
    func lost() throws {
        let gap = try Self.gap([(600_000, 30_000), (640_000, 20_000)], count: 10)
        #expect(gap.milliseconds == 99 && !gap.isCertain && gap.laterMilliseconds == 30)
    }

    @Test("a guest that does not tell its gaps is refused")
    func silent() {
        let here = Self.guest(lastLook: 1, count: 2)
        #expect(throws: CommandFailure.self) { try SwitchoverGap(from: here, to: ["tsc-kilohertz": 1000]) }
        #expect(throws: CommandFailure.self) { try SwitchoverGap(from: [:], to: here) }
        #expect(throws: CommandFailure.self) { try SwitchoverGap(from: here, to: Self.guest(lastLook: 3, count: 1)) }
    }

    @Test("the guest's clock is laid beside the host's by the look and the answer that were least late")
    func clock() {
        var clock = GuestClock()
        #expect(clock.onHost(1) == nil)
        clock.look(Self.guest(lastLook: 5_000_000, count: 0), answered: 1_009_000_000)
        clock.look(Self.guest(lastLook: 5_500_000, count: 0), answered: 1_500_400_000)
        clock.look(Self.guest(lastLook: 5_590_000, count: 0), answered: 1_600_100_000)
        #expect(clock.onHost(5500).map { abs($0 - 1500.4) < 1e-6 } == true)
    }

    private static func sample(
        limit: Double, _ gaps: [(start: UInt64, ticks: UInt64)], count: Int, waited: Double = 0
    ) throws -> SwitchoverSample {
        SwitchoverSample(
            limit: limit, standstill: try gap(gaps, count: count), reported: 2, parts: [],
            unseen: (before: 7, after: 1), total: 100, broken: 1,
            longestBroken: 4, control: 0.1, controlGuest: 3, waited: waited, stolen: nil, stalls: 2)
    }

    @Test("what is undecided counts neither as kept nor as broken, and only what is certain is a gap of the table")
    func promises() throws {
        let samples: [UInt64: [SwitchoverSample]] = [
            5: [
                try Self.sample(limit: 5, [(500_000, 9900)], count: 8),
                try Self.sample(limit: 5, [(500_000, 10_100)], count: 8, waited: 1),
                try Self.sample(limit: 5, [(600_000, 2000)], count: 9),
            ],
            // At most 99 ms: within the limit whichever it was.
            100: [try Self.sample(limit: 100, [(600_000, 2000)], count: 9)],
        ]
        let result = DowntimeBenchmark.result(samples, of: [5, 100], runs: 3, unfinished: 0, seed: 1)
        func value(_ name: String) -> Double? { result.promises.first { $0.name == name }?.value }
        #expect(value("contract-violations") == 1 && value("switchovers-undecided") == 1)
        #expect(value("violations-beyond-the-host") == 0 && value("switchovers-committed") == 4)
        #expect(result.cells.first?.quantities.first?.samples == [9.9, 10.1])
        #expect(result.notes.contains { $0.contains("gap at most 99") })
    }

    @Test("a limit at which nothing was committed was not kept")
    func nothing() throws {
        let samples: [UInt64: [SwitchoverSample]] = [20: [try Self.sample(limit: 20, [(500_000, 9900)], count: 8)]]
        #expect(DowntimeBenchmark.result(samples, of: [20], runs: 1, unfinished: 0, seed: 1).holds)
        #expect(!DowntimeBenchmark.result(samples, of: [5, 20], runs: 1, unfinished: 3, seed: 1).holds)
        #expect(!DowntimeBenchmark.result([:], of: [5], runs: 1, unfinished: 1, seed: 1).holds)
    }
}
