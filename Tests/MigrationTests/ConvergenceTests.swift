import Glibc
import Host
import Machine
import TestSupport
import Testing

@testable import Migration

@Suite("Convergence: throttling, the model, the verdict")
struct ConvergenceTests {
    // MARK: auto-converge

    private static let second: UInt64 = 1_000_000_000

    @Test("two periods in a row of more than half of what was sent throttle the guest, step by step")
    func autoConverge() {
        var policy = AutoConverge()
        func period(_ dirty: UInt64) -> UInt64 {
            policy.collected(dirtyBytes: dirty, sentBytes: 1000, nanoseconds: Self.second)
        }
        #expect(period(501) == 0)
        #expect(period(500) == 0)
        // The second was not above half: it begins anew.
        #expect(period(600) == 0)
        #expect(period(600) == 20)
        #expect(period(600) == 20)
        #expect(period(600) == 30)
        for _ in 0..<30 { _ = period(2000) }
        #expect(policy.percentage == 99)
        // What was set stays, as in QEMU.
        #expect(period(0) == 99)
    }

    @Test("pages that go as differences count as sent: a guest that writes them again and again is throttled")
    func deltas() throws {
        let machine = try VirtualMachine(
            MachineConfiguration(kind: .none, memoryByteCount: 1 << 20), serial: SerialPort(.none))
        let convergence = Convergence(machine, MigrationParameters(), means: .throttle)
        var info = MigrationInfo()
        info.status = .active
        info.ram = MigrationInfo.RAM()
        info.xbzrle = MigrationInfo.XBZRLE()
        for _ in 0..<5 {
            convergence.collected(remainingPages: 200, info)
            info.xbzrle?.pages += 200
            info.ram?.transferred += 200 * 100
            // Two of these are a period.
            Clock.sleep(nanoseconds: AutoConverge.periodNanoseconds * 3 / 5)
        }
        convergence.describe(&info)
        #expect(info.throttlePercentage ?? 0 >= 20)
        // Throttling begins anew with a migration that goes on after its connection was lost.
        convergence.pause()
        info.throttlePercentage = nil
        convergence.describe(&info)
        #expect(info.throttlePercentage == nil)
    }

    @Test("a link that carries pages compressed to a fifth is measured all the same; one of zeroes is not")
    func compressedRounds() {
        for whole in [0, 50_000] as [UInt64] {
            var history = RoundHistory(chunkCount: 4)
            history.began(pages: 50_000)
            history.collected(
                remaining: 40_000, sentPages: 50_000, wholePages: whole, sentBytes: 50_000 * 800, seconds: 1, pace: 1)
            #expect(history.linkBytesPerSecond == (whole > 0 ? 40_000_000 : nil))
        }
    }

    @Test("short rounds are summed up until they make a period")
    func shortRounds() {
        var policy = AutoConverge()
        for _ in 0..<9 {
            #expect(policy.collected(dirtyBytes: 900, sentBytes: 1000, nanoseconds: 50_000_000) == 0)
        }
        #expect(policy.collected(dirtyBytes: 900, sentBytes: 1000, nanoseconds: 50_000_000) == 20)
    }

    @Test("parameters bound it: trigger, first step, further steps, the most, and a slow tail")
    func settings() {
        var settings = AutoConverge.Settings()
        (settings.triggerThreshold, settings.initial, settings.increment, settings.maximum) = (80, 5, 7, 15)
        var policy = AutoConverge(settings)
        var seen: [UInt64] = []
        for _ in 0..<8 {
            seen.append(policy.collected(dirtyBytes: 810, sentBytes: 1000, nanoseconds: Self.second))
        }
        #expect(seen == [0, 5, 5, 12, 12, 15, 15, 15])
        #expect(policy.collected(dirtyBytes: 790, sentBytes: 1000, nanoseconds: Self.second) == 15)

        settings = AutoConverge.Settings()
        settings.isTailSlow = true
        var slow = AutoConverge(settings)
        for _ in 0..<2 { slow.collected(dirtyBytes: 520, sentBytes: 1000, nanoseconds: Self.second) }
        #expect(slow.percentage == 20)
        // A twenty-sixth too much: 80 % of the time less its twenty-sixth.
        for _ in 0..<2 { slow.collected(dirtyBytes: 520, sentBytes: 1000, nanoseconds: Self.second) }
        #expect(slow.percentage == 23)
    }

    // MARK: The model

    /// Pages written at random, interval by interval, as a dry run would see them.
    private func observation(
        _ groups: [(pages: Int, writesPerSecond: Double)], seed: UInt64, allocated: Int
    ) -> DirtyObservation {
        var random = SeededRandom(seed: seed)
        var seen = DirtyObservation(allocatedPages: Double(allocated))
        var marks = [UInt8](repeating: 0, count: allocated)
        var dirty = [Bool](repeating: false, count: allocated)
        for seconds in ObservationPlan.seconds {
            var first = 0
            for group in groups {
                for _ in 0..<Int(group.writesPerSecond * seconds) {
                    dirty[first + .random(in: 0..<group.pages, using: &random)] = true
                }
                first += group.pages
            }
            seen.beginInterval(seconds: seconds)
            for page in dirty.indices where dirty[page] {
                seen.count(&marks[page])
                dirty[page] = false
            }
        }
        return seen
    }

    @Test("windows of an observation count each page once, however often it was found")
    func windows() {
        var seen = DirtyObservation(allocatedPages: 10)
        var marks: [UInt8] = [0, 0, 0]
        for pages in [[0, 1], [1], [0, 2], [2]] {
            seen.beginInterval(seconds: 0.1)
            for page in pages { seen.count(&marks[page]) }
        }
        #expect(seen.uniquePages(0...0) == 2)
        #expect(seen.uniquePages(0...1) == 2)
        #expect(seen.uniquePages(0...3) == 3)
        #expect(seen.uniquePages(1...2) == 3)
        #expect(seen.uniquePages(2...3) == 2)
        #expect(seen.uniquePages(1...1) == 1)
    }

    @Test("an observation takes two seconds, of an expensive guest in fewer looks")
    func plan() {
        var counts: [Int] = []
        for isExpensive in [false, true] {
            var (count, sum) = (0, 0.0)
            while let seconds = ObservationPlan.interval(
                after: count, isExpensive: isExpensive && count >= ObservationPlan.decisiveCount)
            {
                count += 1
                sum += seconds
            }
            #expect(abs(sum - 2) < 1e-9)
            counts.append(count)
        }
        #expect(counts[0] == ObservationPlan.seconds.count && counts[0] <= DirtyObservation.mostIntervals)
        #expect(counts[1] * 2 < counts[0] + 2)
    }

    @Test("the model gives back the unique pages of a working set, and of hot and cold pages", arguments: [1, 2])
    func uniquePages(seed: UInt64) {
        let sets: [[(pages: Int, writesPerSecond: Double)]] = [
            [(10_000, 20_000)], [(500, 30_000), (30_000, 10_000)], [(40_000, 5_000)],
        ]
        for groups in sets {
            let model = observation(groups, seed: seed, allocated: 50_000).model()
            for seconds in [0.02, 0.2, 1, 2] {
                let truth = groups.reduce(0.0) {
                    $0 + Double($1.pages) * (1 - exp(-$1.writesPerSecond * seconds / Double($1.pages)))
                }
                let found = model.uniquePages(exposure: seconds)
                #expect(abs(found / truth - 1) < 0.12, "\(groups), \(seconds) s: \(found) for \(truth), seed \(seed)")
            }
        }
    }

    @Test("exposure follows the activity, turn after turn, and its mean is one")
    func activity() {
        let activity = WriteModel.Activity(steps: [(1, 0), (0.5, 1), (0.5, 3)])
        #expect(activity.period == 2)
        #expect(activity.exposure(until: 1) == 0)
        #expect(abs(activity.exposure(until: 1.25) - 0.25) < 1e-12)
        #expect(abs(activity.exposure(until: 2) - 2) < 1e-12)
        #expect(abs(activity.exposure(until: 5.5) - 4.5) < 1e-12)
        #expect(WriteModel.Activity.steady.exposure(until: 3.5) == 3.5)
    }

    // MARK: The forecast

    private func forecast(
        pages: Double, writesPerSecond: Double, linkPages: Double, limitMilliseconds: UInt64 = 100
    ) -> ConvergenceForecast {
        var forecast = ConvergenceForecast(
            model: WriteModel(classes: [.init(pages: pages, perSecond: writesPerSecond / pages)]),
            link: .init(bytesPerSecond: linkPages * 4104),
            policy: SwitchoverPolicy(downtimeLimitNanoseconds: limitMilliseconds * 1_000_000))
        forecast.chunkCount = 1000
        return forecast
    }

    @Test("an idle guest takes one round and next to no downtime")
    func idle() {
        let outcome = forecast(pages: 100_000, writesPerSecond: 0, linkPages: 50_000).outcome()
        #expect(outcome.converges)
        #expect(abs(outcome.seconds - 2) < 0.1)
        #expect(outcome.downtimeSeconds < 0.02)
    }

    @Test("a light guest converges, a heavy one does not, and each remedy that is named works")
    func verdicts() {
        let light = forecast(pages: 200_000, writesPerSecond: 10_000, linkPages: 50_000)
        let lightOutcome = light.outcome()
        #expect(lightOutcome.converges)
        // The first round is 4 s, the next leave less and less.
        #expect((4.2...5.5).contains(lightOutcome.seconds), "\(lightOutcome)")

        let heavy = forecast(pages: 200_000, writesPerSecond: 90_000, linkPages: 50_000)
        #expect(!heavy.outcome().converges)
        let remedies = heavy.remedies(isCapped: true)
        #expect(!remedies.isEmpty)
        for remedy in remedies {
            var other = heavy
            switch remedy {
            case .downtimeLimit(let milliseconds):
                other.policy.downtimeLimitNanoseconds = milliseconds * 1_000_000
            case .bandwidth(let rate): other.link.bytesPerSecond = Double(rate)
            case .autoConverge(let percentage):
                other.autoConverge = AutoConverge()
                #expect((20...99).contains(percentage))
            }
            #expect(other.outcome().converges, "\(remedy)")
        }
    }

    @Test("a hot spot that does not fit the downtime is told apart from a guest that is too fast")
    func causes() {
        let hot = forecast(pages: 10_000, writesPerSecond: 1e6, linkPages: 50_000)
        let verdict = ConvergenceVerdict(hot, elapsedSeconds: 1, isCapped: true)
        #expect(verdict.state == .notConverging)
        #expect(verdict.remedies.contains { if case .downtimeLimit = $0 { true } else { false } })
        let roomy = forecast(pages: 10_000, writesPerSecond: 1e6, linkPages: 50_000, limitMilliseconds: 400)
        #expect(roomy.outcome().converges)
    }

    @Test("the forecast throttles as auto-converge will, and says to what")
    func throttled() {
        var heavy = forecast(pages: 200_000, writesPerSecond: 90_000, linkPages: 50_000)
        heavy.autoConverge = AutoConverge()
        let verdict = ConvergenceVerdict(heavy, elapsedSeconds: 0, isCapped: false)
        #expect(verdict.state == .converging)
        #expect(verdict.throttlePercentage >= 20)
        #expect(verdict.sentence.contains("throttled to \(verdict.throttlePercentage) %"))
    }

    // MARK: Rounds that were

    @Test("of a guest that finds all its pages written in every round, no remedy counts on faster rounds finding fewer")
    func worst() throws {
        // 48 MiB, written as fast as can be, over 20 MB/s: rounds of 2.5 s, each like the other.
        let (hot, link) = (12_288.0, 20e6)
        var history = RoundHistory(chunkCount: 1)
        history.began(pages: UInt64(hot) + 4_000)
        for round in 0..<5 {
            let pages = round == 0 ? hot + 4_000 : hot
            history.collected(
                remaining: UInt64(hot), sentPages: UInt64(pages), sentBytes: UInt64(pages * 4104),
                seconds: pages * 4104 / link, pace: 1)
        }
        let (model, dirty) = try #require(history.model(worst: true))
        var forecast = ConvergenceForecast(
            model: model, link: .init(bytesPerSecond: link),
            policy: SwitchoverPolicy(downtimeLimitNanoseconds: 20_000_000))
        forecast.dirtyPages = dirty
        let remedies = forecast.remedies(isCapped: true)
        guard case .downtimeLimit(let milliseconds)? = remedies.first else {
            Issue.record("the first of \(remedies)")
            return
        }
        // 2.5 s and some air.
        #expect((2500...4500).contains(milliseconds))
        for case .bandwidth(let rate) in remedies { #expect(rate > 2_400_000_000, "all of it in 20 ms") }
        #expect(remedies.contains { if case .bandwidth = $0 { true } else { false } })
    }

    @Test("the rounds of a migration tell how the guest writes", arguments: [8_000.0, 30_000, 120_000])
    func history(writesPerSecond: Double) throws {
        let pages = 200_000.0
        let truth = forecast(pages: pages, writesPerSecond: writesPerSecond, linkPages: 50_000)
        var history = RoundHistory(chunkCount: 1000)
        history.began(pages: UInt64(pages))
        // Rounds by hand: pages that were sent are dirty again by when they were sent, the others by the whole round.
        var dirty = pages
        for _ in 0..<3 {
            let seconds = dirty / 50_000
            let whole = writesPerSecond / pages * seconds
            let again = dirty * (1 - (1 - exp(-whole)) / whole) + (pages - dirty) * (1 - exp(-whole))
            history.collected(
                remaining: UInt64(again), sentPages: UInt64(dirty), sentBytes: UInt64(dirty * 4104), seconds: seconds,
                pace: 1)
            dirty = again
        }
        #expect(abs((history.linkBytesPerSecond ?? 0) / (50_000 * 4104) - 1) < 0.01)
        let (model, now) = try #require(history.model())
        #expect(abs(now.reduce(0, +) / dirty - 1) < 0.05)
        var forecast = truth
        forecast.model = model
        forecast.dirtyPages = now
        #expect(forecast.outcome().converges == truth.outcome().converges)
        #expect(truth.outcome().converges == (writesPerSecond < 50_000))
    }

    @Test("rounds that get shorter are not given up, rounds that do not are")
    func shrinking() {
        var history = RoundHistory(chunkCount: 10)
        history.began(pages: 100_000)
        func round(_ remaining: UInt64, after sent: UInt64) {
            history.collected(
                remaining: remaining, sentPages: sent, sentBytes: sent * 4104, seconds: Double(sent) / 10_000, pace: 1)
        }
        round(50_000, after: 100_000)
        #expect(history.mayShrink)
        round(30_000, after: 50_000)
        #expect(history.mayShrink)
        round(30_000, after: 30_000)
        round(30_000, after: 30_000)
        #expect(!history.mayShrink)
        // More than the link carries: that is clear at once.
        var fast = RoundHistory(chunkCount: 10)
        fast.began(pages: 100_000)
        fast.collected(remaining: 90_000, sentPages: 50_000, sentBytes: 50_000 * 4104, seconds: 1, pace: 1)
        #expect(fast.mayShrink)
        fast.collected(remaining: 90_000, sentPages: 50_000, sentBytes: 50_000 * 4104, seconds: 0.4, pace: 1)
        #expect(!fast.mayShrink)
    }

    @Test("sentences say what is the matter and what to do")
    func sentences() {
        var verdict = ConvergenceVerdict(.converging)
        verdict.remainingNanoseconds = 3_240_000_000
        verdict.downtimeNanoseconds = 45_400_000
        #expect(verdict.sentence == "converging: about 3.2 s to go, downtime about 45 ms")
        verdict = ConvergenceVerdict(.notConverging)
        (verdict.uniqueBytesPerSecond, verdict.linkBytesPerSecond) = (612_300_000, 500_000_000)
        verdict.remedies = [.autoConverge(percentage: 30)]
        #expect(
            verdict.sentence
                == "not converging: the guest dirties 612 MB/s of distinct pages, the link carries 500 MB/s; "
                + "auto-converge would do, throttling it to about 30 %")
        (verdict.uniqueBytesPerSecond, verdict.downtimeNanoseconds) = (400_000_000, 240_000_000)
        verdict.downtimeLimitNanoseconds = 100_000_000
        verdict.remedies = [.downtimeLimit(milliseconds: 260)]
        #expect(
            verdict.sentence
                == "not converging: what a round leaves would stop the guest for 240 ms, the limit is 100 ms; "
                + "a downtime-limit of 260 ms would do")
        #expect(ConvergenceVerdict(.observing).sentence.hasPrefix("observing"))
    }
}
