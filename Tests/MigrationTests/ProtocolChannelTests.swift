import Migration
import MigrationStream
import Testing

/// A destination core with what it did; connection 1 is the source's, the channels follow.
private struct Driver: DestinationDriver {
    var core: DestinationCore
    var actions: [DestinationAction] = []
    static let main = ConnectionID(1)
    static let migration = MigrationIdentifier(high: 1, low: 2)

    init(expecting channels: Int? = nil, uuid: MigrationIdentifier? = nil) {
        var configuration = DestinationConfiguration(
            instance: MigrationIdentifier(high: 5, low: 6), machineName: "m", sections: [])
        configuration.multifdChannels = channels
        configuration.uuid = uuid
        core = DestinationCore(configuration)
    }

    mutating func open() {
        feed(.accepted(Self.main, answers: true))
        items(.header, .configuration(machine: "m"), .command(.openReturnPath), .command(.ping(Wire.godwitPing)))
    }

    /// A connection that greets. - Returns: what the core says to it.
    @discardableResult
    mutating func greet(
        _ id: UInt64, channel: UInt8, of count: Int? = nil, migration: MigrationIdentifier = Driver.migration
    ) -> [DestinationAction] {
        let mark = count.map { MultifdGreeting.Mark(migration: migration, channels: $0) }
        return feed(
            .accepted(ConnectionID(id), answers: true),
            .greeted(ConnectionID(id), MultifdGreeting(channel: channel, mark: mark)))
    }

    var admitted: [UInt64] {
        actions.compactMap { if case .admit(let id, _) = $0 { id.rawValue } else { nil } }
    }

    var turnedAway: [UInt64: String] {
        var sentences: [UInt64: String] = [:]
        for case .turnedAway(let id, let sentence) in actions { sentences[id.rawValue] = sentence }
        return sentences
    }

    var outcome: DestinationOutcome? {
        actions.compactMap { if case .finished(let outcome) = $0 { outcome } else { nil } }.last
    }

    func timer(_ kind: ProtocolTimer.Kind) -> ProtocolTimer? {
        actions.compactMap { if case .setTimer(let timer, _) = $0, timer.kind == kind { timer } else { nil } }.last
    }
}

@Suite("Destination core and the channels of multifd")
struct ProtocolChannelTests {
    @Test("a Godwit's channels are admitted when their migration begins, whether they greeted before or after")
    func godwit() {
        var driver = Driver()
        driver.greet(2, channel: 0, of: 2)
        driver.open()
        #expect(driver.admitted.isEmpty)
        driver.items(.command(.begin(Driver.migration, .all.subtracting(.resumption))))
        #expect(driver.admitted == [2])
        driver.greet(3, channel: 1, of: 2)
        #expect(driver.admitted == [2, 3])
        #expect(driver.actions.contains(.admit(ConnectionID(3), of: 2)))
        driver.items(.ramSetup([]))
        #expect(driver.core.acceptsPages(on: ConnectionID(2)) && driver.core.acceptsPages(on: ConnectionID(3)))
        #expect(driver.timer(.channels) == nil)
        driver.items(.multifdFlush, .ramSectionEnded(.start), .ramRound(final: true), .multifdFlush)
        driver.items(.ramSectionEnded(.end))
        #expect(!driver.core.acceptsPages(on: ConnectionID(2)))
        #expect(driver.outcome == nil)
    }

    @Test("strangers that greet as channels are turned away with a sentence, and the migration goes on")
    func strangers() {
        var driver = Driver()
        let other = MigrationIdentifier(high: 9, low: 9)
        driver.greet(2, channel: 0, of: 2, migration: other)
        driver.greet(3, channel: 0)
        #expect(driver.turnedAway[3]?.contains("set the capability multifd") == true)
        driver.open()
        driver.items(.command(.begin(Driver.migration, .all.subtracting(.resumption))))
        #expect(driver.turnedAway[2]?.contains("another migration") == true)
        driver.greet(4, channel: 0, of: 2)
        driver.greet(5, channel: 0, of: 2)
        driver.greet(6, channel: 1, of: 3)
        driver.greet(7, channel: 1, of: 2, migration: other)
        #expect(driver.turnedAway[5]?.contains("channel 0 is here already") == true)
        #expect(driver.turnedAway[6]?.contains("counts the channels otherwise") == true)
        #expect(driver.turnedAway[7]?.contains("another migration") == true)
        driver.greet(8, channel: 1, of: 2)
        driver.items(.ramSetup([]), .multifdFlush)
        #expect(driver.admitted == [4, 8])
        #expect(driver.outcome == nil)
        for id: UInt64 in [2, 3, 5, 6, 7] {
            #expect(driver.actions.contains(.close(ConnectionID(id))))
            #expect(!driver.core.acceptsPages(on: ConnectionID(id)))
        }
    }

    @Test("a migration that chose no multifd has no channels")
    func notChosen() {
        var driver = Driver()
        driver.open()
        driver.items(.command(.begin(Driver.migration, [.twoPhaseHandover])), .ramSetup([]))
        driver.greet(2, channel: 0, of: 1)
        #expect(driver.admitted.isEmpty && driver.timer(.channels) == nil)
        driver.items(.multifdFlush)
        #expect(driver.outcome.map { "\($0)" }?.contains("set the capability multifd") == true)
    }

    @Test("QEMU's channels are admitted when RAM begins, as many as the operator said")
    func qemu() {
        var driver = Driver(expecting: 2)
        driver.feed(.accepted(Driver.main, answers: true))
        driver.items(.header, .configuration(machine: "m"))
        driver.greet(2, channel: 1)
        #expect(driver.admitted.isEmpty)
        driver.items(.ramSetup([]))
        #expect(driver.admitted == [2])
        #expect(driver.timer(.channels) != nil)
        driver.greet(4, channel: 0)
        #expect(driver.admitted == [2, 4])
        #expect(driver.actions.contains(.cancelTimer(.channels)))
    }

    @Test(
        "a QEMU with more channels than the operator said is refused: some of its pages would be missed",
        arguments: [false, true])
    func oneTooMany(afterRAMBegan: Bool) {
        var driver = Driver(expecting: 2)
        driver.feed(.accepted(Driver.main, answers: true))
        driver.items(.header, .configuration(machine: "m"))
        driver.greet(2, channel: 1)
        if afterRAMBegan { driver.items(.ramSetup([])) }
        driver.greet(3, channel: 2)
        if !afterRAMBegan { driver.items(.ramSetup([])) }
        #expect(driver.turnedAway[3]?.contains("only 2 are expected") == true)
        #expect(driver.outcome.map { "\($0)" }?.contains("more channels than are expected") == true)
        #expect(driver.core.status == .none && driver.actions.last != .report(.active), "it is told to go on")
    }

    @Test("a channel of another machine ends nothing, whatever number it has")
    func anotherMachine() {
        let own = MigrationIdentifier(high: 7, low: 8)
        var driver = Driver(expecting: 1, uuid: own)
        driver.feed(.accepted(Driver.main, answers: true))
        driver.items(.header, .configuration(machine: "m"), .ramSetup([]))
        driver.feed(
            .accepted(ConnectionID(2), answers: true), .greeted(ConnectionID(2), MultifdGreeting(channel: 9)))
        #expect(driver.turnedAway[2]?.contains("UUID") == true)
        #expect(driver.outcome == nil)
        driver.feed(
            .accepted(ConnectionID(3), answers: true),
            .greeted(ConnectionID(3), MultifdGreeting(channel: 9, uuid: own)))
        #expect(driver.outcome.map { "\($0)" }?.contains("more channels than are expected") == true)
    }

    @Test("channels that do not come in time end the migration")
    func late() throws {
        var driver = Driver(expecting: 4)
        driver.feed(.accepted(Driver.main, answers: true))
        driver.items(.header, .configuration(machine: "m"))
        driver.greet(2, channel: 0)
        driver.items(.ramSetup([]))
        let timer = try #require(driver.timer(.channels))
        driver.feed(.timer(timer))
        #expect(driver.outcome.map { "\($0)" }?.contains("only 1 of 4 channels") == true)
        #expect(driver.actions.contains(.close(ConnectionID(2))) && driver.actions.contains(.close(Driver.main)))
        #expect(!driver.core.acceptsPages(on: ConnectionID(2)))
    }

    @Test("a channel that fails ends the migration while pages are missing, and nothing afterwards")
    func lost() {
        for isComplete in [false, true] {
            var driver = Driver()
            driver.greet(2, channel: 0, of: 1)
            driver.open()
            driver.items(
                .command(.begin(Driver.migration, .all.subtracting(.resumption))), .ramSetup([]), .ramRound(final: true)
            )
            if isComplete { driver.items(.ramSectionEnded(.end)) }
            driver.feed(.disconnected(ConnectionID(2), "connection reset"))
            let failed = driver.outcome.map { "\($0)" }?.contains("channel 0 of the source failed: connection reset")
            #expect(failed == (isComplete ? nil : true))
            #expect(driver.actions.contains(.close(ConnectionID(2))))
        }
    }

    @Test(
        "what a channel has placed spoils the memory, though the stream has not come to its pages",
        arguments: [true, false])
    func ahead(places: Bool) {
        var driver = Driver()
        driver.greet(2, channel: 0, of: 1)
        driver.open()
        driver.items(
            .command(.begin(Driver.migration, .all.subtracting(.resumption))), .ramSetup([]), .multifdFlush,
            .ramSectionEnded(.start))
        if places {
            let takes = driver.core.takesPages(on: ConnectionID(2))
            #expect(takes)
        }
        driver.feed(.disconnected(ConnectionID(2), "connection reset"))
        #expect(driver.core.phase == (places ? .failed : .waiting), "the next source would find pages of this one")
    }

    @Test("a channel whose migration never begins leaves when its time is over")
    func forgotten() throws {
        var driver = Driver()
        driver.greet(2, channel: 0, of: 1)
        let timer = try #require(driver.timer(.visitor(ConnectionID(2))))
        driver.feed(.timer(timer))
        #expect(driver.turnedAway[2] != nil && driver.core.phase == .waiting)
    }

    @Test("all channels of a source and some strangers fit, and no more")
    func limit() {
        var driver = Driver()
        for id in 1...UInt64(StreamLimit.multifdChannels + 8) {
            driver.feed(.accepted(ConnectionID(id), answers: true))
        }
        #expect(driver.turnedAway.isEmpty)
        driver.feed(.accepted(ConnectionID(1000), answers: true))
        #expect(driver.turnedAway[1000] == nil && driver.turnedAway[1] != nil)
    }

    @Test("channels whose migration never begins do not keep the source out, however many there are")
    func crowd() {
        var driver = Driver()
        let other = MigrationIdentifier(high: 9, low: 9)
        for id in 100..<UInt64(100 + StreamLimit.multifdChannels + 8) {
            driver.greet(id, channel: 0, of: 1, migration: other)
        }
        driver.open()
        #expect(driver.turnedAway[Driver.main.rawValue] == nil)
        #expect(driver.turnedAway[100]?.contains("whose migration has not begun") == true)
        #expect(driver.core.phase == .opened)
    }

    // MARK: Source

    private func source(_ mode: MultifdMode?) -> SourceCore {
        var configuration = SourceConfiguration(
            migration: Driver.migration, machineName: "m", blocks: [RAMBlockDescription(name: "ram", length: 1 << 20)])
        configuration.multifd = mode
        return SourceCore(configuration)
    }

    private static func hello(_ features: FeatureSet) -> SourceEvent {
        .received(.hello(version: 1, features: features, instance: MigrationIdentifier(high: 3, low: 4)))
    }

    @Test(
        "a source asks for SYNC behind its block list, marks it by its mode, and tells a Godwit",
        arguments: [true, false])
    func sourceSynchronizes(isGodwit: Bool) throws {
        for mode in [MultifdMode.flush, .eachSection, nil] {
            var core = source(mode)
            var actions: [SourceAction] = []
            let greeting = isGodwit ? [Self.hello(.all)] : []
            for event in [.start, .connected(.bothWays)] + greeting + [
                .received(.pong(Wire.godwitPing)), .trackingStarted,
            ] { actions += core.handle(event) }
            #expect(actions.contains(.synchronizeChannels) == (mode != nil))
            var stream: [UInt8] = []
            for case .send(let bytes) in actions { stream += bytes }
            var buffer = ReceiveBuffer()
            buffer.append(stream)
            var decoder = StreamDecoder(.describe(catalogue: SectionCatalogue()))
            var items: [StreamItem] = []
            while let item = try decoder.next(from: &buffer) { items.append(item) }
            #expect(items.contains(.multifdFlush) == (mode == .flush))
            let features = FeatureSet.all.subtracting(mode == nil ? [.resumption, .multifd] : .resumption)
            #expect(items.contains(.command(.begin(Driver.migration, features))) == isGodwit)
        }
    }

    @Test("a Godwit destination that knows no multifd is told so in a sentence")
    func oldGodwit() {
        var core = source(.flush)
        var actions: [SourceAction] = []
        for event in [.start, .connected(.bothWays), Self.hello([.twoPhaseHandover, .pageBatches])] {
            actions += core.handle(event)
        }
        #expect(actions.contains(.report(.failed)))
        #expect("\(actions)".contains("knows no multifd"))
        #expect(core.mayRun)
    }
}
