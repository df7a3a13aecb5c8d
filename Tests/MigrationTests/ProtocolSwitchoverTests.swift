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
            _ = policy.decide(remainingPages: 40_000)
            policy.sent(round(pages: 40_000))
            #expect(policy.decide(remainingPages: 40_000) == expected)
        }
    }

    @Test("with a limit of zero the guest is stopped when nothing is left")
    func nothingLeft() {
        var policy = SwitchoverPolicy(downtimeLimitNanoseconds: 0)
        #expect(policy.decide(remainingPages: 1) == .iterate)
        #expect(policy.decide(remainingPages: 0) == .switchOver)
    }

    @Test("a part that was measured counts whole, where a guess would not, until it has faded")
    func measuredCosts() {
        var policy = SwitchoverPolicy(downtimeLimitNanoseconds: 20_000_000, overheadNanoseconds: 30_000_000)
        _ = policy.decide(remainingPages: 100)
        #expect(policy.decide(remainingPages: 0) == .switchOver, "a guess keeps nobody from trying")
        policy.costs.learn(.state, 1_000_000)
        policy.costs.learn(.load, 40_000_000)
        guard case .rest = policy.decide(remainingPages: 0) else {
            Issue.record("a switchover that cannot fit is tried")
            return
        }
        policy.costs.learn(.load, 5_000_000)
        var looks = 0
        while case .rest = policy.decide(remainingPages: 0), looks < 100 { looks += 1 }
        #expect(looks > 3 && looks < 100, "tried again after \(looks) looks")
    }

    @Test(
        "after broken switchovers it rests longer and longer, counts on less of the limit, and tries again all the same"
    )
    func broken() {
        var policy = SwitchoverPolicy(downtimeLimitNanoseconds: 20_000_000)
        var rests: [UInt64] = []
        for _ in 0..<20 {
            policy.brokeOff()
            guard case .rest(let nanoseconds) = policy.decide(remainingPages: 10) else {
                Issue.record("no rest after a broken switchover")
                return
            }
            rests.append(nanoseconds)
            var looks = 0
            while policy.decide(remainingPages: 10) != .switchOver, looks < 50 {
                policy.sent(round(pages: 2000))
                looks += 1
            }
            #expect(looks < 50, "a guest that is nearly idle must be tried again")
        }
        #expect(rests == rests.sorted() && rests.first == 2_000_000 && rests.last == 500_000_000)
        // 3,000 pages are 12.3 ms of 20: too much just after a switchover was broken off.
        var full = SwitchoverPolicy(downtimeLimitNanoseconds: 20_000_000)
        full.sent(round(pages: 3000))
        var careful = full
        careful.brokeOff()
        careful.brokeOff()
        for policy in [full, careful] {
            var policy = policy
            let isCareful = policy.brokenSwitchovers > 0
            if isCareful { _ = policy.decide(remainingPages: 3000) }
            _ = policy.decide(remainingPages: 3000)
            #expect((policy.decide(remainingPages: 3000) == .switchOver) == !isCareful)
        }
    }

    @Test("the rate to count on is the slowest of the last rounds, and a stall does not have the last word for ever")
    func lowerBound() {
        var policy = SwitchoverPolicy()
        for rate in [2_000_000_000, 500_000_000, 1_000_000_000] as [UInt64] {
            policy.sent(round(pages: 10_000, bytesPerSecond: rate))
        }
        #expect((499_000_000...501_000_000).contains(policy.bandwidthBytesPerSecond))
        for _ in 0..<4 { policy.sent(round(pages: 10_000)) }
        #expect((999_000_000...1_001_000_000).contains(policy.bandwidthBytesPerSecond))
        policy.sent(round(pages: 100, bytesPerSecond: 1_000_000))
        let stalled = policy.bandwidthBytesPerSecond
        #expect(stalled < 2_000_000)
        for _ in 0..<60 { policy.sent(round(pages: 10)) }
        #expect(policy.bandwidthBytesPerSecond > 900_000_000)
    }

    @Test("a limit that is raised takes back what was measured under it, also in the round that was under way then")
    func raisedLimit() {
        var slow = SwitchoverPolicy(downtimeLimitNanoseconds: 20_000_000)
        slow.limit(to: 100_000)
        for _ in 0..<4 {
            _ = slow.decide(remainingPages: 100)
            slow.sent(round(pages: 100, bytesPerSecond: 100_000))
        }
        #expect(slow.bandwidthBytesPerSecond < 101_000)
        // A guest that writes a page now and then: the remainder is never enough to measure with.
        for raised in [nil, 1_000_000_000] as [UInt64?] {
            var policy = slow
            policy.limit(to: raised, roundIsUnderWay: true)
            policy.sent(round(pages: 100, bytesPerSecond: 200_000, interrupted: true))
            #expect(!policy.knowsBandwidth, "half of that round was sent at the old rate")
            #expect(policy.decide(remainingPages: 10) == .switchOver)
            policy.sent(round(pages: 10_000))
            #expect(policy.bandwidthBytesPerSecond > 900_000_000)
        }
        // The same limit again, or a lower one, which the last round need not keep: what is known stays.
        for other in [100_000, 50_000] as [UInt64] {
            var policy = slow
            policy.limit(to: other, roundIsUnderWay: true)
            #expect(policy.knowsBandwidth)
            guard case .rest = policy.decide(remainingPages: 10) else {
                Issue.record("10 pages at 100 kB/s do not fit 20 ms")
                return
            }
        }
        // More than a handful: another round first, which measures.
        var policy = slow
        policy.limit(to: nil)
        #expect(policy.decide(remainingPages: 500) == .iterate)
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

    @Test("pages that go compressed are measured by what they are in memory, as what remains is")
    func compressed() {
        var policy = SwitchoverPolicy()
        var report = RoundReport(pages: 100_000, bytes: 100_000 * 500, nanoseconds: 1_000_000_000)
        policy.sent(report)
        #expect(!policy.knowsBandwidth)
        report.contentBytes = 100_000 * 4096
        policy.sent(report)
        #expect(policy.knowsBandwidth && policy.bandwidthBytesPerSecond == 409_600_000)
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
