import Migration
import MigrationStream
import Testing

/// A source core with what it said so far.
private struct Driver {
    var core: SourceCore
    var actions: [SourceAction] = []
    var stream: [UInt8] = []

    init(pauses: Bool = false, features: FeatureSet = .all) {
        var catalogue = SectionCatalogue()
        catalogue.add("cpu", version: 1)
        core = SourceCore(
            SourceConfiguration(
                migration: MigrationIdentifier(high: 1, low: 2), machineName: "m",
                blocks: [RAMBlockDescription(name: "ram", length: 1 << 20)], catalogue: catalogue,
                pausesBeforeSwitchover: pauses, features: features))
    }

    /// Feeds events and returns the actions of all of them.
    @discardableResult
    mutating func feed(_ events: SourceEvent...) -> [SourceAction] {
        var all: [SourceAction] = []
        for event in events { all += core.handle(event) }
        for case .send(let bytes) in all { stream += bytes }
        actions += all
        return all
    }

    static let hello = SourceEvent.received(
        .hello(version: 1, features: .all, instance: MigrationIdentifier(high: 3, low: 4)))
    static let pong = SourceEvent.received(.pong(Wire.godwitPing))
    static let cpu = DeviceSection(name: "cpu", version: 1, body: [1, 2, 3])
    static let round = SourceEvent.roundSent(RoundReport(pages: 256, bytes: 60_000, nanoseconds: 1_000_000))

    /// Up to the first round under way.
    mutating func reachRound(godwit: Bool = true) {
        feed(.start, .connected(.bothWays))
        if godwit { feed(Self.hello) }
        feed(Self.pong, .trackingStarted, .collected(remainingPages: 256))
    }

    /// Up to saved state.
    mutating func reachSavedState(godwit: Bool = true) {
        reachRound(godwit: godwit)
        feed(Self.round, .collected(remainingPages: 3), .guestStopped(wasRunning: true), .collected(remainingPages: 3))
        feed(.roundSent(RoundReport(pages: 3, bytes: 12312, nanoseconds: 5000)), .stateSaved([Self.cpu]))
    }

    var reports: [MigrationStatus] {
        actions.compactMap { if case .report(let status) = $0 { status } else { nil } }
    }

    var outcome: SourceOutcome? {
        actions.compactMap { if case .finished(let outcome) = $0 { outcome } else { nil } }.last
    }

    var deadline: SourceEvent {
        let timers = actions.compactMap { action -> ProtocolTimer? in
            if case .setTimer(let timer, _) = action, timer.kind == .deadline { timer } else { nil }
        }
        return .timer(timers.last ?? ProtocolTimer(kind: .deadline, generation: 0))
    }

    /// The items of the stream, without page records (no shell wrote any).
    func items() throws -> [StreamItem] {
        var decoder = StreamDecoder(
            .load(blocks: core.configuration.blocks, catalogue: core.configuration.catalogue))
        var buffer = ReceiveBuffer()
        buffer.append(stream)
        var items: [StreamItem] = []
        while let item = try decoder.next(from: &buffer) {
            items.append(item)
            if decoder.payloadBytes > 0 {
                buffer.consume(decoder.payloadBytes)
                decoder.payloadConsumed(decoder.payloadBytes)
            }
        }
        return items
    }
}

@Suite("Source core")
struct ProtocolSourceTests {
    @Test("the guest is stopped only when the destination has taken what the kernel still held")
    func drains() {
        var driver = Driver()
        driver.reachRound()
        let large = SourceEvent.roundSent(RoundReport(pages: 256, bytes: 1 << 20, nanoseconds: 1_000_000))
        let asked = driver.feed(large, .collected(remainingPages: 3))
        #expect(!asked.contains(.stopGuest))
        #expect(driver.core.phase == .draining)
        #expect(driver.feed(.received(.pong(2))).contains(.collect(final: false)))
        #expect(driver.feed(.collected(remainingPages: 5)).contains(.stopGuest))
    }

    @Test(
        "a destination that goes on answering what nobody asked is left, with the guest running; a few such words do no harm",
        arguments: [.pong(7), .pong(ResumptionMark(number: 5).pingValue), .switchoverAcknowledged]
            as [ReturnPathMessage])
    func endlessTalk(word: ReturnPathMessage) throws {
        var driver = Driver()
        driver.reachRound()
        for _ in 0..<60 { driver.feed(.received(word)) }
        #expect(driver.core.phase == .sendingRound)
        var words = 60
        while driver.core.phase == .sendingRound, words < 1000 {
            driver.feed(.received(word))
            words += 1
        }
        #expect(words < 100)
        driver.feed(.roundSent(RoundReport(pages: 1, bytes: 4104, nanoseconds: 1000, interrupted: true)))
        #expect(driver.outcome == .failed("the destination goes on answering what it was not asked"))
        #expect(driver.core.mayRun)
    }

    @Test("dirty pages are collected once before the first round, also where pages have places in a file")
    func firstCollect() {
        for isMapped in [false, true] {
            var configuration = Driver().core.configuration
            if isMapped {
                configuration.mapped = MappedRAMSetup(
                    machine: "m", uuid: nil, blocks: configuration.blocks, ramSectionID: 2, at: 0)
            }
            var core = SourceCore(configuration)
            let actions = [.start, .connected(.oneWay), .trackingStarted].flatMap { core.handle($0) }
            #expect(actions.count { $0 == .collect(final: false) } == 1)
            #expect(core.phase == .collecting)
        }
    }

    @Test("answers to as many PINGs as were said are never too many")
    func keptAlive() throws {
        var driver = Driver(pauses: true)
        driver.reachRound()
        driver.feed(Driver.round, .collected(remainingPages: 3), .guestStopped(wasRunning: true))
        for _ in 0..<1000 {
            let timers = driver.actions.compactMap { action -> ProtocolTimer? in
                if case .setTimer(let timer, _) = action, timer.kind == .keepAlive { timer } else { nil }
            }
            driver.feed(.timer(try #require(timers.last)), .received(.pong(1)))
            driver.actions = driver.actions.suffix(8)
        }
        #expect(driver.core.phase == .preSwitchover)
    }

    @Test("a destination that does not take what was sent ends the migration, with the guest running")
    func drainDeadline() {
        var driver = Driver()
        driver.reachRound()
        driver.feed(.roundSent(RoundReport(pages: 256, bytes: 1 << 20, nanoseconds: 1_000_000)))
        driver.feed(.collected(remainingPages: 3))
        driver.feed(driver.deadline)
        #expect(driver.outcome == .failed("the destination does not take what was sent"))
        #expect(!driver.actions.contains(.stopGuest))
    }

    @Test("between two Godwits the stream is the one the wire file draws")
    func twoPhaseStream() throws {
        var driver = Driver()
        driver.reachSavedState()
        driver.feed(.received(.ready(nanoseconds: 5)), .received(.started(nanoseconds: 6)), .received(.shut(0)))
        let items = try driver.items()
        let commands = items.compactMap { if case .command(let command) = $0 { command } else { nil } }
        #expect(
            commands == [
                .openReturnPath, .ping(Wire.godwitPing),
                .begin(MigrationIdentifier(high: 1, low: 2), [.twoPhaseHandover, .pageBatches, .retraction]), .prepare,
                .commitWithin(attempt: 1, nanoseconds: 300_000_000),
            ])
        #expect(items.first == .header)
        #expect(items.contains(.ramRound(final: false)) && items.contains(.ramRound(final: true)))
        #expect(items.last.map { if case .vmDescription = $0 { true } else { false } } == true)
        #expect(driver.reports == [.setup, .active, .device, .completed])
        #expect(driver.outcome == .completed)
        #expect(driver.core.rule == .twoPhase)
    }

    @Test("the right to run is given up after READY, and before COMMIT is sent")
    func givesUpFirst() throws {
        var driver = Driver()
        driver.reachSavedState()
        #expect(driver.core.mayRun)
        #expect(!driver.actions.contains(.giveUpRightToRun))
        let actions = driver.feed(.received(.ready(nanoseconds: 5)))
        let giveUp = try #require(actions.firstIndex(of: .giveUpRightToRun))
        let send = try #require(actions.firstIndex { if case .send = $0 { true } else { false } })
        #expect(giveUp < send)
        #expect(!driver.core.mayRun)
    }

    @Test("a QEMU destination hears nothing of Godwit's, and SHUT 0 completes")
    func qemu() throws {
        var driver = Driver()
        driver.reachSavedState(godwit: false)
        driver.feed(.received(.shut(0)))
        let commands = try driver.items().compactMap { if case .command(let command) = $0 { command } else { nil } }
        #expect(commands == [.openReturnPath, .ping(Wire.godwitPing)])
        #expect(driver.actions.contains(.sendRound(final: false, batches: false, keepsPages: false)))
        #expect(driver.outcome == .completed)
    }

    @Test("QEMU's rule: without an acknowledgement the guest goes on here")
    func qemuRule() {
        for event in [.received(.shut(1)), .disconnected("connection reset")] as [SourceEvent] {
            var driver = Driver()
            driver.reachSavedState(godwit: false)
            let actions = driver.feed(event)
            #expect(actions.starts(with: [.regainRightToRun, .resumeGuest]))
            #expect(driver.reports.last == .failed)
        }
    }

    @Test("a one-way transport gets no commands; what failed after all was handed over is in doubt")
    func oneWay() throws {
        var driver = Driver()
        driver.feed(.start, .connected(.oneWay), .trackingStarted, .collected(remainingPages: 256), Driver.round)
        driver.feed(.collected(remainingPages: 0), .guestStopped(wasRunning: true), .collected(remainingPages: 0))
        driver.feed(.roundSent(RoundReport(pages: 0, bytes: 0, nanoseconds: 1)), .stateSaved([Driver.cpu]))
        var interrupted = driver
        #expect(interrupted.feed(.disconnected("disk full")).contains(.resumeGuest))
        driver.feed(.flushed, .flushed)
        let items = try driver.items()
        #expect(!items.contains { if case .command = $0 { true } else { false } })
        var failing = driver
        failing.feed(.closed(error: "exit status 1"))
        #expect(failing.reports.last == .unsettled)
        #expect(!failing.actions.contains(.resumeGuest))
        driver.feed(.closed(error: nil))
        #expect(driver.outcome == .completed)
    }

    @Test("before COMMIT any failure gives the guest back, in every phase")
    func failures() {
        let script: [SourceEvent] = [
            .start, .connected(.bothWays), Driver.hello, Driver.pong, .trackingStarted, .collected(remainingPages: 256),
            Driver.round, .collected(remainingPages: 3), .guestStopped(wasRunning: true),
            .collected(remainingPages: 3), .roundSent(RoundReport(pages: 3, bytes: 12312, nanoseconds: 5000)),
            .stateSaved([Driver.cpu]),
        ]
        for length in 1...script.count {
            var prefix = Driver()
            for event in script.prefix(length) { prefix.feed(event) }
            let stopped = prefix.actions.contains(.stopGuest)
            for blow in [prefix.deadline, .disconnected("reset"), .received(.failure(reason: "no")), .cancel] {
                var driver = prefix
                driver.feed(blow, .roundSent(RoundReport(pages: 1, bytes: 1, nanoseconds: 1, interrupted: true)))
                // Before the connection is made nobody can end it or speak on it.
                if driver.outcome == nil, length == 1, blow != .cancel, blow != prefix.deadline { continue }
                #expect(driver.outcome != nil, "\(blow) after \(length) events")
                #expect(driver.outcome != .completed)
                #expect(driver.actions.contains(.resumeGuest) == stopped, "\(blow) after \(length) events")
                #expect(driver.core.mayRun)
                #expect(driver.core.phase == .finished)
            }
        }
    }

    @Test("a cancel during a round resumes at once, ends the round, and tells a Godwit destination")
    func cancelDuringRound() throws {
        var driver = Driver()
        driver.reachRound()
        #expect(driver.feed(.cancel).starts(with: [.report(.cancelling), .interruptRound]))
        driver.feed(.roundSent(RoundReport(pages: 1, bytes: 4104, nanoseconds: 1, interrupted: true)))
        #expect(driver.outcome == .cancelled)
        #expect(driver.reports == [.setup, .active, .cancelling, .cancelled])
        let last = try driver.items().last
        #expect(last == .command(.cancel(reason: "the operator cancelled the migration")))
    }

    @Test("a cancel with a peer that takes nothing ends by its own deadline")
    func cancelWithDeadPeer() {
        var driver = Driver()
        driver.reachRound()
        driver.feed(.cancel)
        driver.feed(driver.deadline)
        #expect(driver.outcome == .cancelled)
        #expect(driver.actions.contains(.close))
    }

    @Test("a cancel after COMMIT is refused")
    func cancelTooLate() {
        var driver = Driver()
        driver.reachSavedState()
        driver.feed(.received(.ready(nanoseconds: 5)))
        guard case .refused = driver.feed(.cancel).first else {
            Issue.record("not refused")
            return
        }
        driver.feed(.received(.started(nanoseconds: 6)), .disconnected("gone"))
        #expect(driver.outcome == .completed)
    }

    @Test("pause-before-switchover waits for the operator, and a cancel there resumes")
    func preSwitchover() {
        var driver = Driver(pauses: true)
        driver.reachRound()
        driver.feed(Driver.round, .collected(remainingPages: 3), .guestStopped(wasRunning: true))
        #expect(driver.reports.last == .preSwitchover)
        var cancelled = driver
        cancelled.feed(.cancel)
        #expect(cancelled.actions.contains(.resumeGuest))
        #expect(cancelled.outcome == .cancelled)
        #expect(driver.feed(.proceed).contains(.collect(final: true)))
        #expect(driver.reports.suffix(2) == [.preSwitchover, .device])
        guard case .refused = driver.feed(.proceed).first else {
            Issue.record("a second continue is not refused")
            return
        }
    }

    @Test("a destination that dies while the operator is awaited is noticed")
    func keepAlive() {
        var driver = Driver(pauses: true)
        driver.reachRound()
        driver.feed(Driver.round, .collected(remainingPages: 3), .guestStopped(wasRunning: true))
        for _ in 0..<10 {
            for case .setTimer(let timer, _) in driver.actions where timer.kind == .keepAlive {
                driver.feed(.timer(timer))
            }
        }
        #expect(driver.reports.last == .failed)
        #expect(driver.actions.contains(.resumeGuest))
    }

    @Test("a connection lost after COMMIT is settled by asking: started, never started, unknown")
    func settle() {
        var lost = Driver()
        lost.reachSavedState()
        lost.feed(.received(.ready(nanoseconds: 5)), .disconnected("reset"))
        #expect(lost.reports.last == .unsettled)
        #expect(!lost.actions.contains(.resumeGuest))
        lost.stream = []
        #expect(lost.feed(.settle(.askDestination)).first == .connect)
        lost.feed(.connected(.bothWays))
        #expect((try? lost.items()) == [.header, .command(.settle(MigrationIdentifier(high: 1, low: 2)))])
        var started = lost
        started.feed(.received(.verdict(.started)))
        #expect(started.outcome == .completed)
        #expect(!started.actions.contains(.resumeGuest))
        var never = lost
        never.feed(.received(.verdict(.neverStarted)))
        #expect(never.actions.suffix(5).contains(.resumeGuest))
        #expect(never.core.mayRun)
        lost.feed(.received(.verdict(.unknown)))
        #expect(lost.core.phase == .unsettled)
        lost.feed(.settle(.resumeHere))
        #expect(lost.actions.contains(.resumeGuest))
    }

    @Test("an operator's verdict does not wait for a destination that is being asked", arguments: [false, true])
    func verdictWhileAsking(isConnected: Bool) {
        var driver = Driver()
        driver.reachSavedState()
        driver.feed(.received(.ready(nanoseconds: 5)), .disconnected("reset"), .settle(.askDestination))
        if isConnected { driver.feed(.connected(.bothWays)) }
        #expect(driver.feed(.settle(.askDestination)).isEmpty)
        let actions = driver.feed(.settle(.resumeHere))
        #expect(actions.contains(.close) && actions.contains(.resumeGuest))
        #expect(driver.reports.last == .failed)
        // What comes late changes nothing.
        #expect(driver.feed(.connected(.bothWays), .received(.verdict(.neverStarted))).allSatisfy { $0 == .close })
    }

    @Test("FAILURE after COMMIT means that the guest never starts there")
    func failureAfterCommit() {
        var driver = Driver()
        driver.reachSavedState()
        driver.feed(.received(.ready(nanoseconds: 5)), .received(.failure(reason: "KVM_RUN fails")))
        #expect(driver.actions.contains(.regainRightToRun))
        #expect(driver.outcome == .failed("the destination could not run the guest: KVM_RUN fails"))
    }

    @Test("state that the catalogue does not know ends in an error that names it, with the guest running")
    func unknownState() {
        var driver = Driver()
        driver.reachRound()
        driver.feed(Driver.round, .collected(remainingPages: 0), .guestStopped(wasRunning: true))
        driver.feed(.collected(remainingPages: 0), .roundSent(RoundReport(pages: 0, bytes: 0, nanoseconds: 1)))
        driver.feed(.stateSaved([DeviceSection(name: "disk", version: 4, body: [])]))
        #expect(driver.outcome == .failed("device section 'disk' version 4 is not in the catalogue"))
        #expect(driver.actions.contains(.resumeGuest))
    }

    @Test("a timer that was replaced does not count")
    func staleTimer() {
        var driver = Driver()
        driver.feed(.start)
        let stale = driver.deadline
        driver.feed(.connected(.bothWays))
        #expect(driver.feed(stale).isEmpty)
        #expect(!driver.feed(driver.deadline).isEmpty)
    }

    @Test("a connection that is made after the operator cancelled is closed")
    func lateConnection() {
        var driver = Driver()
        driver.feed(.start, .cancel)
        #expect(driver.outcome == .cancelled)
        #expect(driver.feed(.connected(.bothWays)) == [.close])
    }

    @Test("a guest that was paused arrives paused")
    func pausedGuest() throws {
        var driver = Driver()
        driver.reachRound()
        driver.feed(Driver.round, .collected(remainingPages: 0), .guestStopped(wasRunning: false))
        driver.feed(.collected(remainingPages: 0), .roundSent(RoundReport(pages: 0, bytes: 0, nanoseconds: 1)))
        driver.feed(.stateSaved([]))
        let bodies = try driver.items().compactMap { item -> [UInt8]? in
            if case .device(let head, let body) = item, head.name == "globalstate" { body } else { nil }
        }
        #expect(bodies.first.flatMap { GlobalState(body: $0) }?.runState == "paused")
    }
}
