import Migration
import Testing

@Suite("Switchover policy")
struct ProtocolSwitchoverTests {
    /// A round that moved `pages` pages of data at `bytesPerSecond`.
    private func round(pages: UInt64, bytesPerSecond: UInt64 = 1_000_000_000, interrupted: Bool = false) -> RoundReport
    {
        let bytes = pages * 4104
        return RoundReport(
            pages: pages, bytes: bytes, nanoseconds: bytes * 1_000_000_000 / bytesPerSecond, interrupted: interrupted)
    }

    @Test("an idle guest is stopped with a handful of pages left, not with all that the limit allows")
    func idle() {
        var policy = SwitchoverPolicy()
        var decisions: [SwitchoverPolicy.Decision] = []
        for remaining in [262_144, 20_000, 700, 30] as [UInt64] {
            decisions.append(policy.decide(remainingPages: remaining))
            policy.sent(round(pages: remaining))
        }
        #expect(decisions == [.iterate, .iterate, .iterate, .switchOver])
    }

    @Test("a guest whose remainder fits but does not shrink any more is stopped")
    func steady() {
        var policy = SwitchoverPolicy()
        _ = policy.decide(remainingPages: 100_000)
        policy.sent(round(pages: 100_000))
        #expect(policy.decide(remainingPages: 20_000) == .iterate)
        policy.sent(round(pages: 20_000))
        #expect(policy.decide(remainingPages: 18_001) == .switchOver)
    }

    @Test("nothing is stopped while what remains does not fit the limit, however long that takes")
    func neverFits() {
        var policy = SwitchoverPolicy(downtimeLimitNanoseconds: 10_000_000)
        for _ in 0..<1000 {
            #expect(policy.decide(remainingPages: 50_000) == .iterate)
            policy.sent(round(pages: 50_000))
        }
    }

    @Test("the fixed parts of the downtime count against the limit")
    func overhead() {
        for (overhead, expected) in [(0, .switchOver), (290_000_000, .iterate)] as [(UInt64, SwitchoverPolicy.Decision)]
        {
            var policy = SwitchoverPolicy(overheadNanoseconds: overhead)
            _ = policy.decide(remainingPages: 20_000)
            policy.sent(round(pages: 20_000))
            #expect(policy.decide(remainingPages: 20_000) == expected)
        }
    }

    @Test("nothing left is always reason to stop, even with a limit of zero")
    func nothingLeft() {
        var policy = SwitchoverPolicy(downtimeLimitNanoseconds: 0)
        #expect(policy.decide(remainingPages: 1) == .iterate)
        #expect(policy.decide(remainingPages: 0) == .switchOver)
    }

    @Test("an interrupted round is no proof that rounds stopped helping")
    func interrupted() {
        var policy = SwitchoverPolicy()
        _ = policy.decide(remainingPages: 20_000)
        policy.sent(round(pages: 10, interrupted: true))
        #expect(policy.decide(remainingPages: 20_000) == .iterate)
        policy.sent(round(pages: 20_000))
        #expect(policy.decide(remainingPages: 20_000) == .iterate)
        policy.sent(round(pages: 20_000))
        #expect(policy.decide(remainingPages: 20_000) == .switchOver)
    }

    @Test("bandwidth is measured by rounds of data, not by zero pages or a handful of bytes")
    func bandwidth() {
        var policy = SwitchoverPolicy()
        policy.sent(RoundReport(pages: 1_000_000, bytes: 9_000_000, nanoseconds: 1_000_000_000))
        policy.sent(RoundReport(pages: 1, bytes: 4104, nanoseconds: 1_000_000_000))
        #expect(policy.bandwidthBytesPerSecond == 125_000_000)
        policy.sent(round(pages: 10_000, bytesPerSecond: 2_000_000_000))
        #expect((1_999_000_000...2_001_000_000).contains(policy.bandwidthBytesPerSecond))
        policy.availableBytesPerSecond = 4104
        #expect(policy.expectedDowntimeNanoseconds(remainingPages: 3) == 3_000_000_000)
        #expect(policy.expectedDowntimeNanoseconds(remainingPages: .max) == 1_000_000_000_000_000_000)
    }
}
