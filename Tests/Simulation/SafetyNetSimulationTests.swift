import Migration
import TestSupport
import Testing

/// Both cores, with a guest that moves before its memory and can be taken back.
@Suite("Simulation of a safety net")
struct SafetyNetSimulationTests {
    private static func simulator(_ seed: UInt64, bug: PlantedBug? = nil, isTracing: Bool = false) -> Simulator {
        var generator = SeededRandom(seed: seed &* 104_729)
        var plan = SimulationPlan.random(using: &generator)
        plan.rule = .twoPhase
        var moves = PostcopyPlan.random(using: &generator)
        moves.hasNet = true
        moves.channels = max(moves.channels, 1)
        // Guests that are cut off are what it is about, and a process that dies under them.
        if generator.chance(0.5) {
            let side: SimulationPlan.Side = generator.chance(0.7) ? .destination : .source
            let phase: SourcePhase = generator.chance(0.7) ? .pulled : .pulledWhole
            moves.blows.append(
                (.phase(phase, plus: .random(in: 0...(phase == .pulled ? 900 : 12), using: &generator)), .death(side)))
        }
        plan.postcopy = moves
        if seed % 3 != 0 {
            plan.faults = plan.faults.filter { if case .stall = $0 { true } else { false } }
            (plan.cutSteps, plan.cancelsAfter) = ([], nil)
        }
        plan.bytesPerSecond = min(plan.bytesPerSecond, 20_000_000)
        return Simulator(seed: seed, plan: plan, bug: bug, isTracing: isTracing)
    }

    private static func report(_ seed: UInt64, bug: PlantedBug? = nil) -> String {
        let replay = simulator(seed, bug: bug, isTracing: true)
        var ending = ""
        do { ending = "ends as \(try replay.run().rawValue)" } catch { ending = "\(error)" }
        let lines = replay.traceLines
        let shown = lines.count > 300 ? lines.prefix(60) + ["..."] + lines.suffix(240) : lines[...]
        return "seed \(seed): \(ending)\n" + shown.joined(separator: "\n")
    }

    @Test("no seed leads to a guest that is heard twice, or taken back as it was not, or waits for nobody")
    func seeds() {
        let count = SimulationTests.environment("GODWIT_SIMULATION_SEEDS") ?? 500
        if let seed = SimulationTests.environment("GODWIT_SIMULATION_SEED") {
            print(Self.report(seed))
            #expect(throws: Never.self) { try Self.simulator(seed).run() }
            return
        }
        var endings: [RunEnding: Int] = [:]
        var (takenBack, epochs, later, kept, released) = (0, UInt64(0), 0, 0, 0)
        for seed in 1...max(count, 1) {
            let simulator = Self.simulator(seed)
            do { endings[try simulator.run(), default: 0] += 1 } catch {
                Issue.record("\(Self.report(seed))")
                return
            }
            takenBack += simulator.takenBack
            epochs += simulator.net.keptEpoch
            if simulator.takenBack > 0, simulator.net.keptEpoch > 0 { later += 1 }
            if simulator.net.isKept { kept += 1 }
            if simulator.net.isReleased { released += 1 }
        }
        let summary = RunEnding.allCases.map { "\($0.rawValue) \(endings[$0, default: 0])" }.joined(separator: ", ")
        print(
            "simulation of a safety net: \(count) seeds: \(summary); \(epochs) epochs, \(takenBack) taken back, \(later) of them in an epoch "
                + "after the first, \(released) released, \(kept) kept without a source")
        guard count >= 500 else { return }
        #expect(takenBack > 50 && later > 20, "hardly a guest is taken back")
        #expect(released > 50 && kept > 10, "hardly a guest stays")
    }

    @Test("a bug planted in a safety net is found within 1500 seeds", arguments: PlantedBug.ofNet)
    func plantedBug(bug: PlantedBug) {
        for seed in 1...1500 as ClosedRange<UInt64> {
            do { _ = try Self.simulator(seed, bug: bug).run() } catch {
                #expect(bug.symptoms.contains { error.sentence.contains($0) }, "seed \(seed): \(error)")
                print("simulation: \(bug.rawValue) found by seed \(seed): \(error)")
                return
            }
        }
        Issue.record("no seed of 1500 finds \(bug.rawValue)")
    }
}
