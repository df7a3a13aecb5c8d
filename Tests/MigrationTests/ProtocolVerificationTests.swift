import Migration
import MigrationStream
import Testing

@Suite("protocol: verified pages")
struct ProtocolVerificationTests {
    private static let verifying = FeatureSet.all.union(.verification)
    private static let range = DigestRange(level: .pages, block: 0, first: 512, count: 2)

    private func source() -> SourceCore {
        SourceCore(
            SourceConfiguration(
                migration: MigrationIdentifier(high: 1, low: 2), machineName: "m",
                blocks: [RAMBlockDescription(name: "ram", length: 1 << 20)], features: Self.verifying))
    }

    private func reason(_ actions: [SourceAction]) -> String? {
        actions.compactMap { if case .finished(.failed(let reason)) = $0 { reason } else { nil } }.last
    }

    @Test("a peer that cannot compare digests is refused before anything moves")
    func refused() {
        let hello = { (features: FeatureSet) -> SourceEvent in
            .received(.hello(version: 1, features: features, instance: MigrationIdentifier(high: 3, low: 4)))
        }
        let pong = SourceEvent.received(.pong(Wire.godwitPing))
        for (events, words) in [
            ([SourceEvent.start, .connected(.bothWays), pong], "no Godwit"),
            ([.start, .connected(.bothWays), hello(.all), pong], "knows no digests"),
            ([.start, .connected(.oneWay)], "nobody answers"),
        ] {
            var core = source()
            var actions: [SourceAction] = []
            for event in events { actions += core.handle(event) }
            #expect(reason(actions)?.contains(words) == true, "\(reason(actions) ?? "no failure")")
            #expect(!actions.contains(.startTracking))
            #expect(core.mayRun)
        }
    }

    @Test("the root is said before PREPARE; a destination that asks is answered while the guest runs on here")
    func narrowing() {
        var core = source()
        let cpu = RoundReport(pages: 3, bytes: 12312, nanoseconds: 5000)
        var actions: [SourceAction] = []
        for event in [
            SourceEvent.start, .connected(.bothWays),
            .received(
                .hello(version: 1, features: Self.verifying, instance: MigrationIdentifier(high: 3, low: 4))),
            .received(.pong(Wire.godwitPing)), .trackingStarted, .collected(remainingPages: 3),
            .roundSent(cpu), .collected(remainingPages: 3), .guestStopped(wasRunning: true),
            .collected(remainingPages: 3), .roundSent(cpu), .stateSaved([]),
        ] { actions += core.handle(event) }
        #expect(core.phase == .preparing)
        let root = actions.lastIndex(of: .sendRoot)
        #expect(root == actions.lastIndex { if case .send = $0 { true } else { false } }.map { $0 - 1 })

        actions = core.handle(.received(.digestsWanted(Self.range)))
        #expect(core.phase == .narrowing && core.mayRun)
        #expect(actions.contains(.resumeGuest) && actions.contains(.sendDigests(Self.range)))
        actions = core.handle(.received(.digestsWanted(Self.range)))
        #expect(!actions.contains(.resumeGuest) && actions.contains(.sendDigests(Self.range)))
        var endless = core
        for _ in 0..<1 << 16 where endless.phase == .narrowing {
            actions = endless.handle(.received(.digestsWanted(Self.range)))
        }
        #expect(reason(actions)?.contains("without end") == true && endless.mayRun)
        actions = core.handle(.received(.failure(reason: "x-verify: 1 page")))
        #expect(reason(actions)?.contains("x-verify: 1 page") == true && core.mayRun)
    }

    private func destination() -> (DestinationCore, ConnectionID) {
        var core = DestinationCore(
            DestinationConfiguration(
                instance: MigrationIdentifier(high: 5, low: 6), machineName: "m", sections: [],
                features: Self.verifying))
        let id = ConnectionID(1)
        _ = core.handle(.accepted(id, answers: true))
        for item in [
            StreamItem.header, .configuration(machine: "m"), .command(.openReturnPath),
            .command(.ping(Wire.godwitPing)),
            .command(.begin(MigrationIdentifier(high: 1, low: 2), Self.verifying)), .ramSetup([]),
            .ramSectionEnded(.start), .ramRound(final: false), .ramSectionEnded(.part),
        ] { _ = core.handle(.item(id, item)) }
        return (core, id)
    }

    private func loads(_ actions: [DestinationAction]) -> Bool {
        actions.contains { if case .loadState = $0 { true } else { false } }
    }

    @Test("state is loaded only behind a root that is ours, and pages make it void")
    func gate() {
        var (core, id) = destination()
        #expect(core.handle(.item(id, .command(.root(5)))).contains(.compareRoot(5)))
        _ = core.handle(.compared(.same))
        #expect(loads(core.handle(.item(id, .command(.prepare)))))

        (core, id) = destination()
        _ = core.handle(.item(id, .command(.root(5))))
        _ = core.handle(.compared(.same))
        _ = core.handle(.item(id, .ramRound(final: false)))
        #expect(!loads(core.handle(.item(id, .command(.prepare)))) && core.phase == .failed)

        (core, id) = destination()
        #expect(!loads(core.handle(.item(id, .command(.prepare)))) && core.phase == .failed)
    }

    @Test("a root that differs is asked about; PREPARE and RETRACT that were on their way mean nothing then")
    func asks() {
        var (core, id) = destination()
        _ = core.handle(.item(id, .command(.root(5))))
        var writer = StreamWriter()
        writer.message(.digestsWanted(Self.range))
        #expect(core.handle(.compared(.ask(Self.range))).contains(.send(id, writer.bytes)))
        #expect(!loads(core.handle(.item(id, .command(.prepare)))))
        _ = core.handle(.item(id, .command(.retract(attempt: 1))))
        #expect(core.phase == .receiving)
        let answer = core.handle(.item(id, .command(.digests(Self.range, [1, 2]))))
        #expect(answer.contains(.compareDigests(Self.range, [1, 2])))
        let end = core.handle(.compared(.corrupt("two pages")))
        #expect(core.phase == .failed && end.contains(.finished(.failed("two pages"))))
    }
}
