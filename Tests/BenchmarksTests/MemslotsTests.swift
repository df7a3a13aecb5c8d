import Glibc
import Host
import KVM
import Testing

@testable import Benchmarks

@Suite("memslots", .serialized, .enabled(if: unsafe access("/dev/kvm", R_OK | W_OK) == 0, "no /dev/kvm to open"))
struct MemslotsTests {
    /// A machine lasts as long as its process.
    private static func inChild(_ body: () throws -> Void) -> Never {
        do { try body() } catch {
            _ = try? Descriptor.standard(2, name: "standard error").writeAll(Array("\(error)\n".utf8))
            _exit(1)
        }
        _exit(0)
    }

    private struct Claim: Error, CustomStringConvertible { let description: String }

    @Test("the firmware's changes are seen by no vCPU, and no write is lost", .timeLimit(.minutes(1)))
    func firmware() async {
        await #expect(processExitsWith: .success) {
            Self.inChild {
                let run = MemslotsRun(
                    strategy: .atomic, cpuCount: 3, areAllOutside: false, timedRuns: 2, trackedRuns: 2)
                let outcome = try run.carryOut()
                guard outcome.failures == 0, outcome.lostPages == 0, outcome.lostWrites == 0, outcome.writes > 0 else {
                    throw Claim(description: "\(outcome)")
                }
                _ = try? Descriptor.standard(2, name: "e").writeAll(Array("\(outcome)\n".utf8))
            }
        }
    }
}
