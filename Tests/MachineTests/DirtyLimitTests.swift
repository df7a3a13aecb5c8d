import Accelerator
import GuestMemory
import GuestPrograms
import Host
import Machine
import TestSupport
import Testing

@Suite("dirty limits", .serialized, .enabled(if: hasKVM, needsKVM))
struct DirtyLimitTests {
    /// Bytes of pages the guest itself says it touched per second.
    private static func rate(_ machine: VirtualMachine, over nanoseconds: UInt64) throws -> Double {
        let began = Clock.monotonicNanoseconds
        let before = try machine.guestStatus().touches
        Clock.sleep(nanoseconds: nanoseconds)
        let touched = try machine.guestStatus().touches - before
        return Double(touched) * 4096 / (Double(Clock.monotonicNanoseconds - began) / 1e9)
    }

    @Test(
        "a limited vCPU makes pages dirty at the limit, and runs freely without it", .timeLimit(.minutes(10)),
        arguments: [UInt64(50_000_000), 200_000_000])
    func oneCPU(limit: UInt64) async {
        await #expect(processExitsWith: .success) { [limit] in
            Child.run(seconds: 90) {
                let machine = try VirtualMachine.guest(
                    // More pages than a ring holds: what stays writable is not counted, and runs into a full ring at least.
                    "dirty,working-set=448M,heartbeat=0", mebibytes: 512, tracking: .ring(entryCount: nil))
                try machine.resume()
                try machine.awaitReady()
                let control = machine.accelerator!.dirtyRateControl!
                let free = try Self.rate(machine, over: 200_000_000)
                claim(free > Double(limit) * 2, "unlimited the guest writes \(free) bytes/s only")
                try control.setLimit(limit, of: nil)
                // The guest keeps what its budget saved up at first.
                Clock.sleep(nanoseconds: 300_000_000)
                // More than the limit it must never do. A busy host lets it do less, by as much as it keeps the vCPU waiting.
                var ratios: [Double] = []
                var waited: [Double] = []
                for _ in 0..<5 {
                    let (began, before) = (Clock.monotonicNanoseconds, try vcpuSchedule())
                    ratios.append(try Self.rate(machine, over: 600_000_000) / Double(limit))
                    let passed = Double(Clock.monotonicNanoseconds - began)
                    waited.append((try vcpuSchedule().waited - before.waited) / passed)
                }
                let told = "with a limit of \(limit): \(ratios) of it, and the host kept the vCPU waiting for \(waited)"
                claim(ratios.sorted()[2] < 1.15, told)
                claim(zip(ratios, waited).map(+).sorted()[2] > 0.85, told)
                let said = control.limits
                claim(said.count == 1 && said[0].cpu == 0 && said[0].limitBytesPerSecond == limit, "\(said)")
                let current = Double(said[0].currentBytesPerSecond) / Double(limit)
                claim((0.2...1.4).contains(current), "\(said)")
                try control.setLimit(nil, of: nil)
                claim(control.limits.isEmpty, "\(control.limits)")
                try waitFor("the guest to write freely again") {
                    try Self.rate(machine, over: 100_000_000) > Double(limit) * 2
                }
            }
        }
    }

    @Test("a limited guest is paused at once, and migrates whole", .timeLimit(.minutes(10)))
    func stops() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 20) {
                let machine = try VirtualMachine.guest(
                    "dirty,working-set=32M,random", cpus: 2, tracking: .ring(entryCount: 4096))
                try machine.resume()
                try machine.awaitReady()
                let control = machine.accelerator!.dirtyRateControl!
                try control.setLimit(1 << 20, of: 0)
                try control.setLimit(20 << 20, of: 1)
                claim(control.limits.map(\.cpu) == [0, 1], "\(control.limits)")
                Clock.sleep(nanoseconds: 50_000_000)
                for _ in 0..<10 {
                    let began = Clock.monotonicNanoseconds
                    machine.pause()
                    let took = (Clock.monotonicNanoseconds - began) / 1_000_000
                    claim(took < 1000, "a vCPU that sleeps for its limit was waited for \(took) ms")
                    try machine.resume()
                }
                let shadow = try ShadowMemory(of: machine)
                try shadow.tracker.start()
                for _ in 0..<5 { try shadow.round() }
                try control.setLimit(nil, of: 1)
                for _ in 0..<5 { try shadow.round() }
                try shadow.finish()
                shadow.tracker.stop()
                claim(control.limits.map(\.cpu) == [0], "\(control.limits)")
                try control.setLimit(nil, of: nil)
            }
        }
    }

    @Test(
        "a limit of nothing, a vCPU that is not there and a machine without rings are refused", .timeLimit(.minutes(10))
    )
    func refusals() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 20) {
                let machine = try VirtualMachine.guest("idle", cpus: 2, tracking: .ring(entryCount: 1024))
                let control = machine.accelerator!.dirtyRateControl!
                for (limit, cpu, words) in [(0, 0, "a dirty limit of 0"), (1, 2, "vCPUs 0 to 1")]
                    as [(UInt64, Int, String)]
                {
                    do {
                        try control.setLimit(limit, of: cpu)
                        Child.fail("a limit of \(limit) for vCPU \(cpu) was taken")
                    } catch { claim("\(error)".contains(words), "\(error)") }
                }
                let other = try VirtualMachine.guest("idle", tracking: .log)
                claim(other.accelerator!.dirtyRateControl == nil, "the log can tell vCPUs apart")
            }
        }
    }
}
