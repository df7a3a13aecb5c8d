import Host
import TestSupport
import Testing

@Suite(
    "A guest that moves before its memory is never lost with a connection, and never there twice", .serialized,
    .timeLimit(.minutes(10)), .enabled(if: Workbench.hasKVM, "needs /dev/kvm"))
struct PostcopyFaultTests {
    /// `GODWIT_FAULT_SEED` replays a run, `GODWIT_FAULT_RUNS` makes it longer.
    private func run(kills: Bool, hasNet: Bool = false, name: String) throws {
        let seed = TestEnvironment.number("GODWIT_FAULT_SEED") ?? .random(in: 0..<1_000_000)
        let count = TestEnvironment.number("GODWIT_FAULT_RUNS").map(Int.init(_:)) ?? 12
        print("postcopy faults: seed \(seed), \(count) migrations, \(name); GODWIT_FAULT_SEED=\(seed) strikes alike")
        let began = Clock.monotonicNanoseconds
        let campaign = try PostcopyCampaign(seed: seed, kills: kills, hasNet: hasNet)
        try campaign.run(count: count)
        for violation in campaign.violations { Issue.record("\(violation)") }
        #expect(campaign.struck >= count, "seed \(seed): only \(campaign.struck) migrations were struck")
        let seconds = (Clock.monotonicNanoseconds - began) / 1_000_000_000
        print(
            "postcopy faults: \(campaign.struck) blows, \(campaign.recoveries) new connections in \(seconds) s, seed \(seed)"
        )
        for (ending, number) in campaign.endings.sorted(by: { $0.key < $1.key }) { print("  \(number) x \(ending)") }
    }

    @Test("connections cut, stalled and half closed at random moments: each is replaced, and every page is right")
    func connections() throws { try run(kills: false, name: "connections") }

    @Test("source or destination killed at random moments: what is left is what the documentation promises")
    func processes() throws { try run(kills: true, name: "processes killed") }

    @Test("with a safety net lost connections are replaced all the same, and every page is right")
    func connectionsWithNet() throws { try run(kills: false, hasNet: true, name: "connections, safety net") }

    @Test("with a safety net no guest is lost with its destination, and none with its source that is all there")
    func processesWithNet() throws { try run(kills: true, hasNet: true, name: "processes killed, safety net") }
}
