import Host
import TestSupport
import Testing

@Suite(
    "A migration that is struck never has two guests, and loses none that could be kept", .serialized,
    .timeLimit(.minutes(10)), .enabled(if: Workbench.hasKVM, "needs /dev/kvm"))
struct FaultTests {
    /// `GODWIT_FAULT_SEED` replays a run, `GODWIT_FAULT_RUNS` makes it longer.
    @Test(
        "processes killed, connections cut and held, at random points of migrations of a guest at work",
        arguments: [0, 3])
    func randomPoints(channels: Int) throws {
        let seed = TestEnvironment.number("GODWIT_FAULT_SEED") ?? .random(in: 0..<1_000_000)
        let points = TestEnvironment.number("GODWIT_FAULT_RUNS").map(Int.init(_:)) ?? (channels == 0 ? 50 : 25)
        print(
            "fault injection: seed \(seed), \(points) points, \(channels) channels; GODWIT_FAULT_SEED=\(seed) aims at the same ones again"
        )
        let began = Clock.monotonicNanoseconds
        let campaign = try Campaign(seed: seed, channels: channels)
        try campaign.run(points: points)
        for violation in campaign.violations { Issue.record("\(violation)") }
        #expect(campaign.struck >= points, "seed \(seed): only \(campaign.struck) migrations were struck")
        let seconds = (Clock.monotonicNanoseconds - began) / 1_000_000_000
        print("fault injection: \(campaign.struck) blows in \(seconds) s, seed \(seed)")
        for (ending, count) in campaign.endings.sorted(by: { $0.key < $1.key }) { print("  \(count) x \(ending)") }
    }
}
