import Migration
import MigrationStream
import Testing

/// A destination core on a clock of its own; connection 1 is the source's.
private struct Arrival {
    var core = DestinationCore(
        DestinationConfiguration(
            instance: MigrationIdentifier(high: 5, low: 6), machineName: "m", sections: [ExpectedSection(name: "cpu")]))
    var now: UInt64 = 0
    var actions: [DestinationAction] = []
    static let id = ConnectionID(1)
    static let migration = MigrationIdentifier(high: 1, low: 2)

    init(features: FeatureSet = .all.subtracting(.resumption)) {
        feed(.accepted(Self.id, answers: true))
        items(
            .header, .configuration(machine: "m"), .command(.openReturnPath), .command(.ping(Wire.godwitPing)),
            .command(.begin(Self.migration, features)), .ramSetup([]), .ramSectionEnded(.start))
    }

    @discardableResult
    mutating func feed(_ event: DestinationEvent, after nanoseconds: UInt64 = 0) -> [DestinationAction] {
        now += nanoseconds
        let all = core.handle(event, at: now)
        actions += all
        return all
    }

    @discardableResult
    mutating func items(_ items: StreamItem..., after nanoseconds: UInt64 = 0) -> [DestinationAction] {
        now += nanoseconds
        return items.flatMap { feed(.item(Self.id, $0)) }
    }

    /// A round, then device state with that byte in it, and PREPARE.
    mutating func prepare(_ byte: UInt8) {
        let head = SectionHead(type: .full, id: 9, name: "cpu", instance: 0, version: 1)
        let state = SectionHead(type: .full, id: 10, name: "globalstate", instance: 0, version: 1)
        items(
            .ramRound(final: false), .ramSectionEnded(.part), .device(head, body: [byte]),
            .device(state, body: GlobalState(runState: "running").section.body), .command(.prepare))
    }

    var said: [ReturnPathMessage] {
        var decoder = ReturnPathDecoder()
        var buffer = ReceiveBuffer()
        for case .send(Self.id, let bytes) in actions { buffer.append(bytes) }
        var messages: [ReturnPathMessage] = []
        while let message = try? decoder.next(from: &buffer) { messages.append(message) }
        return messages
    }

    var loaded: [[UInt8]] {
        actions.compactMap { if case .loadState(let sections) = $0 { sections.first?.body } else { nil } }
    }

    var starts: Int { actions.count { if case .startGuest = $0 { true } else { false } } }
}

@Suite("Retraction at the destination")
struct ProtocolRetractionTests {
    @Test("COMMIT_WITHIN counts from READY on: in time it starts the guest, a nanosecond later nothing")
    func within() {
        var intime = Arrival()
        intime.prepare(1)
        intime.feed(.stateLoaded(nanoseconds: 7), after: 100)
        var late = intime
        intime.items(.command(.commitWithin(attempt: 1, nanoseconds: 5000)), after: 5000)
        #expect(intime.starts == 1)
        late.items(.command(.commitWithin(attempt: 1, nanoseconds: 5000)), after: 5001)
        #expect(late.starts == 0)
        #expect(late.said.last == .retracted(attempt: 1))
        #expect(late.core.acceptsPages(on: Arrival.id), "RAM is awaited again")
        late.prepare(2)
        late.feed(.stateLoaded(nanoseconds: 7))
        late.items(.command(.commitWithin(attempt: 2, nanoseconds: 5000)))
        #expect(late.starts == 1)
        #expect(late.loaded == [[1], [2]], "the later state is loaded")
    }

    @Test("a start that does not happen in time is undone, and the next attempt may start")
    func startedTooLate() {
        var driver = Arrival()
        driver.prepare(1)
        driver.feed(.stateLoaded(nanoseconds: 7), after: 100)
        let actions = driver.items(.command(.commitWithin(attempt: 1, nanoseconds: 5000)), after: 1000)
        #expect(actions.contains(.startGuest(running: true, by: 5100)), "\(actions)")
        driver.feed(.startedTooLate, after: 4001)
        #expect(driver.said.last == .retracted(attempt: 1))
        #expect(driver.core.acceptsPages(on: Arrival.id), "RAM is awaited again")
        driver.feed(.startedTooLate)
        driver.prepare(2)
        driver.feed(.stateLoaded(nanoseconds: 7))
        #expect(
            driver.items(.command(.commitWithin(attempt: 2, nanoseconds: .max))).contains(
                .startGuest(running: true, by: nil)))
        driver.feed(.guestStarted(nanoseconds: 9))
        #expect(driver.core.phase == .started && driver.loaded == [[1], [2]])
    }

    @Test("a start that does not happen in time, of a source that is lost or asks already, never happens")
    func startedTooLateForNobody() {
        for asks in [false, true] {
            var driver = Arrival()
            driver.prepare(1)
            driver.feed(.stateLoaded(nanoseconds: 7))
            driver.items(.command(.commitWithin(attempt: 1, nanoseconds: 5000)))
            let visitor = ConnectionID(2)
            if asks {
                driver.feed(.accepted(visitor, answers: true))
                driver.feed(.item(visitor, .header))
                driver.feed(.item(visitor, .command(.settle(Arrival.migration))))
            } else {
                driver.feed(.disconnected(Arrival.id, "end of file"))
            }
            let actions = driver.feed(.startedTooLate, after: 6000)
            #expect(driver.core.phase == .failed)
            guard asks else { continue }
            var writer = StreamWriter()
            writer.message(.verdict(.neverStarted))
            #expect(actions.contains(.send(visitor, writer.take())), "\(actions)")
        }
    }

    @Test("RETRACT after READY and during loading is answered once the state is void, and READY is not said any more")
    func retract() {
        var ready = Arrival()
        ready.prepare(1)
        ready.feed(.stateLoaded(nanoseconds: 7))
        ready.items(.command(.retract(attempt: 1)))
        #expect(ready.said.suffix(2) == [.ready(nanoseconds: 7), .retracted(attempt: 1)])
        var loading = Arrival()
        loading.prepare(1)
        loading.items(.command(.retract(attempt: 1)))
        #expect(!loading.core.acceptsPages(on: Arrival.id))
        loading.feed(.stateLoaded(nanoseconds: 7))
        #expect(loading.said.last == .retracted(attempt: 1))
        #expect(!loading.said.contains(.ready(nanoseconds: 7)))
        for var driver in [ready, loading] {
            driver.prepare(2)
            driver.feed(.stateLoaded(nanoseconds: 8))
            driver.items(.command(.commitWithin(attempt: 2, nanoseconds: 0)))
            #expect(driver.starts == 1 && driver.loaded == [[1], [2]])
        }
    }

    @Test("RETRACT and COMMIT_WITHIN out of turn, or never agreed on, end the migration")
    func outOfTurn() {
        let agreed = FeatureSet.all.subtracting(.resumption)
        for (features, command, prepares) in [
            (agreed, .retract(attempt: 1), false), (agreed, .commitWithin(attempt: 1, nanoseconds: 5), false),
            ([.twoPhaseHandover, .pageBatches], .retract(attempt: 1), true),
            ([.twoPhaseHandover, .pageBatches], .commitWithin(attempt: 1, nanoseconds: 5), true),
        ] as [(FeatureSet, ForwardCommand, Bool)] {
            var driver = Arrival(features: features)
            if prepares {
                if !features.contains(.retraction) { driver.items(.ramRound(final: true), .ramSectionEnded(.end)) }
                driver.prepare(1)
                driver.feed(.stateLoaded(nanoseconds: 7))
            }
            driver.items(.command(command))
            #expect(driver.starts == 0)
            #expect(driver.core.phase == .failed || driver.core.phase == .waiting, "\(command)")
        }
    }

    @Test("with switchover-ack the source hears at once that it may stop the guest", arguments: [false, true])
    func acknowledgement(isOn: Bool) {
        var configuration = Arrival().core.configuration
        configuration.acknowledgesSwitchover = isOn
        var driver = Arrival()
        driver.core = DestinationCore(configuration)
        driver.actions = []
        driver.feed(.accepted(Arrival.id, answers: true))
        driver.items(.header, .configuration(machine: "m"), .command(.openReturnPath))
        #expect(driver.said == (isOn ? [.switchoverAcknowledged] : []))
    }

    @Test("a retracted migration can be asked about, given up and lost like any other")
    func afterwards() {
        var driver = Arrival()
        driver.prepare(1)
        driver.feed(.stateLoaded(nanoseconds: 7))
        driver.items(.command(.retract(attempt: 1)))
        var asked = driver
        asked.feed(.accepted(ConnectionID(2), answers: true))
        for item in [.header, .command(.settle(Arrival.migration))] as [StreamItem] {
            asked.feed(.item(ConnectionID(2), item))
        }
        #expect(asked.core.phase == .failed, "it never starts after that")
        driver.feed(.disconnected(Arrival.id, "gone"))
        #expect(driver.core.phase == .failed && driver.starts == 0)
    }

    // MARK: What was not agreed

    @Test("a source cannot choose to take switchovers back, or to resume, without the two-phase handover")
    func withoutTwoPhases() {
        for feature in [FeatureSet.retraction, .resumption] {
            var arrival = Arrival(features: [.pageBatches, feature])
            #expect(arrival.core.phase == .waiting)
            #expect("\(arrival.actions)".contains("without the two-phase handover"))
            arrival.items(.command(.retract(attempt: 1)))
            #expect(arrival.starts == 0)
        }
        // A destination that offers no two phases is not asked for what needs them.
        var source = SourceCore(
            SourceConfiguration(
                migration: Arrival.migration, machineName: "m",
                blocks: [RAMBlockDescription(name: "ram", length: 1 << 20)]))
        let hello = ReturnPathMessage.hello(
            version: 1, features: FeatureSet.all.subtracting(.twoPhaseHandover),
            instance: MigrationIdentifier(high: 3, low: 4))
        for event in [SourceEvent.start, .connected(.bothWays), .received(hello), .received(.pong(Wire.godwitPing))] {
            _ = source.handle(event)
        }
        #expect(source.rule == .qemu && source.features.isDisjoint(with: [.retraction, .resumption]))
    }

    @Test("RETRACT under QEMU's rule is out of turn, whatever else was chosen")
    func underAnotherRule() {
        var arrival = Arrival(features: [.pageBatches])
        arrival.items(.command(.retract(attempt: 1)))
        #expect("\(arrival.actions)".contains("RETRACT out of turn"))
        #expect(arrival.starts == 0)
    }

    @Test("a channel that is lost while state is loaded is said, and ends the migration only if RAM goes on")
    func lostChannel() {
        for goesOn in [false, true] {
            var arrival = Arrival()
            let channel = ConnectionID(2)
            let mark = MultifdGreeting.Mark(migration: Arrival.migration, channels: 1)
            arrival.feed(.accepted(channel, answers: true))
            arrival.feed(.greeted(channel, MultifdGreeting(channel: 0, mark: mark)))
            arrival.prepare(1)
            let said = arrival.feed(.disconnected(channel, "connection reset"))
            #expect(said.contains(.close(channel)))
            #expect(said.contains(.turnedAway(channel, "channel 0 of the source is lost: connection reset")))
            arrival.feed(.stateLoaded(nanoseconds: 1))
            #expect(arrival.core.phase == .ready)
            arrival.items(.command(goesOn ? .retract(attempt: 1) : .commitWithin(attempt: 1, nanoseconds: .max)))
            #expect(arrival.starts == (goesOn ? 0 : 1))
            #expect(arrival.core.phase == (goesOn ? .failed : .starting))
            guard goesOn else { continue }
            #expect("\(arrival.actions.last!)".contains("channel 0 of the source is lost"))
        }
    }
}
