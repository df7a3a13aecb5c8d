import Migration
import MigrationStream
import Testing

/// A source core whose peer can return the guest.
private struct Source: SourceDriver {
    var core: SourceCore
    var actions: [SourceAction] = []
    static let features = FeatureSet.all.union([.postcopy, .safetyNet])

    init() {
        core = SourceCore(
            .withPostcopy(features: Self.features, PostcopyTerms(urgentChannels: 2, hasNet: true)))
    }

    mutating func greet(_ features: FeatureSet) {
        let instance = MigrationIdentifier(high: 7, low: 7)
        feed(
            .start, .connected(.bothWays), .received(.hello(version: 1, features: features, instance: instance)),
            .received(.pong(Wire.godwitPing)))
    }

    mutating func reachCommitted() {
        greet(Self.features)
        feed(.trackingStarted, .startPostcopy, .urgentChannelOpened)
        feed(.collected(remainingPages: 240), .guestStopped(wasRunning: true), .collected(remainingPages: 241))
        feed(.stateSaved([DeviceSection(name: "cpu", version: 1, body: [1])]), .discardsSent)
        feed(.received(.ready(nanoseconds: 1)))
    }

    mutating func reachPulled() {
        reachCommitted()
        feed(.received(.started(nanoseconds: 1)))
    }

    func refusal(_ actions: [SourceAction]) -> String? {
        actions.compactMap { if case .refused(let sentence) = $0 { sentence } else { nil } }.first
    }
}

@Suite("Source core, safety net")
struct ProtocolSafetyNetSourceTests {
    @Test("there is one channel more than are wanted for requests, whether or not any were")
    func channels() {
        var source = Source()
        source.greet(Source.features)
        #expect(source.actions.contains(.openUrgentChannels(3)))
    }

    @Test("a destination without it is refused before anything moves", arguments: [true, false])
    func refused(isGodwit: Bool) {
        var source = Source()
        if isGodwit {
            source.greet(.all.union(.postcopy))
        } else {
            source.feed(.start, .connected(.bothWays), .received(.pong(Wire.godwitPing)))
        }
        guard case .failed(let reason) = source.outcome else { return #expect(Bool(false), "it is not refused") }
        #expect(reason.contains("x-postcopy-safety-net") && source.core.mayRun, "\(reason)")
    }

    @Test("the guest is taken back from a pause, once, and nothing is taken up again")
    func takenBack() {
        var source = Source()
        source.reachPulled()
        #expect(source.refusal(source.feed(.takeBackGuest))?.contains("migrate-pause") == true)
        source.feed(.disconnected("the destination closed the connection"))
        #expect(source.core.phase == .postcopyPaused)
        #expect(source.feed(.takeBackGuest) == [.takeBackGuest])
        #expect(source.refusal(source.feed(.resume)) != nil && source.feed(.takeBackGuest).isEmpty)
        #expect(!source.core.mayRun, "its state is not loaded yet")
        let actions = source.feed(.guestTakenBack)
        #expect(actions.firstIndex(of: .regainRightToRun) ?? 9 < actions.firstIndex(of: .resumeGuest) ?? 0)
        #expect(source.core.mayRun && source.outcome == .cancelled)
        #expect(source.feed(.guestStays, .resume).filter { $0 == .connect || $0 == .releaseGuest }.isEmpty)
    }

    @Test("when its state cannot be loaded it is as it was, and may be taken back again")
    func takeBackFails() {
        var source = Source()
        source.reachPulled()
        source.feed(.breakOff, .takeBackGuest)
        #expect(source.refusal(source.feed(.takeBackFailed("no")))?.contains("no") == true)
        #expect(source.core.phase == .postcopyPaused && !source.core.mayRun)
        #expect(source.feed(.takeBackGuest) == [.takeBackGuest])
    }

    @Test("a guest that was released is never taken back, also when the word did not reach the destination")
    func released() {
        var source = Source()
        source.reachPulled()
        source.feed(.pagesServed)
        #expect(source.feed(.guestStays) == [.releaseGuest])
        source.feed(.disconnected("the destination closed the connection"))
        #expect(source.core.phase == .postcopyPaused)
        #expect(source.refusal(source.feed(.takeBackGuest))?.contains("was released") == true)
        #expect(source.feed(.guestStays).isEmpty, "the connection is gone")
    }

    @Test("a guest that was released before STARTED was heard is not had back by settling, either")
    func releasedInDoubt() {
        var source = Source()
        source.reachCommitted()
        // On another channel: it may come first.
        #expect(source.feed(.guestStays) == [.releaseGuest])
        source.feed(.disconnected("the destination closed the connection"))
        #expect(source.core.phase == .unsettled)
        for event in [SourceEvent.takeBackGuest, .settle(.resumeHere)] {
            let actions = source.feed(event)
            #expect(source.refusal(actions)?.contains("was released") == true && !source.core.mayRun)
            #expect(!actions.contains(.resumeGuest))
        }
        source.feed(.settle(.startedThere))
        #expect(source.core.phase == .postcopyPaused, "a recovery is the way")
    }

    @Test("in doubt whether it started the guest can be taken back, and by no other way")
    func unsettled() {
        for event in [SourceEvent.takeBackGuest, .settle(.resumeHere)] {
            var source = Source()
            source.reachCommitted()
            source.feed(.disconnected("the destination closed the connection"))
            #expect(source.core.phase == .unsettled)
            #expect(source.feed(event) == [.takeBackGuest])
            #expect(!source.core.mayRun, "its state is not loaded yet")
            #expect(source.refusal(source.feed(.settle(.startedThere))) != nil)
            #expect(source.feed(.settle(.askDestination)).isEmpty, "nobody is asked, and nobody hears a no")
            source.feed(.guestTakenBack)
            #expect(source.core.mayRun && source.outcome == .cancelled)
        }
    }
}

/// A destination core that returns the guest to its source, which has connection 1, channels 2 and 3, and the net 4.
private struct Destination: DestinationDriver {
    var core: DestinationCore
    var actions: [DestinationAction] = []
    static let features = Source.features
    static let migration = MigrationIdentifier(high: 1, low: 2)
    static let net = ConnectionID(4)

    init() { core = DestinationCore(.withPostcopy(features: Self.features)) }

    mutating func reachStarting(_ features: FeatureSet = features) {
        feed(.accepted(ConnectionID(1), answers: true))
        items(
            .header, .configuration(machine: "m"), .command(.openReturnPath), .command(.ping(Wire.godwitPing)),
            .command(.begin(Self.migration, features)))
        for number in 0..<3 {
            let id = ConnectionID(UInt64(number) + 2)
            let mark = MultifdGreeting.Mark(migration: Self.migration, channels: 3, kind: .urgent)
            feed(.accepted(id, answers: true), .greeted(id, MultifdGreeting(channel: UInt8(number), mark: mark)))
        }
        items(
            .command(.postcopy(.advise(PostcopyAdvice(blockPageSizes: 4096)))),
            .ramSetup([RAMBlockDescription(name: "ram", length: 1 << 20)]),
            .command(.postcopy(.discard(RAMDiscard(block: "ram", ranges: [.init(offset: 0, length: 4096)])))),
            .command(.postcopy(.packaged(byteCount: 9))), .command(.postcopy(.listen)),
            .device(SectionHead(type: .full, id: 3, name: "cpu", instance: 0, version: 1), body: [1]),
            .command(.postcopy(.run)), .command(.prepare))
        feed(.stateLoaded(nanoseconds: 1))
        items(.command(.commitWithin(attempt: 1, nanoseconds: .max)))
    }

    mutating func reachPulling() {
        reachStarting()
        feed(.guestStarted(nanoseconds: 1))
    }

    mutating func reachWhole() {
        reachPulling()
        items(.ramSectionEnded(.end), .endOfStream)
        feed(.pullEnded(missing: 0))
    }
}

@Suite("Destination core, safety net")
struct ProtocolSafetyNetDestinationTests {
    @Test("what the guest says is held back before it starts, and it runs in epochs")
    func order() throws {
        var destination = Destination()
        destination.reachStarting()
        #expect(
            destination.actions.contains(.prepareEpochs) && destination.actions.contains(.admitNet(Destination.net)))
        #expect(destination.actions.contains(.admitUrgent(ConnectionID(3), number: 1, of: 2)))
        let armed = try #require(destination.actions.firstIndex(of: .armEpochs))
        let started = try #require(
            destination.actions.firstIndex { if case .startGuest = $0 { true } else { false } })
        #expect(armed < started)
        #expect(destination.feed(.guestStarted(nanoseconds: 1)).contains(.goOnWithEpochs))
    }

    @Test("with all memory it waits for the source's word, and only that frees it")
    func whole() {
        var destination = Destination()
        destination.reachWhole()
        #expect(destination.actions.contains(.sayStays) && destination.core.phase == .pulling)
        #expect(!destination.actions.contains(.endEpochs) && destination.outcome == nil)
        #expect(destination.feed(.guestReleased(ConnectionID(2))).isEmpty, "that is not said there")
        #expect(destination.feed(.guestReleased(Destination.net)).contains(.endEpochs))
        #expect(destination.outcome == .completed)
    }

    @Test("without its source it stands still, whether or not all is there, until its operator says that it stays")
    func kept() {
        for isWhole in [false, true] {
            var destination = Destination()
            if isWhole { destination.reachWhole() } else { destination.reachPulling() }
            #expect(destination.feed(.keepGuest).isEmpty, "its source is there")
            let actions = destination.feed(.disconnected(ConnectionID(1), "gone"), .pullEnded(missing: isWhole ? 0 : 1))
            #expect(actions.contains(.holdEpochs) && !actions.contains(.endEpochs) && destination.outcome == nil)
            #expect(destination.feed(.guestReleased(Destination.net)).isEmpty, "that connection is gone")
            #expect(destination.feed(.keepGuest).contains(.endEpochs))
            #expect(destination.outcome == (isWhole ? .completed : nil))
            #expect(destination.feed(.keepGuest).isEmpty)
        }
    }

    @Test("a source may not choose it without postcopy")
    func alone() {
        var destination = Destination()
        destination.feed(.accepted(ConnectionID(1), answers: true))
        destination.items(
            .header, .configuration(machine: "m"), .command(.openReturnPath), .command(.ping(Wire.godwitPing)),
            .command(.begin(Destination.migration, FeatureSet.all.union(.safetyNet))))
        #expect(destination.core.phase == .waiting)
    }
}
