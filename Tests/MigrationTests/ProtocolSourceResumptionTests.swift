import Migration
import MigrationStream
import Testing

private let migration = MigrationIdentifier(high: 1, low: 2)
private let there = MigrationIdentifier(high: 3, low: 4)

/// A source core on a clock of its own, with what it said on the connection that is open.
private struct Source {
    var core: SourceCore
    var actions: [SourceAction] = []
    var stream: [UInt8] = []

    init(
        isResumable: Bool = true, pauses: Bool = false, awaitsAcknowledgement: Bool = false,
        features: FeatureSet = .all
    ) {
        var catalogue = SectionCatalogue()
        catalogue.add("cpu", version: 1)
        var configuration = SourceConfiguration(
            migration: migration, machineName: "m", blocks: [RAMBlockDescription(name: "ram", length: 1 << 20)],
            catalogue: catalogue, pausesBeforeSwitchover: pauses, features: features)
        configuration.isResumable = isResumable
        configuration.awaitsSwitchoverAcknowledgement = awaitsAcknowledgement
        core = SourceCore(configuration)
    }

    @discardableResult
    mutating func feed(_ events: SourceEvent...) -> [SourceAction] {
        var all: [SourceAction] = []
        for event in events {
            if case .connected = event { stream = [] }
            let answer = core.handle(event)
            for case .send(let bytes) in answer { stream += bytes }
            all += answer
        }
        actions += all
        return all
    }

    static func hello(_ instance: InstanceIdentifier = there, _ features: FeatureSet = .all) -> SourceEvent {
        .received(.hello(version: 1, features: features, instance: instance))
    }
    static let pong = SourceEvent.received(.pong(Wire.godwitPing))
    static let round = SourceEvent.roundSent(RoundReport(pages: 256, bytes: 60_000, nanoseconds: 1_000_000))
    static let cpu = DeviceSection(name: "cpu", version: 1, body: [1])

    /// From `start` to PREPARE; each event leads to the next phase.
    static let script: [SourceEvent] = [
        .start, .connected(.bothWays), hello(), pong, .trackingStarted, .collected(remainingPages: 256), round,
        .collected(remainingPages: 3), .guestStopped(wasRunning: true), .collected(remainingPages: 3),
        .roundSent(RoundReport(pages: 3, bytes: 12312, nanoseconds: 5000)), .stateSaved([cpu]),
    ]

    mutating func reach(_ phase: SourcePhase) {
        for event in Self.script where core.phase != phase { feed(event) }
    }

    /// Paused while a round is sent, whose end is still to come.
    static var paused: Source {
        var source = Source()
        source.reach(.sendingRound)
        source.feed(.disconnected("the cable is out"))
        return source
    }

    var reason: String? {
        actions.compactMap {
            switch $0 {
            case .paused(let reason), .finished(.failed(let reason)), .refused(let reason): reason
            default: nil
            }
        }.last
    }
    var isOver: Bool { actions.contains { if case .finished = $0 { true } else { false } } }
    var farewells: [[UInt8]] { actions.compactMap { if case .bidFarewell(let bytes) = $0 { bytes } else { nil } } }

    var deadline: SourceEvent {
        let timers = actions.compactMap { action -> ProtocolTimer? in
            if case .setTimer(let timer, _) = action, timer.kind == .deadline { timer } else { nil }
        }
        return .timer(timers.last ?? ProtocolTimer(kind: .deadline, generation: 0))
    }

    var keepAlive: SourceEvent {
        let timers = actions.compactMap { action -> ProtocolTimer? in
            if case .setTimer(let timer, _) = action, timer.kind == .keepAlive { timer } else { nil }
        }
        return .timer(timers.last ?? ProtocolTimer(kind: .keepAlive, generation: 0))
    }

    var commands: [ForwardCommand] {
        var decoder = StreamDecoder(
            .load(blocks: core.configuration.blocks, catalogue: core.configuration.catalogue))
        var buffer = ReceiveBuffer()
        buffer.append(stream)
        var commands: [ForwardCommand] = []
        while let item = try? decoder.next(from: &buffer) {
            if case .command(let command) = item { commands.append(command) }
        }
        return commands
    }
}

@Suite("Resumption at the source")
struct SourceResumptionTests {
    @Test("a connection lost in any phase between tracking and COMMIT pauses, with the guest running")
    func phases() {
        for length in 1...Source.script.count {
            var source = Source()
            for event in Source.script.prefix(length) { source.feed(event) }
            let phase = source.core.phase
            let wasStopped = source.actions.contains(.stopGuest)
            let actions = source.feed(.disconnected("the cable is out"))
            if phase <= .startingTracking {
                #expect(source.core.phase != .paused, "\(phase)")
                continue
            }
            #expect(source.core.phase == .paused && source.core.status == .paused, "\(phase)")
            #expect(source.core.mayRun && actions.contains(.resumeGuest) == wasStopped, "\(phase)")
            #expect(actions.contains(.abandon) && source.reason == "the cable is out", "\(phase)")
            #expect(!source.isOver)
        }
    }

    @Test("after COMMIT a lost connection is a doubt, as ever")
    func afterCommit() {
        var source = Source()
        source.reach(.preparing)
        source.feed(.received(.ready(nanoseconds: 1)), .disconnected("the cable is out"))
        #expect(source.core.status == .unsettled && !source.core.mayRun)
        source.feed(.resume)
        #expect(source.reason?.contains("nothing to resume") == true)
        #expect(source.core.status == .unsettled)
    }

    @Test("a destination that takes nothing, or does not answer, pauses; a host that does not answer itself fails")
    func deadlines() {
        for phase in [SourcePhase.sendingRound, .finalSending, .preparing] {
            var source = Source()
            source.reach(phase)
            source.feed(source.deadline)
            #expect(source.core.phase == .paused, "\(phase)")
        }
        for phase in [SourcePhase.collecting, .stoppingGuest, .savingState] {
            var source = Source()
            source.reach(phase)
            source.feed(source.deadline)
            #expect(source.core.status == .failed, "\(phase)")
        }
    }

    @Test("before the switch, an operator's hold outlives a destination that falls silent")
    func hold() {
        var source = Source(pauses: true)
        source.reach(.preSwitchover)
        #expect(source.core.phase == .preSwitchover)
        for _ in 0..<20 where source.core.phase == .preSwitchover { source.feed(source.keepAlive) }
        #expect(source.core.phase == .paused && source.actions.last == .report(.paused))
        #expect(source.actions.contains(.resumeGuest))
    }

    @Test("a destination that falls silent while nothing is sent is noticed", arguments: [true, false])
    func silentRest(isResumable: Bool) {
        var source = Source(isResumable: isResumable, awaitsAcknowledgement: true)
        source.reach(.sendingRound)
        source.feed(Source.round, .collected(remainingPages: 0))
        #expect(source.core.phase == .resting)
        var answered = source
        for _ in 0..<20 {
            answered.feed(answered.keepAlive, .received(.pong(1)))
            source.feed(source.keepAlive)
        }
        #expect(answered.core.phase == .resting && answered.commands.last == .ping(1))
        #expect(source.core.status == (isResumable ? .paused : .failed))
    }

    @Test("RESUME names the migration and its features; RESUMED puts back what was lost before anything is collected")
    func goesOn() throws {
        var source = Source.paused
        source.feed(Source.round, .resume)
        #expect(
            source.core.status == .setup && source.actions.suffix(2).contains(.connect)
                || source.core.phase == .reopening)
        source.feed(.connected(.bothWays), Source.hello(), Source.pong)
        #expect(source.core.phase == .resuming)
        #expect(
            source.commands == [
                .openReturnPath, .ping(Wire.godwitPing), .resume(migration, source.core.features),
            ])
        let actions = source.feed(.received(.resumed))
        let rewind = try #require(actions.firstIndex(of: .rewind))
        let collect = try #require(actions.firstIndex(of: .collect(final: false)))
        #expect(rewind < collect)
        #expect(source.core.status == .active)
        source.feed(.collected(remainingPages: 200))
        #expect(source.core.phase == .sendingRound)
    }

    @Test(
        "what the shell still owed when the connection was lost is awaited after RESUMED, and not taken for something else"
    )
    func owed() {
        var source = Source.paused
        source.feed(.resume, .connected(.bothWays), Source.hello(), Source.pong)
        let actions = source.feed(.received(.resumed))
        #expect(!actions.contains(.collect(final: false)), "two rounds would be under way")
        #expect(source.feed(Source.round).contains(.collect(final: false)))
    }

    @Test("whoever else listens where the migration is to go on ends nothing: it stays paused and may be tried again")
    func wrongAddress() {
        let strangers: [[SourceEvent]] = [
            [Source.hello(MigrationIdentifier(high: 8, low: 8))],
            [Source.hello(there, [.twoPhaseHandover]), Source.pong],
            [Source.pong],
            [.received(.failure(reason: "another migration is here already"))],
            [.received(.shut(1))],
            [Source.hello(), Source.hello()],
            [.received(.ready(nanoseconds: 3))],
            [.disconnected("it hung up")],
        ]
        var source = Source.paused
        source.feed(Source.round)
        for words in strangers {
            source.feed(.resume, .connected(.bothWays))
            for word in words { source.feed(word) }
            #expect(source.core.phase == .paused && source.core.mayRun && !source.isOver, "\(words)")
            #expect(!source.commands.contains { if case .resume = $0 { true } else { false } }, "\(words)")
        }
        source.feed(.resume, .connectFailed("connection refused"))
        #expect(source.core.phase == .paused && source.reason == "connection refused")
        source.feed(.resume)
        source.feed(source.deadline)
        #expect(source.core.phase == .paused)
        source.feed(.resume, .connected(.bothWays), Source.hello(), Source.pong, .received(.resumed))
        #expect(source.core.status == .active)
    }

    @Test("a destination that gave the migration up, says so, and is the one it was, ends it")
    func givenUp() {
        var source = Source.paused
        source.feed(.resume, .connected(.bothWays), Source.hello(), Source.pong)
        source.feed(.received(.failure(reason: "migration 1 is not kept here")))
        #expect(source.core.status == .failed && source.core.mayRun)
        #expect(source.reason?.contains("not kept here") == true)
    }

    @Test("RESUMED that nobody asked for is out of turn")
    func uncalled() {
        var source = Source()
        source.reach(.sendingRound)
        source.feed(.received(.resumed))
        #expect(source.actions.contains(.report(.failed)) || source.core.phase == .retreating)
        var greeting = Source()
        greeting.feed(.start, .connected(.bothWays), Source.hello(), .received(.resumed))
        #expect(greeting.core.status == .failed)
    }

    @Test("resumed twice, the second is refused and disturbs nothing")
    func twice() {
        var source = Source.paused
        source.feed(Source.round, .resume)
        let actions = source.feed(.resume)
        #expect(actions.count == 1 && source.reason?.contains("nothing to resume") == true)
        #expect(source.core.phase == .reopening)
    }

    @Test(
        "cancelled while paused or while it is taken up again, the guest runs and the destination is told on a connection of its own"
    )
    func cancelled() {
        let further: [[SourceEvent]] = [
            [], [.resume], [.resume, .connected(.bothWays)],
            [.resume, .connected(.bothWays), Source.hello(), Source.pong],
        ]
        var farewell = StreamWriter()
        farewell.header()
        farewell.command(.settle(migration))
        for events in further {
            var source = Source.paused
            source.feed(Source.round)
            for event in events { source.feed(event) }
            source.feed(.cancel)
            #expect(source.core.status == .cancelled && source.core.mayRun, "\(events)")
            #expect(source.farewells == [farewell.bytes], "\(events)")
        }
    }

    @Test("a destination that keeps RAM is told of the end also where the connection took no more words")
    func stuckFarewell() {
        var source = Source()
        source.reach(.sendingRound)
        source.feed(.cancel)
        #expect(source.core.phase == .retreating && source.farewells.isEmpty)
        source.feed(source.deadline)
        #expect(source.core.status == .cancelled && source.farewells.count == 1)
        var plain = Source(isResumable: false)
        plain.reach(.sendingRound)
        plain.feed(.cancel, plain.deadline)
        #expect(plain.farewells.isEmpty)
    }

    @Test("a peer that could not be gone on with is refused before anything moves")
    func unsupported() {
        let peers: [([SourceEvent], String)] = [
            ([Source.pong], "is no Godwit"),
            ([Source.hello(there, .all.subtracting(.resumption)), Source.pong], "does not know it"),
        ]
        for (words, why) in peers {
            var source = Source()
            source.feed(.start, .connected(.bothWays))
            for word in words { source.feed(word) }
            #expect(source.core.status == .failed)
            #expect(source.reason?.contains("x-resumable") == true && source.reason?.contains(why) == true)
            #expect(!source.actions.contains(.startTracking))
        }
        var oneWay = Source()
        oneWay.feed(.start, .connected(.oneWay))
        #expect(oneWay.reason?.contains("nobody answers") == true)
    }

    @Test("with switchover-ack the new connection must say it again")
    func acknowledgement() {
        var source = Source(awaitsAcknowledgement: true)
        source.reach(.sendingRound)
        source.feed(.received(.switchoverAcknowledged), .disconnected("out"), Source.round)
        source.feed(.resume, .connected(.bothWays), Source.hello(), Source.pong, .received(.resumed))
        source.feed(.collected(remainingPages: 0))
        #expect(source.core.phase == .resting)
        source.feed(.received(.switchoverAcknowledged), source.deadline)
        #expect(source.feed(.collected(remainingPages: 0)).contains(.stopGuest))
    }
}
