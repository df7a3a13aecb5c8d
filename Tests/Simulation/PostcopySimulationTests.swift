import Migration
import TestSupport
import Testing

/// Both cores, with a guest that moves before its memory.
@Suite("Simulation of postcopy")
struct PostcopySimulationTests {
    private static func simulator(_ seed: UInt64, bug: PlantedBug? = nil, isTracing: Bool = false) -> Simulator {
        var generator = SeededRandom(seed: seed &* 7919)
        var plan = SimulationPlan.random(using: &generator)
        plan.rule = seed % 4 == 3 ? .qemu : .twoPhase
        plan.postcopy = .random(using: &generator)
        // Every other one comes to the move, however often that is taken back, and is struck behind it.
        if seed % 2 == 0 {
            plan.faults = plan.faults.filter { if case .stall = $0 { true } else { false } }
            (plan.cutSteps, plan.cancelsAfter) = ([], nil)
        }
        // By then precopy would often be over.
        plan.bytesPerSecond = min(plan.bytesPerSecond, 100_000_000)
        if plan.rule == .qemu {
            plan.isResumable = false
            // Behind RUN a host that cannot load the state has lost the guest: there is no protocol in that.
            plan.faults = plan.faults.filter { if case .localFailure(.destination, _, _) = $0 { false } else { true } }
        }
        return Simulator(seed: seed, plan: plan, bug: bug, isTracing: isTracing)
    }

    private static func report(_ seed: UInt64, bug: PlantedBug? = nil) -> String {
        let replay = simulator(seed, bug: bug, isTracing: true)
        var ending = ""
        do { ending = "ends as \(try replay.run().rawValue)" } catch { ending = "\(error)" }
        let lines = replay.traceLines
        let shown = lines.count > 400 ? lines.prefix(100) + ["..."] + lines.suffix(300) : lines[...]
        return "seed \(seed): \(ending)\n" + shown.joined(separator: "\n")
    }

    @Test(
        "no seed leads to two running guests, a wrong page, a page answered twice, a guest that waits for nobody, or one given up"
    )
    func seeds() {
        let count = SimulationTests.environment("GODWIT_SIMULATION_SEEDS") ?? 500
        if let seed = SimulationTests.environment("GODWIT_SIMULATION_SEED") {
            print(Self.report(seed))
            #expect(throws: Never.self) { try Self.simulator(seed).run() }
            return
        }
        var endings: [RunEnding: Int] = [:]
        var (moved, takenBack, waits, recovered, again, ahead) = (0, 0, 0, 0, 0, 0)
        for seed in 1...max(count, 1) {
            let simulator = Self.simulator(seed)
            do {
                let ending = try simulator.run()
                endings[ending, default: 0] += 1
                if ending == .completed, simulator.recoveries > 0 { recovered += 1 }
                if ending == .completed, simulator.recoveries > 1 { again += 1 }
            } catch {
                Issue.record("\(Self.report(seed))")
                return
            }
            if simulator.pull.accesses > 0 { moved += 1 }
            if simulator.movesTakenBack > 0 { takenBack += 1 }
            waits += simulator.pull.asked.count { $0 }
            ahead += simulator.discardsAgain
        }
        let summary = RunEnding.allCases.map { "\($0.rawValue) \(endings[$0, default: 0])" }.joined(separator: ", ")
        print(
            "simulation of postcopy: \(count) seeds: \(summary); \(moved) moved, \(takenBack) had a move taken back, "
                + "\(waits) pages were waited for; \(ahead) times DISCARD was said ahead; \(recovered) completed after a recovery, \(again) after several"
        )
        guard count >= 500 else { return }
        #expect(moved > 100, "hardly a guest moves before its memory")
        #expect(takenBack > 20, "hardly a move is taken back")
        #expect(waits > 500, "hardly a page is waited for")
        #expect(ahead > 20, "hardly a destination forgets ahead")
        #expect(recovered > 50 && again > 20, "hardly a connection is lost behind the move")
        #expect(endings[.pausedInPostcopy, default: 0] > 0, "nobody is left alone with half a guest")
    }

    @Test("the same seed gives the same run, step by step")
    func replay() {
        for seed in [9, 10, 126] as [UInt64] {
            let runs = (0..<2).map { _ in
                let simulator = Self.simulator(seed, isTracing: true)
                _ = try? simulator.run()
                return simulator.traceLines
            }
            #expect(runs[0] == runs[1])
        }
    }

    @Test("a bug planted in postcopy is found within 1500 seeds", arguments: PlantedBug.allCases.filter(\.isOfPostcopy))
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
