import Migration
import MigrationStream
import Testing

/// A destination core that a QEMU source may move to by postcopy; connection 1 is the source's.
private struct Driver: DestinationDriver {
    var core: DestinationCore
    var actions: [DestinationAction] = []
    static let id = ConnectionID(1)
    static let urgent = ConnectionID(2)
    static let discard = RAMDiscard(block: "ram", ranges: [.init(offset: 0, length: 8192)])

    init(allowsPostcopy: Bool = true) {
        core = DestinationCore(.withPostcopy(allowsPostcopy))
    }

    @discardableResult
    mutating func commands(_ commands: PostcopyCommand...) -> [DestinationAction] {
        var all: [DestinationAction] = []
        for command in commands { all += items(.command(.postcopy(command))) }
        return all
    }

    mutating func advise() {
        feed(.accepted(Self.id, answers: true))
        items(.header, .configuration(machine: "m"), .command(.openReturnPath), .command(.ping(1)))
        commands(.advise(PostcopyAdvice(blockPageSizes: 4096)))
    }

    mutating func receive() {
        advise()
        items(.ramSetup([]), .ramSectionEnded(.start), .ramRound(final: false), .ramSectionEnded(.part))
    }

    mutating func listen() {
        receive()
        commands(.discard(Self.discard), .packaged(byteCount: 9), .listen)
    }

    mutating func run() {
        listen()
        items(.device(SectionHead(type: .full, id: 9, name: "cpu", instance: 0, version: 1), body: [1]))
        items(.command(.ping(3)))
        commands(.run)
    }

    mutating func pull() {
        run()
        feed(.stateLoaded(nanoseconds: 1), .guestStarted(nanoseconds: 1))
    }

    mutating func sendAll() { items(.ramRound(final: true), .ramSectionEnded(.end), .endOfStream) }

    var said: [ReturnPathMessage] { Self.messages(in: actions) }
    /// What was set for visitors.
    func timers(of visitors: [ConnectionID]) -> [ProtocolTimer] {
        actions.compactMap { action in
            guard case .setTimer(let timer, _) = action, case .visitor(let visitor) = timer.kind else { return nil }
            return visitors.contains(visitor) ? timer : nil
        }
    }
    var starts: Int { actions.count { if case .startGuest = $0 { true } else { false } } }
}

/// What has no place where it comes.
private let outOfTurnCases: [(String, @Sendable (inout Driver) -> Void)] = [
    (
        "ADVISE twice",
        {
            $0.advise(); $0.commands(.advise(PostcopyAdvice(blockPageSizes: 4096)))
        }
    ),
    (
        "ADVISE behind the blocks",
        {
            $0.receive(); $0.commands(.advise(PostcopyAdvice(blockPageSizes: 4096)))
        }
    ),
    (
        "other page sizes",
        {
            $0.feed(.accepted(Driver.id, answers: true))
            $0.items(.header, .configuration(machine: "m"), .command(.openReturnPath))
            $0.commands(.advise(PostcopyAdvice(blockPageSizes: 0x20_1000)))
        }
    ),
    (
        "ADVISE without RAM",
        {
            $0.feed(.accepted(Driver.id, answers: true))
            $0.items(.header, .configuration(machine: "m"), .command(.openReturnPath))
            $0.commands(.advise(nil))
        }
    ),
    (
        "ADVISE without a way back",
        {
            $0.feed(.accepted(Driver.id, answers: true))
            $0.items(.header, .configuration(machine: "m"))
            $0.commands(.advise(PostcopyAdvice(blockPageSizes: 4096)))
        }
    ),
    (
        "LISTEN outside a package",
        {
            $0.receive(); $0.commands(.listen)
        }
    ),
    (
        "RUN without LISTEN",
        {
            $0.receive(); $0.commands(.packaged(byteCount: 9), .run)
        }
    ),
    (
        "DISCARD behind LISTEN",
        {
            $0.listen(); $0.commands(.discard(Driver.discard))
        }
    ),
    (
        "a second package",
        {
            $0.listen(); $0.commands(.packaged(byteCount: 9))
        }
    ),
    (
        "LISTEN twice",
        {
            $0.listen(); $0.commands(.listen)
        }
    ),
    (
        "pages behind DISCARD",
        {
            $0.receive(); $0.commands(.discard(Driver.discard)); $0.items(.ramRound(final: false))
        }
    ),
    (
        "RUN without a device",
        {
            $0.listen(); $0.commands(.run)
        }
    ),
    (
        "a recovery",
        {
            $0.receive(); $0.commands(.resume)
        }
    ),
    (
        "no userfaultfd",
        {
            $0.advise(); $0.feed(.pagesFailed("no"))
        }
    ),
    (
        "lost behind LISTEN",
        {
            $0.listen(); $0.feed(.disconnected(Driver.id, "gone"))
        }
    ),
    (
        "nonsense behind LISTEN",
        {
            $0.listen(); $0.feed(.rejected(Driver.id, "nonsense"))
        }
    ),
    (
        "EOF behind DISCARD, though RAM had ended before",
        {
            $0.receive(); $0.items(.ramRound(final: true), .ramSectionEnded(.end))
            $0.commands(.discard(Driver.discard))
            $0.items(
                .device(SectionHead(type: .full, id: 9, name: "cpu", instance: 0, version: 1), body: [1]), .endOfStream)
        }
    ),
    (
        "EOF behind LISTEN",
        {
            $0.listen(); $0.items(.endOfStream)
        }
    ),
]

@Suite("Destination core, postcopy")
struct ProtocolPostcopyTests {
    @Test("the guest starts at RUN, its memory comes behind, and only then all is over")
    func goesWell() {
        var driver = Driver()
        driver.run()
        #expect(driver.actions.contains(.preparePostcopy) && driver.actions.contains(.discardPages(Driver.discard)))
        #expect(driver.core.acceptsPages(on: Driver.id) && driver.core.isPulling)
        #expect(driver.starts == 0)
        driver.items(.command(.ping(4)), .ramRound(final: false), .ramSectionEnded(.part))
        driver.feed(.stateLoaded(nanoseconds: 1))
        #expect(driver.starts == 1)
        driver.feed(.guestStarted(nanoseconds: 1))
        #expect(driver.core.phase == .pulling && driver.outcome == nil)
        driver.sendAll()
        #expect(driver.actions.last == .finishPull(waits: true))
        #expect(!driver.said.contains(.shut(0)))
        driver.feed(.pullEnded(missing: 0))
        #expect(driver.core.phase == .started && driver.outcome == .completed)
        #expect(driver.said == [.pong(1), .pong(3), .pong(4), .shut(0)])
        #expect(driver.reported == [.setup, .active, .postcopyActive, .completed])
        driver.feed(.disconnected(Driver.id, "closed"))
        #expect(driver.core.phase == .started)
    }

    @Test("all pages may be here before the guest runs")
    func pagesFirst() {
        var driver = Driver()
        driver.run()
        driver.sendAll()
        driver.feed(.pullEnded(missing: 0))
        #expect(driver.outcome == nil && !driver.said.contains(.shut(0)))
        driver.feed(.stateLoaded(nanoseconds: 1), .guestStarted(nanoseconds: 1))
        #expect(driver.core.phase == .started && driver.outcome == .completed && driver.said.last == .shut(0))
    }

    @Test("a source that is lost when all pages are here, and the guest does not run yet, is not missed either")
    func pagesFirstAndSourceLost() {
        let losses: [DestinationEvent] = [
            .disconnected(Driver.id, "gone"), .rejected(Driver.id, "nonsense"),
            .item(Driver.id, .command(.postcopy(.packaged(byteCount: 9)))),
        ]
        for (number, loss) in losses.enumerated() {
            for isLoaded in [false, true] {
                var driver = Driver()
                driver.run()
                driver.sendAll()
                driver.feed(.pullEnded(missing: 0))
                if isLoaded { driver.feed(.stateLoaded(nanoseconds: 1)) }
                driver.feed(loss)
                if !isLoaded { driver.feed(.stateLoaded(nanoseconds: 1)) }
                driver.feed(.guestStarted(nanoseconds: 1))
                #expect(driver.core.phase == .started && driver.starts == 1, "loss \(number)")
                #expect(driver.outcome == .completed, "loss \(number)")
            }
        }
    }

    @Test("who loads state may wait for a page: there is no deadline once RUN was said")
    func slowLoading() {
        var driver = Driver()
        driver.run()
        let timers = driver.actions.compactMap { action -> ProtocolTimer? in
            if case .setTimer(let timer, _) = action, timer.kind == .deadline { timer } else { nil }
        }
        #expect(!timers.isEmpty)
        for timer in timers { driver.feed(.timer(timer)) }
        #expect(driver.core.phase == .loading && driver.outcome == nil)
    }

    @Test("postcopy that was advised and not begun ends like any migration")
    func notBegun() {
        var driver = Driver()
        driver.receive()
        driver.items(
            .ramRound(final: true), .ramSectionEnded(.end),
            .device(SectionHead(type: .full, id: 9, name: "cpu", instance: 0, version: 1), body: [1]), .endOfStream)
        driver.feed(.stateLoaded(nanoseconds: 1), .guestStarted(nanoseconds: 1))
        #expect(driver.outcome == .completed && driver.said.last == .shut(0))
    }

    @Test("what is out of turn fails before RUN, and the guest never starts")
    func outOfTurn() {
        for (name, act) in outOfTurnCases {
            var driver = Driver()
            act(&driver)
            #expect(driver.core.phase == .failed || driver.core.phase == .waiting, "\(name)")
            #expect(driver.outcome != nil && driver.outcome != .completed && driver.starts == 0, "\(name)")
            if driver.actions.contains(.listen) { #expect(driver.actions.contains(.endPostcopy), "\(name)") }
            driver.feed(.stateLoaded(nanoseconds: 1), .guestStarted(nanoseconds: 1), .pullEnded(missing: 0))
            #expect(driver.starts == 0 && driver.outcome != .completed, "\(name)")
        }
    }

    @Test("a destination that was not told of postcopy says what to do")
    func notAllowed() {
        var driver = Driver(allowsPostcopy: false)
        driver.advise()
        guard case .waitsForAnother(let reason)? = driver.outcome else {
            Issue.record("\(String(describing: driver.outcome))")
            return
        }
        #expect(reason.contains("set the capability postcopy-ram here before migrate-incoming"))
        #expect(driver.said.contains(.shut(1)))
    }

    @Test("once RUN was said, a lost source does not keep the guest from starting; what is missing is waited for")
    func lostBehindRun() {
        for moment in 0..<3 {
            var driver = Driver()
            driver.run()
            if moment > 0 { driver.feed(.stateLoaded(nanoseconds: 1)) }
            if moment > 1 { driver.feed(.guestStarted(nanoseconds: 1)) }
            driver.feed(moment == 0 ? .rejected(Driver.id, "nonsense") : .disconnected(Driver.id, "gone"))
            #expect(driver.actions.contains(.drop(Driver.id)) && driver.actions.contains(.finishPull(waits: false)))
            driver.feed(.pullEnded(missing: 5))
            if moment < 1 { driver.feed(.stateLoaded(nanoseconds: 1)) }
            if moment < 2 { driver.feed(.guestStarted(nanoseconds: 1)) }
            #expect(driver.core.phase == .pullPaused && driver.starts == 1 && driver.outcome == nil)
            #expect(driver.reported.last == .postcopyPaused)
            // Late words of the lost connection change nothing, nor does the operator's wish to give up.
            driver.items(.ramRound(final: false), .endOfStream)
            driver.feed(.giveUp, .discard)
            #expect(driver.core.phase == .pullPaused && driver.outcome == nil)
        }
    }

    @Test("a source that is lost when nothing is missing any more is not missed")
    func lostAtTheEnd() {
        var driver = Driver()
        driver.pull()
        driver.feed(.disconnected(Driver.id, "gone"), .pullEnded(missing: 0))
        #expect(driver.core.phase == .started && driver.outcome == .completed)
    }

    @Test("state that cannot be loaded fails, though RUN was said: the source hears so")
    func loadFails() {
        var driver = Driver()
        driver.run()
        driver.feed(.loadFailed("no"))
        #expect(driver.core.phase == .failed && driver.starts == 0 && driver.said.last == .shut(1))
        #expect(driver.actions.contains(.endPostcopy))
    }

    @Test("a source that says it sent all, and did not, leaves a guest that waits")
    func pagesMissing() {
        var driver = Driver()
        driver.pull()
        driver.sendAll()
        driver.feed(.pullEnded(missing: 7))
        #expect(driver.core.phase == .pullPaused && driver.outcome == nil && !driver.said.contains(.shut(0)))
    }

    // MARK: The channel for requested pages

    @Test("a connection without a greeting is the channel for requested pages, once, where postcopy was advised")
    func urgentChannel() {
        var driver = Driver()
        driver.feed(.accepted(Driver.urgent, answers: true))
        #expect(!driver.core.expectsUrgentChannel)
        driver.listen()
        #expect(driver.core.expectsUrgentChannel)
        driver.feed(.cameForUrgentPages(Driver.urgent))
        #expect(!driver.core.expectsUrgentChannel && driver.core.acceptsPages(on: Driver.urgent))
        let third = ConnectionID(3)
        #expect(driver.feed(.accepted(third, answers: true), .cameForUrgentPages(third)).contains(.close(third)))
    }

    @Test(
        "who may be that channel and says nothing has one deadline more when it is not, and none before",
        arguments: [false, true])
    func silentStrangers(isPaused: Bool) {
        var driver = Driver()
        driver.pull()
        let silent = [ConnectionID(7), ConnectionID(8)]
        driver.feed(.accepted(silent[0], answers: true), .accepted(silent[1], answers: true))
        for timer in driver.timers(of: silent) { #expect(driver.feed(.timer(timer)).isEmpty) }
        // Nothing wakes anybody up for them any more, whatever goes on meanwhile.
        driver.feed(.progressed(Driver.id), .accepted(Driver.urgent, answers: true))
        #expect(driver.timers(of: silent).count == 2)
        driver.feed(isPaused ? .disconnected(Driver.id, "gone") : .cameForUrgentPages(Driver.urgent))
        driver.feed(.progressed(Driver.id))
        let last = driver.timers(of: silent).dropFirst(2)
        #expect(last.map(\.kind) == silent.map { .visitor($0) })
        for timer in last { driver.feed(.timer(timer)) }
        #expect(silent.allSatisfy { driver.actions.contains(.close($0)) })
        #expect(driver.timers(of: silent).count == 4)
        #expect(driver.core.phase == (isPaused ? .pullPaused : .pulling))
    }

    @Test("it may say nothing for long before; its end behind the last page is no loss, and before it is")
    func silentUrgentChannel() {
        var driver = Driver()
        driver.feed(.accepted(Driver.urgent, answers: true))
        driver.receive()
        let timer = driver.actions.compactMap { action -> ProtocolTimer? in
            if case .setTimer(let timer, _) = action, timer.kind == .visitor(Driver.urgent) { timer } else { nil }
        }
        #expect(timer.count == 1)
        for timer in timer { #expect(!driver.feed(.timer(timer)).contains(.close(Driver.urgent))) }
        driver.commands(.discard(Driver.discard), .packaged(byteCount: 9), .listen)
        driver.feed(.cameForUrgentPages(Driver.urgent))
        var lost = driver
        lost.feed(.disconnected(Driver.urgent, "gone"))
        #expect(lost.core.phase == .failed, "the guest is not ours yet")
        driver.items(.device(SectionHead(type: .full, id: 9, name: "cpu", instance: 0, version: 1), body: [1]))
        driver.commands(.run)
        driver.feed(.stateLoaded(nanoseconds: 1), .guestStarted(nanoseconds: 1))
        lost = driver
        lost.feed(.disconnected(Driver.urgent, "gone"))
        #expect(lost.core.phase == .pullPaused && lost.actions.contains(.drop(Driver.id)))
        driver.feed(.urgentEnded(Driver.urgent))
        #expect(driver.core.phase == .pulling)
        driver.sendAll()
        driver.feed(.pullEnded(missing: 0))
        #expect(driver.outcome == .completed)
    }
}
