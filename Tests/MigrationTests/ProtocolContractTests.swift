import Migration
import MigrationStream
import Testing

/// A source core on a clock of its own, up to the moment at which its guest stands still.
private struct Standstill {
    var core: SourceCore
    var now: UInt64 = 0
    var actions: [SourceAction] = []
    var stream: [UInt8] = []

    static let limit: UInt64 = 20_000_000
    static let cpu = DeviceSection(name: "cpu", version: 1, body: [1, 2, 3])

    init(pauses: Bool = false, features: FeatureSet = .all, godwit: Bool = true, awaitsAcknowledgement: Bool = false) {
        var catalogue = SectionCatalogue()
        catalogue.add("cpu", version: 1)
        var configuration = SourceConfiguration(
            migration: MigrationIdentifier(high: 1, low: 2), machineName: "m",
            blocks: [RAMBlockDescription(name: "ram", length: 1 << 20)], catalogue: catalogue,
            pausesBeforeSwitchover: pauses,
            switchover: SwitchoverPolicy(downtimeLimitNanoseconds: Self.limit), features: features)
        configuration.awaitsSwitchoverAcknowledgement = awaitsAcknowledgement
        core = SourceCore(configuration)
        feed(.start, .connected(.bothWays))
        if godwit {
            feed(.received(.hello(version: 1, features: .all, instance: MigrationIdentifier(high: 3, low: 4))))
        }
        feed(.received(.pong(Wire.godwitPing)), .trackingStarted, .collected(remainingPages: 256))
        feed(.roundSent(RoundReport(pages: 256, bytes: 60_000, nanoseconds: 1_000_000)), .collected(remainingPages: 3))
    }

    @discardableResult
    mutating func feed(_ events: SourceEvent..., after nanoseconds: UInt64 = 0) -> [SourceAction] {
        now += nanoseconds
        var all: [SourceAction] = []
        for event in events { all += core.handle(event, at: now) }
        for case .send(let bytes) in all { stream += bytes }
        actions += all
        return all
    }

    mutating func stop() { feed(.guestStopped(wasRunning: true), after: 1_000_000) }
    mutating func collect() { feed(.collected(remainingPages: 3), after: 1_000_000) }
    mutating func sendLast() {
        feed(.roundSent(RoundReport(pages: 3, bytes: 12_312, nanoseconds: 1_000_000)), after: 1_000_000)
    }
    mutating func save() { feed(.stateSaved([Self.cpu]), after: 1_000_000) }
    mutating func prepare() {
        stop()
        collect()
        sendLast()
        save()
    }

    /// The timer of the contract that runs, as an event, and its length.
    var contract: (event: SourceEvent, nanoseconds: UInt64)? {
        actions.compactMap { action -> (event: SourceEvent, nanoseconds: UInt64)? in
            guard case .setTimer(let timer, let nanoseconds) = action, timer.kind == .contract else { return nil }
            return (.timer(timer), nanoseconds)
        }.last
    }

    /// Through all rests and rounds to the next standstill.
    mutating func reachNextStandstill() {
        for _ in 0..<200 where core.phase != .stoppingGuest {
            switch core.phase {
            case .resting: feed(deadline, after: 1_000_000)
            case .draining: feed(.received(.pong(2)))
            case .collecting: feed(.collected(remainingPages: 1))
            case .sendingRound: feed(.roundSent(RoundReport(pages: 1, bytes: 4104, nanoseconds: 1000)))
            default: return
            }
        }
    }

    var deadline: SourceEvent {
        let timers = actions.compactMap { action -> ProtocolTimer? in
            if case .setTimer(let timer, _) = action, timer.kind == .deadline { timer } else { nil }
        }
        return .timer(timers.last ?? ProtocolTimer(kind: .deadline, generation: 0))
    }

    var broken: [BrokenSwitchover] {
        actions.compactMap { if case .brokeOff(let broken) = $0 { broken } else { nil } }
    }

    var commands: [ForwardCommand] {
        var decoder = StreamDecoder(
            .load(blocks: core.configuration.blocks, catalogue: core.configuration.catalogue))
        var buffer = ReceiveBuffer()
        buffer.append(stream)
        var commands: [ForwardCommand] = []
        while let item = try? decoder.next(from: &buffer) {
            if case .command(let command) = item { commands.append(command) }
            // The text at the end is nobody's command.
            if decoder.payloadBytes > 0 { break }
        }
        return commands
    }
}

@Suite("Downtime contract")
struct ProtocolContractTests {
    @Test("a timer runs from the stop on, and leaves what the word to start needs")
    func timer() throws {
        let standing = Standstill()
        let timer = try #require(standing.contract)
        #expect(standing.core.phase == .stoppingGuest)
        #expect(timer.nanoseconds <= Standstill.limit && timer.nanoseconds >= Standstill.limit * 3 / 4)
    }

    @Test("in every phase before COMMIT the timer has the guest run on, and the migration with it", arguments: 0...4)
    func everyPhase(steps: Int) throws {
        var driver = Standstill()
        let phases: [SourcePhase] = [.stoppingGuest, .finalCollecting, .finalSending, .savingState, .preparing]
        if steps > 0 { driver.stop() }
        if steps > 1 { driver.collect() }
        if steps > 2 { driver.sendLast() }
        if steps > 3 { driver.save() }
        #expect(driver.core.phase == phases[steps])
        let expired = try #require(driver.contract).event
        let actions = driver.feed(expired, after: Standstill.limit - driver.now)
        #expect(actions.contains(.resumeGuest) && driver.core.mayRun)
        #expect(driver.core.status == .active)
        #expect(driver.broken.map(\.number) == [1])
        #expect(
            driver.broken.allSatisfy { $0.nanoseconds <= Standstill.limit && $0.limitNanoseconds == Standstill.limit })
        #expect(actions.contains(.interruptRound) == (steps == 2))
        // What was under way ends, late.
        switch steps {
        case 0: driver.feed(.guestStopped(wasRunning: true), after: 50_000_000)
        case 1: driver.feed(.collected(remainingPages: 3), after: 50_000_000)
        case 2:
            driver.feed(
                .roundSent(RoundReport(pages: 1, bytes: 4104, nanoseconds: 60_000_000, interrupted: true)),
                after: 50_000_000)
        case 3: driver.feed(.stateSaved([Standstill.cpu]), after: 50_000_000)
        default:
            #expect(driver.commands.last == .retract(attempt: 1))
            #expect(driver.core.phase == .retracting)
            var absurd = driver
            absurd.feed(.received(.ready(nanoseconds: .max)), .received(.retracted(attempt: 1)))
            #expect(absurd.core.phase == .collecting && absurd.core.mayRun)
            driver.feed(.received(.ready(nanoseconds: 5)), after: 50_000_000)
            #expect(driver.core.phase == .retracting, "READY that was on its way is void")
            driver.feed(.received(.retracted(attempt: 1)))
        }
        driver.reachNextStandstill()
        #expect(driver.core.phase == .stoppingGuest)
        driver.prepare()
        driver.feed(.received(.ready(nanoseconds: 5)))
        guard case .commitWithin(_, let left)? = driver.commands.last else {
            Issue.record("no word to start, but \(String(describing: driver.commands.last))")
            return
        }
        #expect(left <= Standstill.limit - 4_000_000)
        #expect(!driver.core.mayRun)
        driver.feed(.received(.started(nanoseconds: 1)), .received(.shut(0)))
        #expect(driver.actions.last == .finished(.completed))
    }

    @Test("the bandwidth to count on may be changed under way, like the limit: more pages are too many")
    func availableBandwidth() {
        for isSlow in [false, true] {
            var driver = Standstill()
            if isSlow { driver.feed(.setAvailableBandwidth(bytesPerSecond: 100_000)) }
            driver.stop()
            // 3 pages at 100 kB/s are 123 ms, at what was measured or guessed next to nothing.
            driver.collect()
            #expect(driver.core.phase == (isSlow ? .collecting : .finalSending))
        }
    }

    @Test(
        "a limit that is changed during the standstill binds it: less may be used up already, more gives more time, zero all"
    )
    func changedLimit() throws {
        for (limit, expected) in [(2, 1), (10, 7_000_000), (40, 37_000_000)] as [(UInt64, UInt64)] {
            var driver = Standstill()
            driver.stop()
            driver.collect()
            driver.sendLast()
            let old = try #require(driver.contract).event
            driver.feed(.setDowntimeLimit(nanoseconds: limit * 1_000_000))
            let timer = try #require(driver.contract)
            #expect(timer.event != old && timer.nanoseconds == expected, "a limit of \(limit) ms")
            #expect(!driver.feed(old).contains(.resumeGuest), "the old timer does not count any more")
            #expect(driver.feed(timer.event, after: timer.nanoseconds).contains(.resumeGuest))
            #expect(driver.broken.map(\.limitNanoseconds) == [limit * 1_000_000])
        }
        var driver = Standstill()
        driver.stop()
        driver.feed(.setDowntimeLimit(nanoseconds: 0))
        #expect(driver.actions.last == .cancelTimer(.contract))
        driver.collect()
        // Told with every other parameter: nothing has changed.
        #expect(driver.feed(.setDowntimeLimit(nanoseconds: 0), after: 1_000_000_000).isEmpty)
        driver.feed(.setDowntimeLimit(nanoseconds: 5_000_000))
        #expect(driver.feed(try #require(driver.contract).event).contains(.resumeGuest))
    }

    @Test("COMMIT allows what is left of the limit when READY is heard, and none is said when nothing is left")
    func left() {
        var driver = Standstill()
        driver.prepare()
        var late = driver
        driver.feed(.received(.ready(nanoseconds: 5)), after: 6_000_000)
        #expect(driver.commands.last == .commitWithin(attempt: 1, nanoseconds: 10_000_000))
        // The timer has not been told yet, but READY comes too late.
        late.feed(.received(.ready(nanoseconds: 5)), after: 17_000_000)
        #expect(late.commands.last == .retract(attempt: 1))
        #expect(late.actions.contains(.resumeGuest) && late.core.mayRun)
    }

    @Test("the destination's word that COMMIT came too late gives the guest back, and the migration goes on")
    func tooLate() throws {
        var driver = Standstill()
        driver.prepare()
        driver.feed(.received(.ready(nanoseconds: 5)))
        #expect(!driver.core.mayRun)
        let actions = driver.feed(.received(.retracted(attempt: 1)), after: 100_000_000)
        let regained = try #require(actions.firstIndex(of: .regainRightToRun))
        let resumed = try #require(actions.firstIndex(of: .resumeGuest))
        #expect(regained < resumed && driver.core.mayRun)
        #expect(driver.broken.map(\.nanoseconds) == [104_000_000], "a long standstill is told as it was")
        driver.reachNextStandstill()
        #expect(driver.core.phase == .stoppingGuest)
    }

    @Test("RETRACTED of another attempt leaves doubt after COMMIT, and ends the migration before")
    func wrongAttempt() {
        var committed = Standstill()
        committed.prepare()
        committed.feed(.received(.ready(nanoseconds: 5)), .received(.retracted(attempt: 7)))
        #expect(committed.core.phase == .unsettled)
        var before = Standstill()
        before.prepare()
        before.feed(.received(.retracted(attempt: 1)))
        #expect(before.core.phase == .finished && before.core.mayRun)
    }

    @Test("cancel and a lost connection during a retraction end the migration, with the guest running")
    func endings() throws {
        for blow in [.cancel, .disconnected("reset"), .received(.failure(reason: "no"))] as [SourceEvent] {
            var driver = Standstill()
            driver.prepare()
            driver.feed(try #require(driver.contract).event, after: 20_000_000)
            let resumes = driver.actions.count { $0 == .resumeGuest }
            driver.feed(blow)
            #expect(driver.core.phase == .finished && driver.core.mayRun)
            #expect(driver.actions.count { $0 == .resumeGuest } == resumes, "it runs already")
        }
    }

    @Test("an operator's hold does not count, what comes after it does")
    func hold() throws {
        var driver = Standstill(pauses: true)
        driver.stop()
        #expect(driver.core.phase == .preSwitchover)
        driver.feed(try #require(driver.contract).event)
        #expect(driver.core.phase == .preSwitchover)
        driver.feed(.proceed, after: 60_000_000_000)
        driver.collect()
        driver.sendLast()
        driver.save()
        driver.feed(.received(.ready(nanoseconds: 5)))
        #expect(driver.commands.last == .commitWithin(attempt: 1, nanoseconds: Standstill.limit - 3_000_000))
    }

    @Test("a guest that was paused waits for nothing, and arrives however long it takes")
    func paused() {
        var driver = Standstill()
        driver.feed(.guestStopped(wasRunning: false))
        driver.collect()
        driver.sendLast()
        driver.save()
        driver.feed(.received(.ready(nanoseconds: 5)), after: 1_000_000_000)
        #expect(driver.commands.last == .commitWithin(attempt: 1, nanoseconds: .max))
    }

    @Test("too many pages in the last collection: the guest runs on at once, nothing is sent of a lost cause")
    func tooManyPages() {
        var driver = Standstill()
        driver.stop()
        let actions = driver.feed(.collected(remainingPages: 100_000))
        #expect(actions.contains(.resumeGuest))
        #expect(!actions.contains { if case .sendRound = $0 { true } else { false } })
    }

    @Test("with QEMU the check comes before END, behind a PING that tells whether the last pages arrived")
    func qemu() {
        var driver = Standstill(godwit: false)
        driver.stop()
        driver.collect()
        driver.feed(.roundSent(RoundReport(pages: 30, bytes: 123_120, nanoseconds: 1_000_000)), after: 1_000_000)
        #expect(driver.core.phase == .confirming)
        var late = driver
        driver.feed(.received(.pong(0x101)))
        driver.save()
        #expect(driver.core.phase == .committed && !driver.core.mayRun)
        late.feed(.received(.pong(0x101)), after: 20_000_000)
        #expect(late.actions.contains(.resumeGuest) && late.core.mayRun)
        late.reachNextStandstill()
        #expect(late.core.phase == .stoppingGuest)
    }

    @Test("with switchover-ack the guest is not stopped before the destination said that it may be")
    func acknowledgement() {
        var driver = Standstill(awaitsAcknowledgement: true)
        #expect(driver.core.phase == .resting)
        driver.reachNextStandstill()
        #expect(driver.core.phase != .stoppingGuest && !driver.actions.contains(.stopGuest))
        driver.feed(.received(.switchoverAcknowledged))
        driver.reachNextStandstill()
        #expect(driver.core.phase == .stoppingGuest)
    }

    @Test("a Godwit that knows no retraction gets END before its state, and COMMIT without a time")
    func oldPeer() {
        var driver = Standstill(features: [.twoPhaseHandover, .pageBatches])
        driver.prepare()
        driver.feed(.received(.ready(nanoseconds: 5)), after: 100_000_000)
        #expect(driver.commands.last == .commit)
    }
}
