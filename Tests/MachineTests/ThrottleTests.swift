import Accelerator
import GuestPrograms
import Host
import Machine
import TestSupport
import Testing

@Suite("throttling", .serialized, .enabled(if: hasKVM, needsKVM))
struct ThrottleTests {
    /// Of some time: the part it was on a processor, that and what it waited for one, and what it touched in a second on one.
    private static func shares(
        _ nanoseconds: UInt64, _ machine: VirtualMachine
    ) throws -> (ran: Double, wanted: Double, touchesPerSecond: Double) {
        let began = Clock.monotonicNanoseconds
        let (before, touched) = (try vcpuSchedule(), try machine.guestStatus().touches)
        Clock.sleep(nanoseconds: nanoseconds)
        let (after, touchedLater) = (try vcpuSchedule(), try machine.guestStatus().touches)
        let passed = Double(Clock.monotonicNanoseconds - began)
        let ran = after.ran - before.ran
        return (
            ran / passed, (ran + after.waited - before.waited) / passed,
            Double(touchedLater - touched) / max(ran / 1e9, 1e-9)
        )
    }

    @Test(
        "a guest writing at full speed achieves its part of that, whatever the percentage", .timeLimit(.minutes(10)),
        arguments: [20, 50, 80, 99])
    func rate(percentage: Int) async {
        await #expect(processExitsWith: .success) { [percentage] in
            Child.run(seconds: 180) {
                let machine = try VirtualMachine.guest("dirty,working-set=16M,heartbeat=0")
                try machine.resume()
                try machine.awaitReady()
                let wanted = 1 - Double(percentage) / 100
                // Other work on this host takes processor time from the guest, never gives it any: so what it ran is bounded from
                // above, and what it ran or would have run, had there been a processor, from below.
                var ran: [Double] = []
                var wouldHaveRun: [Double] = []
                var speed: [Double] = []
                for _ in 0..<9 {
                    let free = try Self.shares(100_000_000, machine)
                    try machine.accelerator!.throttle(to: percentage)
                    Clock.sleep(nanoseconds: 20_000_000)
                    let slowed = try Self.shares(300_000_000, machine)
                    try machine.accelerator!.throttle(to: 0)
                    Clock.sleep(nanoseconds: 5_000_000)
                    ran.append(slowed.ran)
                    wouldHaveRun.append(slowed.wanted)
                    speed.append(slowed.touchesPerSecond / free.touchesPerSecond)
                }
                let told = "throttled to \(percentage) %: ran \(ran), would have run \(wouldHaveRun), speed \(speed)"
                func middle(_ values: [Double]) -> Double { values.sorted()[values.count / 2] }
                claim(middle(ran) < wanted + 0.05, told)
                claim(middle(wouldHaveRun) > wanted - 0.05, told)
                // While it runs it is about as fast as ever, but for the caches that others used meanwhile.
                claim(percentage > 90 || middle(speed) > 0.3, told)
            }
        }
    }

    @Test("a throttled guest is stopped and reset at once, and is itself again afterwards", .timeLimit(.minutes(10)))
    func stops() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let machine = try VirtualMachine.guest("dirty,working-set=8M", cpus: 2)
                try machine.resume()
                try machine.awaitReady()
                try machine.accelerator!.throttle(to: 99)
                var took: [UInt64] = []
                for _ in 0..<20 {
                    Clock.sleep(nanoseconds: 7_000_000)
                    let began = Clock.monotonicNanoseconds
                    machine.pause()
                    took.append((Clock.monotonicNanoseconds - began) / 1000)
                    try machine.resume()
                }
                // The sleeps are of 10 ms; half of the stops must be far below, however busy the host.
                claim(took.sorted()[10] < 5000, "stops took \(took) us")
                machine.pause()
                try machine.claimVerified("while it is throttled")
                try machine.reset()
                try machine.resume()
                try machine.accelerator!.throttle(to: 0)
                try machine.awaitReady()
                try machine.claimVerified("after the reset")
                do {
                    try machine.accelerator!.throttle(to: 100)
                    Child.fail("a throttle of 100 % was taken")
                } catch { claim("\(error)".contains("0 to 99 %"), "\(error)") }
            }
        }
    }
}
