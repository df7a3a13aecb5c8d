import Migration
import MigrationStream
import Testing

/// A source core whose peer is a Godwit that takes postcopy.
private struct Source: SourceDriver {
    var core: SourceCore
    var actions: [SourceAction] = []
    static let features = FeatureSet.all.union(.postcopy)
    static let cpu = DeviceSection(name: "cpu", version: 1, body: [1, 2, 3])

    init(channels: Int = 0, limit: UInt64 = 300_000_000, isResumable: Bool = false) {
        var configuration = SourceConfiguration.withPostcopy(
            switchover: SwitchoverPolicy(downtimeLimitNanoseconds: limit), features: Self.features,
            PostcopyTerms(usesUrgentChannel: channels > 0, urgentChannels: max(channels, 1)))
        configuration.isResumable = isResumable
        core = SourceCore(configuration)
    }

    mutating func greet(_ features: FeatureSet = features) {
        let hello = ReturnPathMessage.hello(
            version: 1, features: features, instance: MigrationIdentifier(high: 7, low: 7))
        feed(.start, .connected(.bothWays), .received(hello), .received(.pong(Wire.godwitPing)))
    }

    mutating func reachPreparing() {
        greet()
        feed(.trackingStarted, .startPostcopy)
        if core.configuration.postcopy?.usesUrgentChannel == true { feed(.urgentChannelOpened) }
        feed(.collected(remainingPages: 240), .guestStopped(wasRunning: true), .collected(remainingPages: 241))
        feed(.stateSaved([Self.cpu]), .discardsSent)
    }

    mutating func reachCommitted() {
        reachPreparing()
        feed(.received(.ready(nanoseconds: 1)))
    }

    mutating func reachPulled() {
        reachCommitted()
        feed(.received(.started(nanoseconds: 1)))
    }

    func commands(in actions: [SourceAction]) -> [ForwardCommand] {
        actions.flatMap { action -> [ForwardCommand] in
            guard case .send(let bytes) = action else { return [] }
            var decoder = StreamDecoder(.describe(catalogue: SectionCatalogue()))
            var buffer = ReceiveBuffer()
            var header = StreamWriter()
            header.header()
            buffer.append(header.bytes + bytes)
            var found: [ForwardCommand] = []
            while let item = try? decoder.next(from: &buffer) {
                if case .command(let command) = item { found.append(command) }
            }
            return found
        }
    }
}

@Suite("Source core, postcopy to a Godwit")
struct ProtocolPostcopyPairSourceTests {
    @Test("the right to run goes with COMMIT, and the rest of memory follows STARTED")
    func order() throws {
        var source = Source()
        source.reachPreparing()
        #expect(source.core.phase == .preparing && source.core.mayRun)
        #expect(source.actions.last { if case .serveRequests = $0 { true } else { false } } != nil)
        #expect(!source.actions.contains(.servePages))
        let commit = source.feed(.received(.ready(nanoseconds: 1)))
        let right = try #require(commit.firstIndex(of: .giveUpRightToRun))
        let word = try #require(commit.firstIndex { !source.commands(in: [$0]).isEmpty })
        #expect(right < word && !source.core.mayRun && commit.contains(.serveRequests))
        #expect(source.feed(.received(.started(nanoseconds: 1))).contains(.servePages))
        #expect(source.core.status == .postcopyActive)
        source.feed(.pagesServed, .received(.shut(0)))
        #expect(source.outcome == .completed)
    }

    @Test("a destination that says READY without end while a move is taken back is left, with the guest running")
    func endlessReady() {
        var source = Source()
        source.reachPreparing()
        source.feed(.received(.ready(nanoseconds: 1)), at: 400_000_000)
        #expect(source.core.phase == .retracting)
        var words = 0
        while source.core.phase == .retracting, words < 1000 {
            source.feed(.received(.ready(nanoseconds: 1)), at: 400_000_001)
            words += 1
        }
        #expect(words < 100 && source.core.mayRun)
        #expect(source.outcome == .failed("the destination goes on answering what it was not asked"))
    }

    @Test(
        "a destination that goes on answering what nobody asked, behind COMMIT or while postcopy recovers, is heard no longer"
    )
    func endlessTalk() {
        func flood(_ source: inout Source) -> Int {
            let phase = source.core.phase
            var words = 0
            while source.core.phase == phase, words < 1000 {
                source.feed(.received(.pong(Wire.godwitPing)))
                words += 1
            }
            return words
        }
        var committed = Source()
        committed.reachCommitted()
        #expect(flood(&committed) < 100)
        #expect(committed.core.status == .unsettled && !committed.core.mayRun && committed.actions.contains(.close))
        let hello = ReturnPathMessage.hello(
            version: 1, features: Source.features, instance: MigrationIdentifier(high: 7, low: 7))
        let steps: [ReturnPathMessage] = [
            hello, .pong(Wire.godwitPing), .resumed, .postcopy(.bitmapEnded(block: "ram")),
        ]
        for count in 0...steps.count {
            var recovering = Source()
            recovering.reachPulled()
            recovering.feed(.disconnected("reset"), .resume, .connected(.bothWays))
            for step in steps.prefix(count) { recovering.feed(.received(step)) }
            let from = recovering.core.phase
            #expect(from > .postcopyPaused && flood(&recovering) < 100, "\(from)")
            #expect(recovering.core.phase == .postcopyPaused, "\(from)")
            recovering.feed(.resume, .connected(.bothWays))
            #expect(recovering.core.phase == .recoverGreeting)
        }
    }

    @Test("a destination that offers no postcopy is refused before anything moves")
    func notOffered() {
        var source = Source()
        source.greet(.all)
        #expect(!source.actions.contains(.startTracking))
        guard case .failed(let reason) = source.outcome else { return #expect(Bool(false), "no failure") }
        #expect(reason.contains("set the capability there"))
    }

    @Test("a move that takes too long is taken back: pages are dirty again before anything is collected")
    func takenBack() throws {
        var source = Source(channels: 2)
        source.reachPreparing()
        let broken = source.feed(.received(.ready(nanoseconds: 1)), at: 400_000_000)
        #expect(broken.contains(.resumeGuest) && source.core.phase == .retracting && source.core.mayRun)
        let attempts = source.commands(in: broken).compactMap {
            if case .retract(let attempt) = $0 { attempt } else { nil }
        }
        let attempt = try #require(attempts.first)
        // The destination closes the channels before it says so.
        #expect(source.feed(.urgentChannelLost("closed")).isEmpty)
        let back = source.feed(.received(.retracted(attempt: attempt)), at: 400_000_001)
        let taken = try #require(back.firstIndex(of: .takeBackPages))
        #expect(taken < back.firstIndex(of: .collect(final: false)) ?? 0)
        #expect(source.core.status == .active)
        #expect(source.feed(.urgentChannelLost("closed")).isEmpty && source.core.phase == .collecting)
        // A rest first; then the channels are opened anew.
        source.feed(.collected(remainingPages: 10), at: 400_000_002)
        #expect(source.core.phase == .resting)
        let timers = source.actions.compactMap { action -> ProtocolTimer? in
            if case .setTimer(let timer, _) = action, timer.kind == .deadline { timer } else { nil }
        }
        source.feed(.timer(try #require(timers.last)), at: 500_000_000)
        let again = source.feed(.collected(remainingPages: 10), at: 500_000_001)
        #expect(again.contains(.openUrgentChannels(2)) && source.core.phase == .openingUrgentChannel)
        source.feed(.urgentChannelOpened, .collected(remainingPages: 10), at: 500_000_002)
        #expect(source.core.phase == .stoppingGuest)
    }

    @Test("DISCARD that takes too long is undone, too, when it has left")
    func discardsTooLate() throws {
        var source = Source()
        source.greet()
        source.feed(.trackingStarted, .startPostcopy, .collected(remainingPages: 240))
        source.feed(.guestStopped(wasRunning: true), .collected(remainingPages: 241))
        let timers = source.actions.compactMap { action -> ProtocolTimer? in
            if case .setTimer(let timer, _) = action, timer.kind == .contract { timer } else { nil }
        }
        let broken = source.feed(.timer(try #require(timers.last)), at: 300_000_000)
        #expect(broken.contains(.resumeGuest) && source.core.phase == .breakingOff)
        source.feed(.stateSaved([Source.cpu]), at: 300_000_001)
        #expect(source.core.phase == .breakingOff)
        let sent = source.feed(.discardsSent, at: 300_000_002)
        #expect(source.commands(in: sent).contains { if case .retract = $0 { true } else { false } })
        #expect(source.core.phase == .retracting)
    }

    @Test("COMMIT that came too late there gives the guest back and undoes the move")
    func cameTooLate() {
        var source = Source(channels: 1)
        source.reachCommitted()
        source.feed(.urgentChannelLost("closed"))
        #expect(source.core.phase == .committed)
        let back = source.feed(.received(.retracted(attempt: 1)))
        #expect(back.contains(.regainRightToRun) && back.contains(.takeBackPages) && back.contains(.resumeGuest))
        #expect(source.core.mayRun && source.core.status == .active)
    }

    @Test(
        "lost between COMMIT and STARTED it is settled by asking, and a guest that started there is paused, not complete"
    )
    func settled() {
        var source = Source()
        source.reachCommitted()
        source.feed(.disconnected("reset"))
        #expect(source.core.status == .unsettled)
        source.feed(.settle(.askDestination), .connected(.bothWays), .received(.verdict(.started)))
        #expect(source.core.status == .postcopyPaused && !source.core.mayRun)
        var other = Source()
        other.reachCommitted()
        other.feed(.disconnected("reset"), .settle(.askDestination), .connected(.bothWays))
        #expect(other.feed(.received(.verdict(.neverStarted))).contains(.resumeGuest))
    }

    @Test("lost behind STARTED it is paused, on whichever channel; the end of one behind the last page is none")
    func lostLater() {
        for event in [SourceEvent.disconnected("reset"), .urgentChannelLost("reset")] {
            var source = Source(channels: 1)
            source.reachPulled()
            source.feed(event)
            #expect(source.core.status == .postcopyPaused && !source.core.mayRun)
        }
        var source = Source(channels: 1)
        source.reachPulled()
        source.feed(.pagesServed, .urgentChannelLost("closed"))
        source.feed(.received(.shut(0)))
        #expect(source.outcome == .completed)
    }

    @Test(
        "a resumable migration that is lost before COMMIT takes its pages back on the new connection, and says ADVISE anew"
    )
    func resumed() throws {
        var source = Source(isResumable: true)
        source.reachPreparing()
        #expect(source.feed(.disconnected("reset")).contains(.resumeGuest))
        #expect(source.core.status == .paused)
        let hello = ReturnPathMessage.hello(
            version: 1, features: Source.features, instance: MigrationIdentifier(high: 7, low: 7))
        source.feed(.resume, .connected(.bothWays), .received(hello), .received(.pong(Wire.godwitPing)))
        let back = source.feed(.received(.resumed))
        let taken = try #require(back.firstIndex(of: .takeBackPages))
        #expect(taken < back.firstIndex(of: .collect(final: false)) ?? 0)
        #expect(source.commands(in: back).contains { if case .postcopy(.advise) = $0 { true } else { false } })
    }
}

/// A destination core whose peer is a Godwit; connection 1 is the source's.
private struct Destination: DestinationDriver {
    var core: DestinationCore
    var actions: [DestinationAction] = []
    static let id = ConnectionID(1)
    static let migration = MigrationIdentifier(high: 1, low: 2)

    init(features: FeatureSet = Source.features, chosen: FeatureSet = Source.features) {
        core = DestinationCore(.withPostcopy(features: features))
        feed(.accepted(Self.id, answers: true))
        items(.header, .configuration(machine: "m"), .command(.openReturnPath), .command(.ping(Wire.godwitPing)))
        items(.command(.begin(Self.migration, chosen)))
    }

    mutating func receive() {
        items(.command(.postcopy(.advise(PostcopyAdvice(blockPageSizes: 4096)))))
        items(.ramSetup([]), .ramSectionEnded(.start), .ramRound(final: false), .ramSectionEnded(.part))
    }

    mutating func greet(_ connection: UInt64, _ number: UInt8, migration: MigrationIdentifier = migration) {
        let id = ConnectionID(connection)
        let mark = MultifdGreeting.Mark(migration: migration, channels: 2, kind: .urgent)
        feed(.accepted(id, answers: true), .greeted(id, MultifdGreeting(channel: number, mark: mark)))
    }

    mutating func reachLoading() {
        receive()
        let discard = RAMDiscard(block: "ram", ranges: [.init(offset: 0, length: 8192)])
        items(.command(.postcopy(.discard(discard))), .command(.postcopy(.packaged(byteCount: 9))))
        items(.command(.postcopy(.listen)))
        items(.device(SectionHead(type: .full, id: 9, name: "cpu", instance: 0, version: 1), body: [1]))
        items(.command(.postcopy(.run)), .command(.prepare), .ramRound(final: false))
    }

    mutating func reachReady() {
        reachLoading()
        feed(.stateLoaded(nanoseconds: 1))
    }

    func said(in actions: [DestinationAction]) -> [ReturnPathMessage] { Self.messages(in: actions) }

    func starts(_ actions: [DestinationAction]) -> Bool {
        actions.contains { if case .startGuest = $0 { true } else { false } }
    }
}

@Suite("Destination core, postcopy from a Godwit")
struct ProtocolPostcopyPairDestinationTests {
    @Test(
        "who does not say the migration's name is told nothing, also where the operator said that the source may come")
    func nameless() {
        var destination = Destination()
        destination.reachReady()
        destination.items(.ramSectionEnded(.part), .command(.commitWithin(attempt: 1, nanoseconds: .max)))
        destination.feed(.guestStarted(nanoseconds: 1), .disconnected(Destination.id, "gone"), .awaitRecovery)
        #expect(destination.core.phase == .pullPaused)
        let stranger = ConnectionID(2)
        let answer = destination.feed(.accepted(stranger, answers: true), .cameToRecover(stranger))
        #expect(answer.contains(.close(stranger)) && !destination.core.isRecovering(stranger))
        #expect(destination.core.phase == .pullPaused)
    }

    @Test("RUN starts nothing, COMMIT does; STARTED comes before memory is whole, SHUT behind")
    func order() {
        var destination = Destination()
        destination.reachReady()
        #expect(!destination.starts(destination.actions) && destination.core.phase == .ready)
        destination.items(.ramSectionEnded(.part))
        #expect(destination.starts(destination.items(.command(.commitWithin(attempt: 1, nanoseconds: 1000)))))
        let started = destination.feed(.guestStarted(nanoseconds: 5))
        #expect(destination.said(in: started) == [.started(nanoseconds: 5)])
        #expect(destination.core.phase == .pulling)
        destination.items(.ramRound(final: true), .ramSectionEnded(.end), .endOfStream)
        let whole = destination.feed(.pullEnded(missing: 0))
        #expect(destination.said(in: whole) == [.shut(0)] && destination.core.status == .completed)
    }

    @Test("PREPARE without RUN, a round behind DISCARD, and the end of RAM before COMMIT are out of turn")
    func outOfTurn() {
        var early = Destination()
        early.receive()
        early.items(.command(.postcopy(.discard(RAMDiscard(block: "ram", ranges: [.init(offset: 0, length: 4096)])))))
        early.items(.command(.prepare))
        #expect(early.core.phase == .failed)
        var round = Destination()
        round.receive()
        round.items(.command(.postcopy(.discard(RAMDiscard(block: "ram", ranges: [.init(offset: 0, length: 4096)])))))
        round.items(.ramRound(final: false))
        #expect(round.core.phase == .failed)
        var end = Destination()
        end.reachReady()
        end.items(.ramSectionEnded(.end))
        #expect(end.core.phase == .failed)
    }

    @Test("postcopy that was not chosen, or without a handover that can be taken back, is refused")
    func notChosen() {
        var other = Destination(chosen: .all)
        other.receive()
        #expect(other.core.phase == .waiting)
        let half = Destination(chosen: [.twoPhaseHandover, .postcopy])
        #expect(half.core.phase == .waiting)
    }

    @Test(
        "RETRACT wakes who waits for a page at once, and is answered when nothing is watched and nothing loaded",
        arguments: [false, true])
    func retracted(loadFails: Bool) {
        var destination = Destination()
        destination.greet(2, 0)
        destination.reachLoading()
        let retract = destination.items(.ramSectionEnded(.part), .command(.retract(attempt: 1)))
        #expect(retract.contains(.unlisten([ConnectionID(2)])) && retract.contains(.close(ConnectionID(2))))
        #expect(destination.said(in: retract).isEmpty)
        // It found zeroes where a page was awaited.
        let loaded = destination.feed(loadFails ? .loadFailed("nonsense") : .stateLoaded(nanoseconds: 1))
        #expect(destination.said(in: loaded).isEmpty)
        #expect(destination.said(in: destination.feed(.unlistened)) == [.retracted(attempt: 1)])
        #expect(destination.core.phase == .receiving && destination.core.status == .active)
        #expect(destination.core.acceptsPages(on: Destination.id))
        // And once more, to the end.
        destination.greet(3, 0)
        let discard = RAMDiscard(block: "ram", ranges: [.init(offset: 0, length: 8192)])
        destination.items(.command(.postcopy(.discard(discard))), .command(.postcopy(.packaged(byteCount: 9))))
        destination.items(.command(.postcopy(.listen)))
        destination.items(.device(SectionHead(type: .full, id: 9, name: "cpu", instance: 0, version: 1), body: [1]))
        destination.items(.command(.postcopy(.run)), .command(.prepare))
        destination.feed(.stateLoaded(nanoseconds: 1))
        #expect(destination.starts(destination.items(.command(.commitWithin(attempt: 2, nanoseconds: 1000)))))
    }

    @Test(
        "memory that could not be given back is never started: the source hears FAILURE and not RETRACTED, and may not come back",
        arguments: [false, true])
    func damaged(isLoaded: Bool) {
        var destination = Destination()
        destination.reachLoading()
        destination.items(.ramSectionEnded(.part), .command(.retract(attempt: 1)))
        if isLoaded { destination.feed(.stateLoaded(nanoseconds: 1)) }
        let damaged = destination.feed(.pagesFailed("holes"))
        #expect(destination.said(in: damaged) == [.failure(reason: "holes")])
        #expect(destination.core.phase == .failed && destination.core.status == .failed)
        let later = destination.feed(.stateLoaded(nanoseconds: 1), .unlistened)
        #expect(destination.said(in: later).isEmpty && !destination.starts(destination.actions))
        destination.feed(.accepted(ConnectionID(9), answers: true))
        let next = destination.feed(
            .item(ConnectionID(9), .header), .item(ConnectionID(9), .configuration(machine: "m")))
        #expect(next.contains(.close(ConnectionID(9))))
    }

    @Test("a start that is too late undoes the move before it says so")
    func tooLate() {
        var destination = Destination()
        destination.reachReady()
        destination.items(.ramSectionEnded(.part), .command(.commitWithin(attempt: 1, nanoseconds: 1000)))
        let late = destination.feed(.startedTooLate)
        #expect(late.contains(.unlisten([])) && destination.said(in: late).isEmpty)
        // What was asked for and is on its way goes straight to its place.
        destination.items(.ramRound(final: false))
        #expect(destination.core.acceptsPages(on: Destination.id))
        #expect(destination.said(in: destination.feed(.unlistened)) == [.retracted(attempt: 1)])
    }

    @Test("a source lost before COMMIT is waited for without a watch over memory, and says ADVISE anew")
    func kept() {
        var destination = Destination()
        destination.reachLoading()
        let kept = destination.feed(.disconnected(Destination.id, "reset"))
        #expect(kept.contains(.unlisten([])) && destination.core.phase == .kept)
        let id = ConnectionID(5)
        destination.feed(.accepted(id, answers: true))
        let words: [StreamItem] = [
            .header, .configuration(machine: "m"), .command(.openReturnPath), .command(.ping(Wire.godwitPing)),
            .command(.resume(Destination.migration, Source.features)),
        ]
        for word in words { destination.feed(.item(id, word)) }
        destination.feed(.stateLoaded(nanoseconds: 1), .readersEnded([Destination.id]))
        #expect(destination.core.phase == .rejoining)
        destination.feed(.unlistened)
        #expect(destination.core.phase == .opened)
        let advice = PostcopyCommand.advise(PostcopyAdvice(blockPageSizes: 4096))
        #expect(destination.feed(.item(id, .command(.postcopy(advice)))).contains(.preparePostcopy))
    }

    @Test("a channel for requested pages belongs to this migration, once; it may be here before BEGIN")
    func channels() {
        var destination = Destination()
        destination.greet(2, 1)
        #expect(destination.actions.contains(.admitUrgent(ConnectionID(2), number: 1, of: 2)))
        destination.greet(3, 1)
        destination.greet(4, 0, migration: MigrationIdentifier(high: 9, low: 9))
        for id in [3, 4] as [UInt64] { #expect(destination.actions.contains(.close(ConnectionID(id)))) }
        #expect(destination.core.phase == .opened)
        let refused = {
            var other = Destination(chosen: .all)
            other.greet(2, 0)
            return other
        }()
        #expect(refused.actions.contains(.close(ConnectionID(2))))
    }

    @Test(
        "behind COMMIT the loss of a channel pauses, it fails nothing; of one whose number is free again another may come"
    )
    func channelLost() {
        var destination = Destination()
        destination.greet(2, 0)
        destination.reachReady()
        destination.items(.ramSectionEnded(.part), .command(.commitWithin(attempt: 1, nanoseconds: 1000)))
        destination.feed(.guestStarted(nanoseconds: 5))
        destination.feed(.disconnected(ConnectionID(2), "reset"))
        #expect(destination.core.phase == .pullPaused && destination.core.status == .postcopyPaused)
    }
}
