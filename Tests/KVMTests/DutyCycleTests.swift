import Testing

@testable import KVM

@Suite("A throttled vCPU runs for its part of the time")
struct DutyCycleTests {
    @Test("runs and sleeps come to the percentage, late kicks and wakes included", arguments: [1, 20, 50, 80, 99])
    func share(percentage: Int) {
        var duty = DutyCycle(percentage: percentage)
        var (ran, slept): (UInt64, UInt64) = (0, 0)
        for turn in 0..<2000 {
            // A kick is up to 90 us late, a wake up to 150 us.
            let run = duty.leftToRun + UInt64(turn * 7919 % 90_000)
            duty.ran(run)
            ran += run
            #expect(duty.nap > 0)
            let sleep = duty.nap + UInt64(turn * 104_729 % 150_000)
            duty.slept(sleep)
            slept += sleep
        }
        let share = Double(slept) / Double(ran + slept)
        #expect(abs(share - Double(percentage) / 100) < 0.005, "\(share)")
        #expect((1e6...1.1e7).contains(duty.runNanoseconds + duty.sleepNanoseconds))
    }

    @Test("one that hardly ran is not sent to sleep, one that is asleep sleeps on after a look")
    func interruptions() {
        var duty = DutyCycle(percentage: 50)
        duty.ran(UInt64(duty.runNanoseconds / 2))
        #expect(duty.nap == 0)
        duty.ran(UInt64(duty.runNanoseconds / 2))
        #expect(duty.nap > 0)
        duty.isResting = true
        duty.slept(UInt64(duty.sleepNanoseconds * 0.7))
        #expect(duty.nap > 0)
        duty.isResting = false
        #expect(duty.nap == 0)
        #expect(DutyCycle(percentage: 0).leftToRun == .max)
        #expect(DutyCycle(percentage: 0).nap == 0)
    }

    @Test("a kick that came far too late is not slept off for ever")
    func bounded() {
        var duty = DutyCycle(percentage: 99)
        duty.ran(60_000_000_000)
        #expect(duty.nap <= 200_000_000)
    }
}
