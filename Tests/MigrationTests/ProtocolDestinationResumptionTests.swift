import Migration
import MigrationStream
import Testing

private let migration = MigrationIdentifier(high: 1, low: 2)
private let there = MigrationIdentifier(high: 3, low: 4)
/// Every connection that there is in a test.
private let everybody = (1...1000 as ClosedRange<UInt64>).map { ConnectionID($0) }

/// A destination core; connection 1 is the first source's.
private struct Destination: DestinationDriver {
    var core: DestinationCore
    var actions: [DestinationAction] = []
    static let first = ConnectionID(1)

    init(features: FeatureSet = .all.union(.verification), acknowledges: Bool = false) {
        var configuration = DestinationConfiguration(
            instance: there, machineName: "m", sections: [ExpectedSection(name: "cpu")], features: features)
        configuration.acknowledgesSwitchover = acknowledges
        core = DestinationCore(configuration)
    }

    static let agreed = FeatureSet.all.subtracting(.multifd)

    mutating func open(_ id: ConnectionID = Self.first, machine: String = "m") {
        feed(.accepted(id, answers: true))
        items(
            .header, .configuration(machine: machine), .command(.openReturnPath), .command(.ping(Wire.godwitPing)),
            from: id)
    }

    mutating func receive(_ id: ConnectionID = Self.first) {
        items(
            .ramSetup([]), .ramSectionEnded(.start), .ramRound(final: false), .zeroPage(block: 0, offset: 0), from: id)
    }

    mutating func prepare(_ id: ConnectionID = Self.first) {
        let head = SectionHead(type: .full, id: 9, name: "cpu", instance: 0, version: 1)
        items(.ramSectionEnded(.part), .device(head, body: [1]), .command(.prepare), from: id)
    }

    static func receiving(_ features: FeatureSet = agreed) -> Destination {
        var destination = Destination()
        destination.open()
        destination.items(.command(.begin(migration, features)))
        destination.receive()
        return destination
    }

    static var kept: Destination {
        var destination = receiving()
        destination.feed(.disconnected(first, "reset"))
        return destination
    }

    mutating func resume(_ id: ConnectionID, _ name: MigrationIdentifier = migration, _ features: FeatureSet = agreed) {
        open(id)
        items(.command(.resume(name, features)), from: id)
    }

    func failure(on id: ConnectionID) -> String? {
        said(on: id).compactMap { if case .failure(let reason) = $0 { reason } else { nil } }.last
    }

    var starts: Int { actions.count { if case .startGuest = $0 { true } else { false } } }
    var hasFailed: Bool { actions.contains { if case .finished(.failed) = $0 { true } else { false } } }

    var deadline: (event: DestinationEvent, nanoseconds: UInt64) {
        let timers = actions.compactMap { action -> (ProtocolTimer, UInt64)? in
            if case .setTimer(let timer, let nanoseconds) = action, timer.kind == .deadline {
                (timer, nanoseconds)
            } else {
                nil
            }
        }
        guard let last = timers.last else { return (.giveUp, 0) }
        return (.timer(last.0), last.1)
    }
}

@Suite("Resumption at the destination")
struct DestinationResumptionTests {
    private let second = ConnectionID(2)
    private let third = ConnectionID(3)

    @Test("a source lost while RAM or state comes, or before COMMIT, is waited for, for a day at most")
    func keeps() {
        for steps in 0...2 {
            var destination = Destination.receiving()
            if steps > 0 { destination.prepare() }
            if steps > 1 { destination.feed(.stateLoaded(nanoseconds: 1)) }
            let phase = destination.core.phase
            destination.feed(.disconnected(Destination.first, "reset"))
            #expect(destination.core.phase == .kept && destination.core.status == .paused, "\(phase)")
            #expect(destination.deadline.nanoseconds == 86_400_000_000_000)
            #expect(destination.items(.command(.commit)).isEmpty && destination.starts == 0, "a late COMMIT counts")
            #expect(!destination.core.acceptsPages(on: Destination.first))
            destination.feed(destination.deadline.event)
            #expect(destination.core.status == .failed && destination.hasFailed)
        }
    }

    @Test("a source that says nothing any more is taken for lost, and what it sent is kept")
    func silent() {
        var destination = Destination.receiving()
        destination.feed(destination.deadline.event)
        #expect(destination.core.phase == .kept)
    }

    @Test("RAM of which nothing came is not kept: another source may come")
    func untouched() {
        var destination = Destination()
        destination.open()
        destination.items(.command(.begin(migration, Destination.agreed)))
        destination.feed(.disconnected(Destination.first, "reset"))
        #expect(destination.core.phase == .waiting)
        destination.resume(second)
        #expect(destination.failure(on: second)?.contains("not kept here") == true)
        #expect(destination.core.phase == .waiting && !destination.hasFailed)
    }

    @Test("RESUMED is said only when nobody places pages of the lost connection any more")
    func waitsForReaders() {
        var destination = Destination.kept
        destination.resume(second)
        #expect(destination.core.phase == .rejoining)
        #expect(destination.actions.contains(.awaitReaders([Destination.first])))
        #expect(!destination.said(on: second).contains(.resumed) && !destination.core.acceptsPages(on: second))
        destination.feed(.readersEnded(everybody))
        #expect(destination.said(on: second).last == .resumed)
        destination.receive(second)
        #expect(destination.core.acceptsPages(on: second) && !destination.core.acceptsPages(on: Destination.first))
        destination.prepare(second)
        destination.feed(.stateLoaded(nanoseconds: 1))
        destination.items(.command(.commitWithin(attempt: 1, nanoseconds: .max)), from: second)
        #expect(destination.starts == 1)
    }

    @Test("RESUME may come before the loss is known: the old connection is closed, and its COMMIT starts nothing")
    func earlier() {
        var destination = Destination.receiving()
        destination.prepare()
        destination.feed(.stateLoaded(nanoseconds: 1))
        #expect(destination.core.phase == .ready)
        destination.resume(second)
        #expect(destination.actions.contains(.close(Destination.first)))
        destination.items(.command(.commitWithin(attempt: 1, nanoseconds: .max)))
        #expect(destination.starts == 0)
        destination.feed(.readersEnded(everybody))
        destination.items(.command(.commitWithin(attempt: 1, nanoseconds: .max)), from: second)
        #expect(destination.starts == 0, "the state that was loaded is void")
    }

    @Test(
        "RESUME of another migration, with other features, without a way back, or that comes twice, is refused, and what is kept stays"
    )
    func hostile() {
        var destination = Destination.kept
        destination.resume(second, MigrationIdentifier(high: 1, low: 3))
        #expect(destination.failure(on: second)?.contains("is not kept here") == true)
        destination.resume(third, migration, [.twoPhaseHandover, .resumption])
        #expect(destination.failure(on: third)?.contains("is not kept here") == true)
        let mute = ConnectionID(4)
        destination.feed(.accepted(mute, answers: true))
        destination.items(
            .header, .configuration(machine: "m"), .command(.resume(migration, Destination.agreed)), from: mute)
        #expect(destination.failure(on: mute)?.contains("return path") == true)
        let stranger = ConnectionID(5)
        destination.open(stranger)
        destination.items(.command(.begin(MigrationIdentifier(high: 7, low: 7), .all)), from: stranger)
        #expect(destination.failure(on: stranger)?.contains("another migration") == true)
        #expect(destination.core.phase == .kept && !destination.hasFailed)

        let returning = ConnectionID(6)
        destination.resume(returning)
        destination.feed(.readersEnded(everybody))
        destination.receive(returning)
        destination.items(.command(.resume(migration, Destination.agreed)), from: returning)
        #expect(destination.hasFailed, "RESUME on the source's own connection, twice, is out of turn")
    }

    @Test("a RESUME from a third connection replaces the second; each time old pages are waited for")
    func replaced() {
        var destination = Destination.kept
        destination.resume(second)
        destination.resume(third)
        #expect(destination.actions.contains(.close(second)))
        #expect(destination.actions.contains(.awaitReaders([Destination.first, second])))
        destination.feed(.readersEnded(everybody))
        #expect(destination.said(on: third).last == .resumed && !destination.said(on: second).contains(.resumed))
    }

    @Test("who waited for the readers of an earlier connection does not answer for those of a later one")
    func lateAnswer() {
        var destination = Destination.kept
        destination.resume(second)
        destination.feed(.readersEnded([Destination.first]))
        destination.receive(second)
        destination.feed(.disconnected(second, "reset"))
        destination.resume(third)
        #expect(destination.actions.contains(.awaitReaders([second])))
        // A second thread had waited for the first connection, and is late.
        destination.feed(.readersEnded([Destination.first]))
        #expect(!destination.said(on: third).contains(.resumed), "the second connection's pages may still be placed")
        destination.feed(.readersEnded([second]))
        #expect(destination.said(on: third).last == .resumed)
    }

    @Test("a connection lost while it takes the migration up leaves it kept")
    func lostAgain() {
        for ended in [false, true] {
            var destination = Destination.kept
            destination.resume(second)
            if ended { destination.feed(.readersEnded(everybody)) }
            destination.feed(.disconnected(second, "reset"))
            #expect(destination.core.phase == .kept)
            destination.feed(.readersEnded(everybody))
            destination.resume(third)
            destination.feed(.readersEnded(everybody))
            #expect(destination.said(on: third).last == .resumed)
        }
    }

    @Test("a stranger that pings on and on is heard once")
    func chatter() {
        var destination = Destination.kept
        destination.open(second)
        destination.items(.command(.ping(Wire.godwitPing)), .command(.ping(Wire.godwitPing)), from: second)
        #expect(destination.said(on: second).count { $0 == .pong(Wire.godwitPing) } == 1)
        #expect(destination.actions.contains(.close(second)) && destination.core.phase == .kept)
    }

    @Test("strangers with the right machine do not keep the source out, however many there are")
    func crowd() {
        var destination = Destination.kept
        for number in 10..<200 as Range<UInt64> { destination.open(ConnectionID(number)) }
        destination.resume(ConnectionID(1000))
        destination.feed(.readersEnded(everybody))
        #expect(destination.said(on: ConnectionID(1000)).last == .resumed)
    }

    @Test("a source that ends the migration, and the destination's own operator, free what is kept at once")
    func freed() {
        var settled = Destination.kept
        settled.feed(.accepted(second, answers: true))
        settled.items(.header, .command(.settle(migration)), from: second)
        #expect(settled.hasFailed && settled.said(on: second) == [.verdict(.neverStarted)])
        settled.resume(third)
        #expect(settled.failure(on: third) != nil && settled.core.phase == .failed, "it came back")

        var discarded = Destination.kept
        discarded.feed(.discard)
        #expect(discarded.hasFailed && discarded.core.status == .failed)
        var receiving = Destination.receiving()
        #expect(receiving.feed(.discard).isEmpty, "a migration whose source is here is ended there")
        #expect(receiving.core.phase == .receiving)
    }

    @Test("after RESUMED, memory must be compared anew, also when a comparison was under way")
    func verification() {
        let features = Destination.agreed.union(.verification)
        for isNarrowing in [false, true] {
            var destination = Destination.receiving(features)
            destination.items(.ramSectionEnded(.part), .command(.root(5)))
            let range = DigestRange(level: .groups, block: 0, first: 0, count: 1)
            destination.feed(.compared(isNarrowing ? .ask(range) : .same))
            destination.feed(.disconnected(Destination.first, "reset"))
            destination.resume(second, migration, features)
            destination.feed(.readersEnded(everybody))
            destination.receive(second)
            if !isNarrowing {
                var hasty = destination
                hasty.prepare(second)
                #expect(hasty.hasFailed, "PREPARE without ROOT counts")
            }
            #expect(destination.items(.command(.root(5)), from: second).contains(.compareRoot(5)))
            destination.feed(.compared(.same))
            destination.prepare(second)
            #expect(destination.core.phase == .loading)
        }
    }

    @Test("SWITCHOVER_ACK is said again after RESUMED, where the source waits for it")
    func acknowledgement() {
        var destination = Destination(acknowledges: true)
        destination.open()
        destination.items(.command(.begin(migration, Destination.agreed)))
        destination.receive()
        destination.feed(.disconnected(Destination.first, "reset"))
        destination.resume(second)
        destination.feed(.readersEnded(everybody))
        #expect(destination.said(on: second).suffix(2) == [.resumed, .switchoverAcknowledged])
    }

    @Test("channels of a source that comes back may greet before the loss of the old ones is known")
    func channelsBeforeTheLoss() {
        let features = FeatureSet.all
        var destination = Destination.receiving(features)
        let greeting = MultifdGreeting(channel: 0, mark: MultifdGreeting.Mark(migration: migration, channels: 1))
        destination.feed(.accepted(second, answers: true), .greeted(second, greeting))
        #expect(destination.actions.contains(.admit(second, of: 1)))
        let (main, fresh) = (ConnectionID(3), ConnectionID(4))
        destination.open(main)
        destination.feed(.accepted(fresh, answers: true), .greeted(fresh, greeting))
        #expect(!destination.actions.contains(.close(fresh)) && !destination.actions.contains(.admit(fresh, of: 1)))
        destination.items(.command(.resume(migration, features)), from: main)
        destination.feed(.readersEnded(everybody))
        #expect(destination.said(on: main).last == .resumed)
        #expect(destination.actions.contains(.admit(fresh, of: 1)) && !destination.actions.contains(.close(fresh)))
    }

    @Test("channels that came before their main connection belong to one that was lost")
    func channels() {
        let features = FeatureSet.all
        var destination = Destination.receiving(features)
        func greeting(_ count: Int) -> MultifdGreeting {
            MultifdGreeting(channel: 0, mark: MultifdGreeting.Mark(migration: migration, channels: count))
        }
        destination.feed(.accepted(second, answers: true), .greeted(second, greeting(1)))
        #expect(destination.actions.contains(.admit(second, of: 1)))
        destination.feed(.disconnected(second, "reset"))
        #expect(destination.core.phase == .kept, "a lost channel is a lost connection")
        let (stale, main, fresh) = (ConnectionID(3), ConnectionID(4), ConnectionID(5))
        destination.feed(.accepted(stale, answers: true), .greeted(stale, greeting(1)))
        destination.resume(main, migration, features)
        destination.feed(.accepted(fresh, answers: true), .greeted(fresh, greeting(1)), .readersEnded(everybody))
        #expect(destination.actions.contains(.admit(fresh, of: 1)))
        #expect(!destination.actions.contains(.admit(stale, of: 1)) && destination.actions.contains(.close(stale)))
    }
}
