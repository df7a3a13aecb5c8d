import Glibc
import Migration
import Testing

/// Both cores against each other on virtual time. `GODWIT_SIMULATION_SEEDS=N` runs that many seeds,
/// `GODWIT_SIMULATION_SEED=S` replays one with its trace.
@Suite("Simulation")
struct SimulationTests {
    static func environment(_ name: String) -> UInt64? {
        unsafe getenv(name).flatMap { unsafe UInt64(String(cString: $0)) }
    }

    /// A run that failed, with the trace of its replay.
    private static func report(_ seed: UInt64, bug: PlantedBug? = nil) -> String {
        let replay = Simulator(seed: seed, bug: bug, isTracing: true)
        var ending = ""
        do { ending = "ends as \(try replay.run().rawValue)" } catch { ending = "\(error)" }
        let lines = replay.traceLines
        let shown = lines.count > 400 ? lines.prefix(100) + ["..."] + lines.suffix(300) : lines[...]
        return "seed \(seed): \(ending)\nreplay: GODWIT_SIMULATION_SEED=\(seed) swift test --filter Simulation\n"
            + shown.joined(separator: "\n")
    }

    @Test("no seed leads to two running guests, a lost page, a guest that nobody runs, or an endless wait")
    func seeds() {
        if let seed = Self.environment("GODWIT_SIMULATION_SEED") {
            print(Self.report(seed))
            #expect(throws: Never.self) { try Simulator(seed: seed).run() }
            return
        }
        let count = Self.environment("GODWIT_SIMULATION_SEEDS") ?? 500
        var endings: [RunEnding: Int] = [:]
        var broken = 0
        var resumed = 0
        for seed in 1...max(count, 1) {
            do {
                let simulator = Simulator(seed: seed)
                let ending = try simulator.run()
                endings[ending, default: 0] += 1
                if ending == .completed, simulator.resumptions > 0 { resumed += 1 }
                broken += simulator.brokenSwitchovers
            } catch {
                Issue.record("\(Self.report(seed))")
                return
            }
        }
        let summary = RunEnding.allCases.map { "\($0.rawValue) \(endings[$0, default: 0])" }.joined(separator: ", ")
        print(
            "simulation: \(count) seeds: \(summary); \(broken) switchovers broken off, \(resumed) completed after a resume"
        )
        // Seeds that never get into trouble would prove nothing.
        if count >= 500 {
            #expect(resumed > 20, "hardly a seed completes after its connection was lost")
            #expect(broken > 50, "no seed has a switchover broken off")
            for ending in RunEnding.allCases where ![.stillUnsettled, .pausedInPostcopy].contains(ending) {
                #expect(endings[ending, default: 0] > 0, "no seed ends as \(ending.rawValue)")
            }
        }
    }

    @Test("the same seed gives the same run, step by step")
    func replay() {
        for seed in [3, 77, 1234] as [UInt64] {
            let runs = (0..<2).map { _ in
                let simulator = Simulator(seed: seed, isTracing: true)
                _ = try? simulator.run()
                return simulator.traceLines
            }
            #expect(runs[0] == runs[1])
            #expect(runs[0].count > 20)
        }
    }

    @Test("a planted bug is found within 500 seeds", arguments: PlantedBug.ofPrecopy)
    func plantedBug(bug: PlantedBug) {
        for seed in 1...500 as ClosedRange<UInt64> {
            do { _ = try Simulator(seed: seed, bug: bug).run() } catch {
                #expect(bug.symptoms.contains { error.sentence.contains($0) }, "seed \(seed): \(error)")
                print("simulation: \(bug.rawValue) found by seed \(seed): \(error)")
                return
            }
        }
        Issue.record("no seed of 500 finds \(bug.rawValue)")
    }
}
