import Migration
import MigrationStream
import Testing

/// A destination core with what it did so far; connection 1 is the source's.
private struct Driver: DestinationDriver {
    var core: DestinationCore
    var actions: [DestinationAction] = []
    static let id = ConnectionID(1)
    static let migration = MigrationIdentifier(high: 1, low: 2)

    init(features: FeatureSet = .all, startsGuest: Bool = true) {
        core = DestinationCore(
            DestinationConfiguration(
                instance: MigrationIdentifier(high: 5, low: 6), machineName: "m",
                sections: [
                    ExpectedSection(name: "cpu"), ExpectedSection(name: "cpu", instance: 1),
                    ExpectedSection(name: "timer", required: false),
                ],
                startsGuest: startsGuest, features: features))
    }

    mutating func open() {
        feed(.accepted(Self.id, answers: true))
        items(.header, .configuration(machine: "m"), .command(.openReturnPath), .command(.ping(Wire.godwitPing)))
    }

    mutating func receiveRAM(godwit: Bool = true) {
        open()
        if godwit { items(.command(.begin(Self.migration, .all.subtracting(.resumption)))) }
        items(
            .ramSetup([]), .ramSectionEnded(.start), .ramRound(final: false), .ramSectionEnded(.part),
            .ramRound(final: true), .ramSectionEnded(.end))
    }

    static func device(_ name: String, _ instance: UInt32 = 0, body: [UInt8] = [1]) -> StreamItem {
        .device(SectionHead(type: .full, id: 9, name: name, instance: instance, version: 1), body: body)
    }

    static func state(_ name: String) -> StreamItem {
        device("globalstate", body: GlobalState(runState: name).section.body)
    }

    mutating func receiveState(godwit: Bool = true, runState: String = "running") {
        receiveRAM(godwit: godwit)
        items(Self.device("cpu"), Self.device("cpu", 1), Self.state(runState))
    }

    mutating func reachReady() {
        receiveState()
        items(.command(.prepare))
        feed(.stateLoaded(nanoseconds: 7))
    }

    var deadline: DestinationEvent {
        let timers = actions.compactMap { action -> ProtocolTimer? in
            if case .setTimer(let timer, _) = action, timer.kind == .deadline { timer } else { nil }
        }
        return .timer(timers.last ?? ProtocolTimer(kind: .deadline, generation: 0))
    }

    var starts: [Bool] { actions.compactMap { if case .startGuest(let running, _) = $0 { running } else { nil } } }
}

@Suite("Destination core")
struct ProtocolDestinationTests {
    @Test("between two Godwits the guest starts on COMMIT, and not a moment before")
    func twoPhase() {
        var driver = Driver()
        driver.reachReady()
        #expect(driver.starts.isEmpty)
        driver.items(.command(.commit))
        #expect(driver.starts == [true])
        driver.feed(.guestStarted(nanoseconds: 9))
        #expect(
            driver.said(on: Driver.id) == [
                .hello(version: 1, features: .all, instance: MigrationIdentifier(high: 5, low: 6)),
                .pong(Wire.godwitPing), .ready(nanoseconds: 7), .started(nanoseconds: 9), .shut(0),
            ])
        #expect(driver.outcome == .completed)
        #expect(!driver.actions.contains(.close(Driver.id)), "closing first could destroy what was said last")
        driver.items(.endOfStream, .vmDescription(byteCount: 5))
        #expect(driver.feed(.disconnected(Driver.id, "closed")).contains(.close(Driver.id)))
    }

    @Test("from a QEMU source the guest starts when everything was loaded after EOF")
    func qemu() {
        var driver = Driver()
        driver.receiveState(godwit: false)
        driver.items(.endOfStream)
        #expect(driver.starts.isEmpty)
        driver.feed(.stateLoaded(nanoseconds: 7), .guestStarted(nanoseconds: 9))
        #expect(driver.starts == [true])
        #expect(driver.said(on: Driver.id).last == .shut(0))
        #expect(driver.core.rule == .qemu)
    }

    @Test("a QEMU source that takes its connection back before the acknowledgement runs on, so nothing starts here")
    func qemuTakesBack() {
        var driver = Driver()
        driver.receiveState(godwit: false)
        driver.items(.endOfStream)
        driver.feed(.disconnected(Driver.id, "closed"), .stateLoaded(nanoseconds: 7))
        #expect(driver.starts.isEmpty)
    }

    @Test("a one-way stream that ends after EOF is complete")
    func oneWay() {
        var driver = Driver()
        driver.feed(.accepted(Driver.id, answers: false))
        driver.items(
            .header, .configuration(machine: "m"), .ramSetup([]), .ramRound(final: true), .ramSectionEnded(.end))
        driver.items(Driver.device("cpu"), Driver.device("cpu", 1), .endOfStream)
        driver.feed(
            .disconnected(Driver.id, "end of file"), .stateLoaded(nanoseconds: 1), .guestStarted(nanoseconds: 1))
        #expect(driver.starts == [true])
        #expect(driver.core.rule == .oneWay)
        #expect(driver.said(on: Driver.id).isEmpty)
    }

    @Test("a paused guest stays paused, and so does any guest where the operator wants it")
    func paused() {
        var driver = Driver()
        driver.receiveState(runState: "paused")
        driver.items(.command(.prepare))
        driver.feed(.stateLoaded(nanoseconds: 7))
        driver.items(.command(.commit))
        #expect(driver.starts == [false])
        var waiting = Driver(startsGuest: false)
        waiting.reachReady()
        waiting.items(.command(.commit))
        #expect(waiting.starts == [false])
    }

    @Test("state that is incomplete, double, unknown or unreadable is refused by name, and nothing is loaded")
    func state() {
        let cases: [([StreamItem], String)] = [
            ([Driver.device("cpu"), .command(.prepare)], "'cpu' instance 1"),
            ([Driver.device("cpu"), Driver.device("cpu")], "'cpu' instance 0 came twice"),
            ([Driver.device("disk", 3)], "'disk' instance 3 does not exist"),
            ([Driver.device("globalstate", body: [1])], "'globalstate' holds no run state"),
            ([Driver.state("running"), Driver.state("running")], "'globalstate' came twice"),
        ]
        for (items, words) in cases {
            var driver = Driver()
            driver.receiveRAM()
            for item in items { driver.items(item) }
            guard case .failed(let reason)? = driver.outcome else {
                Issue.record("\(words): \(String(describing: driver.outcome))")
                continue
            }
            #expect(reason.contains(words))
            #expect(driver.said(on: Driver.id).last == .failure(reason: reason))
            #expect(!driver.actions.contains { if case .loadState = $0 { true } else { false } })
        }
    }

    @Test("what comes out of turn is refused in every phase")
    func outOfTurn() {
        let bad: [StreamItem] = [
            .command(.commit), .command(.prepare), .endOfStream, .ramRound(final: false), Driver.device("cpu"), .header,
            .configuration(machine: "m"), .command(.settle(Driver.migration)), .page(block: 0, offset: 0),
        ]
        for item in bad {
            var driver = Driver()
            driver.open()
            driver.items(.command(.begin(Driver.migration, .all.subtracting(.resumption))), item)
            #expect(driver.core.phase == .waiting, "\(item)")
            #expect(driver.starts.isEmpty)
        }
        for item in bad where item != .command(.commit) {
            var driver = Driver()
            driver.reachReady()
            driver.items(item)
            #expect(driver.core.phase == .failed, "\(item)")
            driver.items(.command(.commit))
            #expect(driver.starts.isEmpty)
        }
    }

    @Test("a destination whose memory was not touched waits for another source, one whose memory was does not")
    func reuse() {
        var driver = Driver()
        driver.open()
        driver.feed(.rejected(Driver.id, "garbage"))
        #expect(driver.outcome == .waitsForAnother("garbage"))
        let second = ConnectionID(2)
        driver.feed(.accepted(second, answers: true))
        driver.items(.header, .configuration(machine: "m"), .ramSetup([]), .ramRound(final: false), from: second)
        #expect(driver.core.acceptsPages(on: second))
        driver.feed(.disconnected(second, "reset"))
        #expect(driver.outcome == .failed("the source is lost: reset"))
        #expect(driver.core.phase == .failed)
    }

    @Test("where no second source can come, the end of the only connection is the end", arguments: [false, true])
    func lastChance(isEarly: Bool) {
        var driver = Driver()
        driver.feed(.accepted(Driver.id, answers: false))
        if isEarly { driver.feed(.noFurtherConnection) }
        #expect(driver.core.phase == .waiting)
        driver.feed(.rejected(Driver.id, "garbage"))
        if !isEarly { driver.feed(.noFurtherConnection) }
        #expect(driver.outcome == .failed("garbage"))
        #expect(driver.core.status == .failed)

        driver = Driver()
        driver.open()
        if isEarly { driver.feed(.noFurtherConnection) }
        driver.feed(.rejected(Driver.id, "other garbage"))
        if !isEarly { driver.feed(.noFurtherConnection) }
        #expect(driver.outcome == .failed("other garbage"))
    }

    @Test("strangers who say nothing give way, the oldest first, to a source that comes last")
    func silentStrangers() {
        var driver = Driver()
        for number in 0..<UInt64(500) { driver.feed(.accepted(ConnectionID(100 + number), answers: true)) }
        let closed = driver.actions.compactMap { action -> UInt64? in
            guard case .close(let id) = action else { return nil }
            return id.rawValue
        }
        #expect(!closed.isEmpty && closed == (0..<UInt64(closed.count)).map { 100 + $0 })
        driver.open()
        #expect(driver.core.phase == .opened && !driver.actions.contains(.close(Driver.id)))
    }

    @Test("a stranger does not keep the real source out")
    func strangers() {
        var driver = Driver()
        for id in 10..<94 as Range<UInt64> { driver.feed(.accepted(ConnectionID(id), answers: true)) }
        #expect(driver.actions.count { if case .turnedAway = $0 { true } else { false } } == 12)
        for id in 10..<82 as Range<UInt64> { driver.feed(.rejected(ConnectionID(id), "no stream")) }
        driver.reachReady()
        driver.feed(.accepted(ConnectionID(40), answers: true))
        driver.items(.header, .configuration(machine: "m"), from: ConnectionID(40))
        #expect(driver.said(on: ConnectionID(40)) == [.failure(reason: "another migration is here already")])
        driver.items(.command(.commit))
        #expect(driver.starts == [true])
    }

    @Test("another machine is refused by both names")
    func machine() {
        var driver = Driver()
        driver.feed(.accepted(Driver.id, answers: true))
        driver.items(.header, .configuration(machine: "pc"))
        let reason = "the source is a 'pc' machine, this one is 'm'"
        #expect(driver.said(on: Driver.id) == [.failure(reason: reason)])
        #expect(driver.actions.contains(.turnedAway(Driver.id, reason)))
        #expect(driver.core.phase == .waiting)
    }

    @Test("a ready destination gives up at its deadline, and then never starts")
    func readyDeadline() {
        var driver = Driver()
        driver.reachReady()
        driver.feed(driver.deadline)
        driver.items(.command(.commit))
        #expect(driver.starts.isEmpty)
        driver.feed(.accepted(ConnectionID(2), answers: true))
        driver.items(.header, .command(.settle(Driver.migration)), from: ConnectionID(2))
        #expect(driver.said(on: ConnectionID(2)) == [.verdict(.neverStarted)])
    }

    @Test("SETTLE is answered according to what happened, and ends a wait for COMMIT for good")
    func settle() {
        let asker = ConnectionID(2)
        var ready = Driver()
        ready.reachReady()
        ready.feed(.accepted(asker, answers: true))
        var starting = ready
        ready.items(.header, .command(.settle(Driver.migration)), from: asker)
        #expect(ready.said(on: asker) == [.verdict(.neverStarted)])
        ready.items(.command(.commit))
        #expect(ready.starts.isEmpty)

        starting.items(.command(.commit))
        starting.items(.header, .command(.settle(Driver.migration)), from: asker)
        #expect(starting.said(on: asker).isEmpty, "the start is under way")
        var failing = starting
        starting.feed(.guestStarted(nanoseconds: 1))
        #expect(starting.said(on: asker) == [.verdict(.started)])
        failing.feed(.startFailed("no"))
        #expect(failing.said(on: asker) == [.verdict(.neverStarted)])
        #expect(failing.said(on: Driver.id).last == .failure(reason: "no"))

        starting.feed(.accepted(ConnectionID(3), answers: true))
        starting.items(.header, .command(.settle(MigrationIdentifier(high: 9, low: 9))), from: ConnectionID(3))
        #expect(starting.said(on: ConnectionID(3)) == [.verdict(.unknown)])
    }

    @Test("a migration that was given up cannot begin again")
    func noSecondBegin() {
        var driver = Driver()
        driver.open()
        driver.items(.command(.begin(Driver.migration, .all.subtracting(.resumption))))
        driver.feed(.disconnected(Driver.id, "reset"))
        let second = ConnectionID(2)
        driver.feed(.accepted(second, answers: true))
        driver.items(
            .header, .configuration(machine: "m"), .command(.openReturnPath), .command(.ping(Wire.godwitPing)),
            .command(.begin(Driver.migration, .all.subtracting(.resumption))), from: second)
        guard case .waitsForAnother(let reason)? = driver.outcome else {
            Issue.record("\(String(describing: driver.outcome))")
            return
        }
        #expect(reason.contains("cannot begin again"))
    }

    @Test("the source's CANCEL ends it without an answer")
    func cancel() {
        var driver = Driver()
        driver.receiveRAM()
        driver.items(.command(.cancel(reason: "changed my mind")))
        #expect(driver.outcome == .failed("the source cancelled: changed my mind"))
        #expect(!driver.said(on: Driver.id).contains { if case .failure = $0 { true } else { false } })
    }

    @Test("a failed load or page ends it with FAILURE")
    func loadFails() {
        var driver = Driver()
        driver.receiveState()
        driver.items(.command(.prepare))
        driver.feed(.loadFailed("cpu: bad MSR"))
        #expect(driver.said(on: Driver.id).last == .failure(reason: "cpu: bad MSR"))
        driver.feed(.stateLoaded(nanoseconds: 1))
        #expect(driver.starts.isEmpty)
        var pages = Driver()
        pages.receiveRAM()
        pages.feed(.pagesFailed("no memory"))
        #expect(pages.outcome == .failed("no memory"))
    }
}
