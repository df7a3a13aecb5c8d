import MigrationStream
import TestSupport
import Testing

@testable import Migration

/// A destination that takes a move of the guest back, and what its shell owes it.
private struct Driver: DestinationDriver {
    var core: DestinationCore
    var actions: [DestinationAction] = []
    var now: UInt64 = 0
    static let id = ConnectionID(1)
    static let migration = MigrationIdentifier(high: 1, low: 2)
    static let features = FeatureSet.all.subtracting([.verification, .multifd]).union(.postcopy)
    static let discard = PostcopyCommand.discard(RAMDiscard(block: "ram", ranges: [.init(offset: 0, length: 8192)]))
    static let section = StreamItem.device(
        SectionHead(type: .full, id: 9, name: "cpu", instance: 0, version: 1), body: [1])

    init(isResumable: Bool = false) {
        var configuration = DestinationConfiguration(
            instance: MigrationIdentifier(high: 5, low: 6), machineName: "m", sections: [ExpectedSection(name: "cpu")],
            features: Self.features)
        configuration.allowsPostcopy = true
        core = DestinationCore(configuration)
        feed(.accepted(Self.id, answers: true))
        items(.header, .configuration(machine: "m"), .command(.openReturnPath), .command(.ping(Wire.godwitPing)))
        items(.command(.begin(Self.migration, isResumable ? Self.features : Self.features.subtracting(.resumption))))
        items(.command(.postcopy(.advise(PostcopyAdvice(blockPageSizes: 4096)))))
        items(.ramSetup([]), .ramSectionEnded(.start), .ramRound(final: false), .ramSectionEnded(.part))
    }

    mutating func move() {
        items(.command(.postcopy(Self.discard)), .command(.postcopy(.packaged(byteCount: 9))))
        items(.command(.postcopy(.listen)), Self.section, .command(.postcopy(.run)), .command(.prepare))
    }

    enum Way: CaseIterable {
        case lateCommit, retract, retractWhileLoading, lateStart
    }

    /// From there on to `unlistened` what the source says comes too early.
    mutating func takeBack(_ way: Way) {
        move()
        if way == .retractWhileLoading {
            items(.command(.retract(attempt: 1)))
            return
        }
        feed(.stateLoaded(nanoseconds: 1))
        switch way {
        case .retract: items(.command(.retract(attempt: 1)))
        case .lateStart:
            items(.command(.commitWithin(attempt: 1, nanoseconds: 10)))
            feed(.startedTooLate)
        case .lateCommit, .retractWhileLoading:
            now += 100
            items(.command(.commitWithin(attempt: 1, nanoseconds: 10)))
        }
    }

    var said: [ReturnPathMessage] { said(on: Self.id) }
    var starts: Int { actions.count { if case .startGuest = $0 { true } else { false } } }
}

@Suite("Between RETRACT and RETRACTED")
struct ProtocolRetractionWindowTests {
    private static let ram: [StreamItem] = [
        .ramRound(final: false), .zeroPage(block: 0, offset: 0), .page(block: 0, offset: 4096), .ramRecordsEnded,
        .ramSectionEnded(.part), .command(.ping(7)),
    ]

    @Test(
        "pages that were asked for come behind a COMMIT_WITHIN that is too late: they do no harm, and the next attempt succeeds",
        arguments: [Driver.Way.lateCommit, .lateStart, .retract])
    fileprivate func pages(way: Driver.Way) {
        var driver = Driver()
        driver.takeBack(way)
        let startsBefore = driver.starts
        for item in Self.ram { driver.items(item) }
        #expect(driver.core.phase == .receiving && driver.core.acceptsPages(on: Driver.id))
        #expect(!driver.said.contains(.retracted(attempt: 1)))
        driver.feed(.unlistened)
        #expect(driver.said.last == .retracted(attempt: 1))
        driver.move()
        driver.feed(.stateLoaded(nanoseconds: 1))
        driver.items(.command(.commitWithin(attempt: 2, nanoseconds: .max)))
        #expect(driver.starts == startsBefore + 1)
        driver.feed(.guestStarted(nanoseconds: 1))
        #expect(driver.core.phase == .pulling)
    }

    @Test(
        "whatever else comes meanwhile ends the migration, before another move can begin",
        arguments: Driver.Way.allCases)
    fileprivate func words(way: Driver.Way) {
        let words: [StreamItem] = [
            .command(.postcopy(Driver.discard)), .command(.postcopy(.packaged(byteCount: 9))),
            .command(.postcopy(.listen)), .command(.postcopy(.run)), .command(.prepare), .command(.retract(attempt: 1)),
            .command(.commitWithin(attempt: 1, nanoseconds: .max)), .command(.commit), Driver.section, .endOfStream,
            .ramSectionEnded(.end), .multifdFlush, .ramSetup([]),
        ]
        for word in words {
            var driver = Driver()
            driver.takeBack(way)
            let startsBefore = driver.starts
            let after = driver.items(word)
            #expect(driver.core.phase == .failed && after.contains(.endPostcopy), "\(word)")
            driver.feed(.unlistened, .stateLoaded(nanoseconds: 1))
            #expect(driver.core.phase == .failed && driver.starts == startsBefore, "\(word)")
            #expect(!driver.said.contains(.retracted(attempt: 1)), "\(word)")
        }
    }

    @Test("one who takes up a guest that then does not start in time ends the migration, and is not waited for")
    func recoversWhatDidNotStart() {
        var driver = Driver()
        driver.move()
        driver.feed(.stateLoaded(nanoseconds: 1))
        driver.items(.command(.commitWithin(attempt: 1, nanoseconds: 10)))
        let second = ConnectionID(2)
        driver.feed(.accepted(second, answers: true))
        for item: StreamItem in [
            .header, .configuration(machine: "m"), .command(.openReturnPath),
            .command(.resume(Driver.migration, Driver.features.subtracting(.resumption))),
        ] { driver.feed(.item(second, item)) }
        #expect(driver.core.isRecovering(second))
        driver.feed(.startedTooLate)
        #expect(driver.core.phase == .failed)
    }

    @Test(
        "words in any order, from a source that means harm: nothing begins before memory is given up, nobody waits for ever"
    )
    func anyOrder() {
        var (taken, failed, again) = (0, 0, 0)
        for seed in 1...4000 as ClosedRange<UInt64> {
            var hostile = HostileSource(seed: seed)
            if let fault = hostile.run() {
                Issue.record("seed \(seed): \(fault)")
                return
            }
            if hostile.pagesTaken > 0 { taken += 1 }
            if hostile.driver.core.phase == .failed { failed += 1 } else { again += 1 }
        }
        #expect(taken > 100 && failed > 100 && again > 100, "\(taken) \(failed) \(again)")
    }
}

/// Says anything in any order while a move is taken back; the shell answers when it likes.
private struct HostileSource {
    var driver: Driver
    var generator: SeededRandom
    var owed: [DestinationEvent] = []
    var deadline: ProtocolTimer?
    var seen = 0
    var pagesTaken = 0
    /// It gives itself away only when it has heard RETRACTED.
    let isPatient: Bool
    private var isTakingBack: Bool { owed.contains(.unlistened) }

    init(seed: UInt64) {
        generator = SeededRandom(seed: seed)
        driver = Driver(isResumable: Bool.random(using: &generator))
        isPatient = Bool.random(using: &generator)
        driver.takeBack(Driver.Way.allCases.randomElement(using: &generator) ?? .retract)
        // What happened before is answered, but for what is to come.
        owed = driver.core.phase == .loading ? [.stateLoaded(nanoseconds: 1)] : []
        owed.append(.unlistened)
        for action in driver.actions { note(action) }
        seen = driver.actions.count
    }

    private mutating func note(_ action: DestinationAction) {
        switch action {
        case .setTimer(let timer, _) where timer.kind == .deadline: deadline = timer
        case .cancelTimer(.deadline): deadline = nil
        default: break
        }
    }

    /// - Returns: what must not be.
    mutating func run() -> String? {
        for _ in 0..<Int.random(in: 1...40, using: &generator) {
            if let fault = step() { return fault }
        }
        // Everybody falls silent: whoever waits is let go by a deadline.
        for _ in 0..<200 {
            if let event = owed.popLast() {
                if let fault = take(event) { return fault }
            } else if let timer = deadline {
                deadline = nil
                if let fault = take(.timer(timer)) { return fault }
            }
        }
        let ends: [DestinationPhase] = [.waiting, .failed, .started, .pullPaused]
        guard ends.contains(driver.core.phase) else { return "it waits for ever in phase \(driver.core.phase)" }
        return nil
    }

    private mutating func step() -> String? {
        if !owed.isEmpty, Int.random(in: 0..<4, using: &generator) == 0 {
            return take(owed.remove(at: Int.random(in: 0..<owed.count, using: &generator)))
        }
        if driver.core.acceptsPages(on: Driver.id), isTakingBack { pagesTaken += 1 }
        if isPatient {
            return isTakingBack || owed.isEmpty && Bool.random(using: &generator)
                ? take(.item(Driver.id, .ramRound(final: false))) : move()
        }
        switch Int.random(in: 0..<16, using: &generator) {
        case 0: return take(.disconnected(Driver.id, "reset"))
        case 1:
            let id = ConnectionID(UInt64.random(in: 2...9, using: &generator))
            let mark = MultifdGreeting.Mark(migration: Driver.migration, channels: 2, kind: .urgent)
            return take(.accepted(id, answers: true)) ?? take(.greeted(id, MultifdGreeting(channel: 0, mark: mark)))
        case 2..<6: return move()
        case 6..<11: return take(.item(Driver.id, .ramRound(final: false)))
        default: return take(.item(Driver.id, word()))
        }
    }

    /// In the right order, as if nothing were owed.
    private mutating func move() -> String? {
        let commands: [StreamItem] = [
            .command(.postcopy(Driver.discard)), .command(.postcopy(.packaged(byteCount: 9))),
            .command(.postcopy(.listen)), Driver.section, .command(.postcopy(.run)), .command(.prepare),
            .command(.commitWithin(attempt: 2, nanoseconds: .max)),
        ]
        for command in commands.prefix(Int.random(in: 1...commands.count, using: &generator)) {
            if let fault = take(.item(Driver.id, command)) { return fault }
            if Bool.random(using: &generator), let event = owed.popLast(), let fault = take(event) { return fault }
        }
        return nil
    }

    private mutating func word() -> StreamItem {
        let words: [StreamItem] = [
            .zeroPage(block: 0, offset: 0), .page(block: 0, offset: 4096), .ramSectionEnded(.part),
            .ramSectionEnded(.end), .ramRecordsEnded, .command(.ping(1)), .command(.prepare), .command(.commit),
            .command(.retract(attempt: 1)), .command(.commitWithin(attempt: 1, nanoseconds: 0)),
            .command(.postcopy(.listen)), .command(.postcopy(.run)), .command(.postcopy(.resume)), Driver.section,
            .endOfStream, .command(.cancel(reason: "enough")), .multifdFlush, .header,
        ]
        return words.randomElement(using: &generator) ?? .header
    }

    private mutating func take(_ event: DestinationEvent) -> String? {
        driver.now += 1
        let wasTakingBack = isTakingBack
        driver.feed(event)
        var fault: String?
        while seen < driver.actions.count {
            let action = driver.actions[seen]
            seen += 1
            note(action)
            switch action {
            case .loadState: owed.append(.stateLoaded(nanoseconds: 1))
            case .startGuest(_, let moment):
                let isLate = moment != nil && Bool.random(using: &generator)
                owed.append(isLate ? .startedTooLate : .guestStarted(nanoseconds: 1))
            case .finishPull: owed.append(.pullEnded(missing: UInt64.random(in: 0...1, using: &generator)))
            case .awaitReaders(let ids): owed.append(.readersEnded(ids))
            case .unlisten:
                if isTakingBack { fault = "memory is given up twice" }
                owed.append(.unlistened)
            default: break
            }
            guard wasTakingBack, event != .unlistened else { continue }
            switch action {
            case .startGuest, .listen, .loadState, .discardPages: fault = "\(action) while memory is given up"
            default: break
            }
        }
        if driver.starts > 1, driver.core.phase == .started, driver.said.count(where: Self.isStarted) > 1 {
            fault = "the guest started twice"
        }
        return fault
    }

    private static func isStarted(_ message: ReturnPathMessage) -> Bool {
        if case .started = message { true } else { false }
    }
}
