import MigrationStream
import Testing

@testable import Migration

/// A source core whose guest may move before its memory, with what it said so far.
private struct Driver: SourceDriver {
    var core: SourceCore
    var actions: [SourceAction] = []

    init(preempts: Bool = false) {
        core = SourceCore(.withPostcopy(PostcopyTerms(usesUrgentChannel: preempts)))
    }

    static let pong = SourceEvent.received(.pong(Wire.godwitPing))
    static let arrived = SourceEvent.received(.pong(3))
    static let cpu = DeviceSection(name: "cpu", version: 1, body: [1, 2, 3])
    static let round = SourceEvent.roundSent(
        RoundReport(pages: 16, bytes: 6000, nanoseconds: 1_000_000, interrupted: true))

    /// The first round is under way.
    mutating func reachRound() {
        feed(.start, .connected(.bothWays), Self.pong, .trackingStarted, .collected(remainingPages: 256))
    }

    /// The guest stands still, DISCARD is on its way.
    mutating func reachDiscarding() {
        reachRound()
        feed(.startPostcopy, Self.round, .collected(remainingPages: 240), .guestStopped(wasRunning: true))
        feed(.collected(remainingPages: 241))
    }

    mutating func reachPackage() {
        reachDiscarding()
        feed(.stateSaved([Self.cpu]), .discardsSent)
    }

    var package: [UInt8]? {
        actions.compactMap { if case .sendPackage(let bytes) = $0 { bytes } else { nil } }.last
    }

    var pauses: [String] { actions.compactMap { if case .paused(let sentence) = $0 { sentence } else { nil } } }

    var deadline: SourceEvent {
        let timers = actions.compactMap { action -> ProtocolTimer? in
            if case .setTimer(let timer, _) = action, timer.kind == .deadline { timer } else { nil }
        }
        return .timer(timers.last ?? ProtocolTimer(kind: .deadline, generation: 0))
    }
}

@Suite("Source core of postcopy")
struct ProtocolPostcopySourceTests {
    @Test(
        "the guest stops after the round under way, however much is left, and its right to run goes before the package")
    func order() throws {
        var driver = Driver()
        driver.reachPackage()
        let actions = driver.actions
        let stop = try #require(actions.firstIndex(of: .stopGuest))
        let discards = try #require(actions.firstIndex(of: .sendDiscards))
        let right = try #require(actions.firstIndex(of: .giveUpRightToRun))
        let package = try #require(actions.firstIndex { if case .sendPackage = $0 { true } else { false } })
        let serve = try #require(actions.firstIndex(of: .servePages))
        #expect(stop < discards && discards < right && right < package && package < serve)
        #expect(!actions.contains { if case .sendRound(true, _, _) = $0 { true } else { false } })
        #expect(!driver.core.mayRun)
        driver.feed(.packageSent, Driver.arrived, .pagesServed)
        #expect(driver.feed(.received(.shut(0))).contains(.finished(.completed)))
        #expect(driver.reported == [.setup, .active, .postcopyDevice, .postcopyActive, .completed])
    }

    @Test(
        "behind a round the destination forgets much while the guest runs, and only what is written meanwhile when it stands still"
    )
    func forgetsAhead() throws {
        var driver = Driver()
        driver.reachRound()
        driver.feed(.startPostcopy, Driver.round)
        let ahead = driver.feed(.collected(remainingPages: 256))
        #expect(ahead.contains(.sendDiscards) && !driver.actions.contains(.stopGuest))
        let before = driver.actions.count
        // It went out, which says nothing of the destination.
        driver.feed(.discardsSent)
        #expect(driver.actions.count == before)
        driver.feed(.received(.pong(2)))
        #expect(driver.feed(.collected(remainingPages: 300)).contains(.stopGuest))
        driver.feed(.guestStopped(wasRunning: true))
        #expect(driver.feed(.collected(remainingPages: 310)).contains(.sendDiscards))
        driver.feed(.stateSaved([Driver.cpu]))
        #expect(driver.package == nil)
        driver.feed(.discardsSent)
        #expect(driver.package != nil && !driver.core.mayRun)
        #expect(driver.actions.count { $0 == .sendDiscards } == 2)
    }

    @Test(
        "a destination that has nothing to forget, or hardly anything, is told when the guest stands still",
        arguments: [0, 16] as [UInt64])
    func nothingToForget(sent: UInt64) {
        var driver = Driver()
        driver.reachRound()
        let round = RoundReport(pages: sent, bytes: 6000, nanoseconds: 1_000_000, interrupted: true)
        let left: UInt64 = sent == 0 ? 256 : 255
        #expect(driver.feed(.startPostcopy, .roundSent(round), .collected(remainingPages: left)).contains(.stopGuest))
        #expect(!driver.actions.contains(.sendDiscards))
    }

    @Test(
        "what the guest writes while the destination forgets for long is forgotten in another turn, and no third",
        arguments: [(60, 2), (60, 60), (1, 1)] as [(UInt64, UInt64)])
    func turns(first: UInt64, later: UInt64) {
        var driver = Driver()
        driver.reachRound()
        driver.feed(.startPostcopy, Driver.round)
        var (now, turns) = (0, 0) as (UInt64, Int)
        while turns < 10 {
            let actions = driver.feed(.collected(remainingPages: 300), at: now)
            guard actions.contains(.sendDiscards) else { break }
            now += (turns == 0 ? first : later) * 1_000_000
            turns += 1
            driver.feed(.discardsSent, .received(.pong(2)), at: now)
        }
        #expect(turns == (first == 1 ? 1 : 2))
        #expect(driver.actions.contains(.stopGuest) && driver.core.mayRun)
    }

    @Test("what happens while the destination forgets leaves the guest running here")
    func failsWhileForgetting() {
        for event in [.disconnected("reset"), .trackingFailed("no memory"), .cancel, .received(.shut(1))]
            as [SourceEvent]
        {
            var driver = Driver()
            driver.reachRound()
            driver.feed(.startPostcopy, Driver.round, .collected(remainingPages: 256), event)
            #expect(driver.core.mayRun && !driver.actions.contains(.stopGuest), "\(event)")
            #expect([.failed, .cancelled].contains(driver.core.status), "\(event)")
        }
    }

    @Test("without a word of the operator's it stays precopy")
    func staysPrecopy() {
        var driver = Driver()
        driver.reachRound()
        driver.feed(.roundSent(RoundReport(pages: 256, bytes: 6000, nanoseconds: 1_000_000)))
        driver.feed(.collected(remainingPages: 0), .guestStopped(wasRunning: true), .collected(remainingPages: 0))
        driver.feed(.roundSent(RoundReport(pages: 0, bytes: 0, nanoseconds: 10)), .stateSaved([Driver.cpu]))
        driver.feed(.received(.shut(0)))
        #expect(driver.outcome == .completed)
        #expect(!driver.actions.contains(.sendDiscards))
    }

    @Test(
        "both the state and DISCARD are awaited before the guest is let go, in whatever order they come",
        arguments: [false, true])
    func awaitsBoth(stateFirst: Bool) {
        var driver = Driver()
        driver.reachDiscarding()
        driver.feed(stateFirst ? .stateSaved([Driver.cpu]) : .discardsSent)
        #expect(driver.core.mayRun && driver.package == nil)
        driver.feed(stateFirst ? .discardsSent : .stateSaved([Driver.cpu]))
        #expect(!driver.core.mayRun && driver.package != nil)
    }

    @Test("whatever goes wrong before the package has left, the guest runs on here")
    func failsEarly() {
        let failures: [(reach: (inout Driver) -> Void, event: SourceEvent)] = [
            ({ $0.reachDiscarding() }, .disconnected("reset")), ({ $0.reachDiscarding() }, .stateFailed("no state")),
            ({ $0.reachDiscarding() }, .trackingFailed("no memory")), ({ $0.reachDiscarding() }, .cancel),
            ({ $0.reachDiscarding() }, .received(.shut(1))), ({ $0.reachPackage() }, .packageCut("reset")),
        ]
        for failure in failures {
            var driver = Driver()
            failure.reach(&driver)
            driver.feed(failure.event)
            #expect(driver.actions.contains(.resumeGuest) && driver.core.mayRun, "\(failure.event)")
            #expect([.failed, .cancelled].contains(driver.core.status), "\(failure.event)")
        }
    }

    @Test("a loss while the package leaves is judged by whether its end left", arguments: [false, true])
    func lossDuringPackage(left: Bool) {
        var driver = Driver()
        driver.reachPackage()
        #expect(driver.feed(.disconnected("reset")).isEmpty)
        let then = driver.feed(left ? .packageSent : .packageCut("broken pipe"))
        #expect(then.contains(.resumeGuest) == !left)
        #expect(driver.core.status == (left ? .unsettled : .failed))
    }

    @Test("once the destination has the state, nothing brings the guest back; a loss pauses")
    func lossAfterwards() {
        let losses: [SourceEvent] = [
            .disconnected("reset"), .received(.shut(1)), .received(.ready(nanoseconds: 1)), .received(.shut(0)),
        ]
        for loss in losses {
            var driver = Driver()
            driver.reachPackage()
            driver.feed(Driver.arrived, .packageSent)
            #expect(driver.core.status == .postcopyActive)
            driver.feed(loss)
            #expect(driver.core.status == .postcopyPaused, "\(loss)")
            #expect(driver.feed(.cancel).contains { if case .refused = $0 { true } else { false } })
            #expect(driver.feed(.resume).contains(.connect))
            #expect(!driver.actions.contains(.resumeGuest) && !driver.core.mayRun && driver.outcome == nil)
        }
        var driver = Driver()
        driver.reachPackage()
        driver.feed(Driver.arrived, .packageSent, .pagesServed)
        driver.feed(driver.deadline)
        #expect(driver.core.status == .postcopyPaused)
    }

    @Test(
        "a source that lost the last word says how to find out whether the destination is complete, until pages are sent again"
    )
    func lastWordLost() {
        var driver = Driver()
        driver.reachPackage()
        driver.feed(Driver.arrived, .packageSent)
        var lostBefore = driver
        lostBefore.feed(.disconnected("reset"))
        #expect(lostBefore.pauses.last?.contains("what is missing of its memory stays here") == true)
        driver.feed(.pagesServed, .disconnected("reset"))
        // The destination listens no more if it is complete.
        driver.feed(.resume, .connectFailed("connection refused"))
        #expect(driver.pauses.count == 2)
        for sentence in driver.pauses {
            #expect(sentence.contains("every page was sent") && sentence.contains("ask it with query-migrate"))
            #expect(sentence.contains("if it says 'completed', quit here"))
            #expect(!sentence.contains("is missing"))
        }
        // It was not complete.
        driver.feed(.resume, .connected(.bothWays), .received(.postcopy(.bitmapEnded(block: "ram"))))
        driver.feed(.received(.postcopy(.resumeAcknowledged)), .disconnected("reset"))
        #expect(driver.pauses.count == 3)
        #expect(driver.pauses.last?.contains("what is missing of its memory stays here") == true)
    }

    @Test("the package's sender was stuck, so the guest is in doubt; that its end never left ends the doubt")
    func cutInDoubt() {
        var driver = Driver()
        driver.reachPackage()
        driver.feed(driver.deadline)
        #expect(driver.core.status == .unsettled && !driver.core.mayRun)
        var left = driver
        #expect(left.feed(.packageSent).isEmpty && left.core.status == .unsettled)
        #expect(driver.feed(.packageCut("cancelled")).contains(.resumeGuest))
        #expect(driver.core.status == .failed && driver.core.mayRun)
        var settled = left
        settled.feed(.settle(.startedThere))
        #expect(settled.feed(.packageCut("cancelled")).isEmpty && !settled.core.mayRun)
    }

    @Test("a destination that gives up while the package leaves has not the guest, whatever became of the package")
    func shutOneEarly() {
        for end in [SourceEvent.packageSent, .packageCut("reset")] {
            var driver = Driver()
            driver.reachPackage()
            #expect(driver.feed(.received(.shut(1))).isEmpty)
            driver.feed(.disconnected("reset"))
            #expect(driver.feed(end).contains(.resumeGuest) && driver.core.status == .failed, "\(end)")
        }
    }

    @Test(
        "to a QEMU the downtime limit does not bind a move, nor when an operator's hold has ended: it hears no RETRACT")
    func unbound() {
        for holds in [false, true] {
            var driver = Driver()
            driver.core.configuration.pausesBeforeSwitchover = holds
            driver.core.configuration.switchover.downtimeLimitNanoseconds = 1_000_000
            driver.reachRound()
            driver.feed(.startPostcopy, Driver.round, .collected(remainingPages: 240), .guestStopped(wasRunning: true))
            if holds { driver.feed(.proceed) }
            var actions = driver.core.handle(.collected(remainingPages: 241), at: 2_000_000)
            #expect(driver.core.phase == .discarding, "hold \(holds)")
            actions += driver.core.handle(.stateSaved([Driver.cpu]), at: 3_000_000)
            actions += driver.core.handle(.discardsSent, at: 4_000_000)
            #expect(actions.contains(.giveUpRightToRun) && driver.core.phase == .packageLeaving, "hold \(holds)")
        }
    }

    @Test("answers to nothing, without end, pause it like any other nonsense")
    func endlessTalk() {
        var driver = Driver()
        driver.reachPackage()
        driver.feed(.packageSent, Driver.arrived)
        for _ in 0..<100 { driver.feed(.received(.pong(7))) }
        #expect(driver.core.status == .postcopyPaused)
    }

    @Test("a destination that says it could not run the guest gives it back, but not one that had its state")
    func shutOne() {
        var driver = Driver()
        driver.reachPackage()
        driver.feed(.packageSent)
        #expect(driver.feed(.received(.shut(1))).contains(.resumeGuest))
        #expect(driver.core.status == .failed)
    }

    @Test("the guest does not stop before the channel for requested pages is there")
    func awaitsChannel() {
        var driver = Driver(preempts: true)
        driver.reachRound()
        #expect(driver.actions.contains(.openUrgentChannel))
        driver.feed(.startPostcopy, Driver.round, .collected(remainingPages: 240))
        #expect(!driver.actions.contains(.stopGuest))
        #expect(driver.feed(.urgentChannelOpened).contains(.collect(final: false)))
        #expect(driver.feed(.collected(remainingPages: 240)).contains(.stopGuest))

        var failing = Driver(preempts: true)
        failing.reachRound()
        failing.feed(.startPostcopy, Driver.round, .collected(remainingPages: 240))
        failing.feed(.urgentChannelFailed("connection refused"))
        #expect(failing.core.status == .failed && !failing.actions.contains(.stopGuest))
    }

    @Test(
        "where it cannot be done, the migration ends before anything moves, in a sentence",
        arguments: ["godwit", "one-way"])
    func refused(where what: String) {
        var driver = Driver()
        driver.feed(.start)
        if what == "godwit" {
            driver.feed(
                .connected(.bothWays),
                .received(.hello(version: 1, features: .all, instance: MigrationIdentifier(high: 3, low: 4))),
                Driver.pong)
        } else {
            driver.feed(.connected(.oneWay))
        }
        guard case .failed(let reason)? = driver.outcome else { return #expect(Bool(false), "\(driver.core.phase)") }
        #expect(reason.hasPrefix("postcopy-ram: ") && !driver.actions.contains(.startTracking))
    }

    @Test("migrate-start-postcopy is refused in QEMU's words where there is nothing to start")
    func refusals() {
        var core = SourceCore(
            SourceConfiguration(migration: MigrationIdentifier(high: 1, low: 2), machineName: "m", blocks: []))
        #expect(
            core.handle(.startPostcopy) == [
                .refused("Enable postcopy with migrate_set_capability before the start of migration")
            ])
        var driver = Driver()
        let words = SourceAction.refused("Postcopy must be started after migration has been started")
        #expect(driver.feed(.startPostcopy) == [words])
        driver.reachRound()
        driver.feed(.cancel)
        #expect(driver.feed(.startPostcopy) == [words])
    }
}
