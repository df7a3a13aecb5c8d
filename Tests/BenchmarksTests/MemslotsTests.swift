import Glibc
import Host
import KVM
import Testing

@testable import Benchmarks

@Suite("memslots", .serialized, .enabled(if: unsafe access("/dev/kvm", R_OK | W_OK) == 0, "no /dev/kvm to open"))
struct MemslotsTests {
    /// A machine lasts as long as its process.
    private static func inChild(
        _ body: () throws -> MemslotsRun.Outcome, about what: String = "", holds: (MemslotsRun.Outcome) -> Bool
    ) -> Never {
        let sentence: String
        do {
            let outcome = try body()
            if holds(outcome) { _exit(0) }
            var rest = outcome
            rest.commitMilliseconds = []
            sentence = "\(rest)"
        } catch { sentence = "\(error)" }
        Issue.record("\(what) \(sentence)")
        _ = try? Descriptor.standard(2, name: "standard error").writeAll(Array((sentence + "\n").utf8))
        _exit(1)
    }

    private static func run(_ strategy: SlotStrategy, passes: Int) -> MemslotsRun {
        MemslotsRun(
            strategy: strategy, cpuCount: 3, areAllOutside: false, timedRuns: passes, trackedRuns: passes,
            timeLimitSeconds: 10)
    }

    @Test(
        "what firmware changes is never absent for a vCPU, nobody is paused, and no write is lost",
        .timeLimit(.minutes(10)))
    func atomic() async {
        await #expect(processExitsWith: .success) {
            Self.inChild({ try Self.run(.atomic, passes: 4).carryOut() }) {
                $0.failures == 0 && $0.pauses == 0 && $0.lostPages == 0 && $0.lostWrites == 0 && $0.writes > 0
                    && $0.commits == 8 * 37
            }
        }
    }

    @Test("with all vCPUs paused nothing is absent and nothing lost either", .timeLimit(.minutes(10)))
    func pauseAll() async {
        await #expect(processExitsWith: .success) {
            Self.inChild({ try Self.run(.pauseAll, passes: 2).carryOut() }) {
                $0.failures == 0 && $0.pauses > 37 && $0.lostPages == 0 && $0.lostWrites == 0 && $0.writes > 0
            }
        }
    }

    @Test("the spinning guest notices slots that go and come", .timeLimit(.minutes(10)))
    func naive() async {
        await #expect(processExitsWith: .success) {
            Self.inChild({ try Self.run(.naive, passes: 20).carryOut() }) {
                $0.failures > 0 && $0.firstFailure != nil && $0.pauses == 0
            }
        }
    }

    /// `GODWIT_MEMSLOT_CHANGES=10000` for the full number; `GODWIT_MEMSLOT_SEED` replays one.
    @Test("random overlapping changes end with every byte accounted for", .timeLimit(.minutes(10)))
    func stress() async {
        await #expect(processExitsWith: .success) {
            let environment = ProcessEnvironment()
            let seed = environment.number("GODWIT_MEMSLOT_SEED") ?? UInt64.random(in: 0..<1 << 32)
            let changes = Int(environment.number("GODWIT_MEMSLOT_CHANGES") ?? 200)
            Self.inChild(
                { try MemslotsStress(changes: changes, cpuCount: 4, seed: seed).carryOut() },
                about: "replay: GODWIT_MEMSLOT_SEED=\(seed)"
            ) {
                $0.failures == 0 && $0.lostPages == 0 && $0.lostWrites == 0 && $0.writes > 0
                    && $0.commitMilliseconds.count == changes
            }
        }
    }
}

/// Numbers from the environment.
private struct ProcessEnvironment {
    func number(_ name: String) -> UInt64? {
        guard let value = unsafe getenv(name) else { return nil }
        return unsafe UInt64(String(cString: value))
    }
}
