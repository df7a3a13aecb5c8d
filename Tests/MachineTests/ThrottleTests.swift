import Accelerator
import GuestPrograms
import Host
import Machine
import Testing

@Suite("throttling", .serialized, .enabled(if: hasKVM, needsKVM))
struct ThrottleTests {
    private static func touches(_ machine: VirtualMachine, over nanoseconds: UInt64) throws -> Double {
        let began = Clock.monotonicNanoseconds
        let before = try machine.guestStatus().touches
        Clock.sleep(nanoseconds: nanoseconds)
        let touched = try machine.guestStatus().touches - before
        return Double(touched) / (Double(Clock.monotonicNanoseconds - began) / 1e9)
    }

    @Test(
        "a guest writing at full speed achieves its part of that, whatever the percentage", .timeLimit(.minutes(10)),
        arguments: [20, 50, 80, 99])
    func rate(percentage: Int) async {
        await #expect(processExitsWith: .success) { [percentage] in
            Child.run(seconds: 60) {
                let machine = try VirtualMachine.guest("dirty,working-set=16M,heartbeat=0")
                try machine.resume()
                try machine.awaitReady()
                let wanted = 1 - Double(percentage) / 100
                // Full speed just before and just after: other work on this host slows both down. One quiet turn is enough.
                var shares: [Double] = []
                for _ in 0..<50 {
                    let before = try Self.touches(machine, over: 150_000_000)
                    try machine.accelerator!.throttle(to: percentage)
                    Clock.sleep(nanoseconds: 20_000_000)
                    let slowed = try Self.touches(machine, over: 300_000_000)
                    try machine.accelerator!.throttle(to: 0)
                    let after = try Self.touches(machine, over: 150_000_000)
                    shares.append(slowed / ((before + after) / 2))
                    if abs(shares[shares.count - 1] - wanted) < 0.05 { return }
                }
                Child.fail("throttled to \(percentage) % the guest achieved \(shares) of its rate")
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
