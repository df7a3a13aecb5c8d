import Host
import Testing

@testable import Machine

@Suite struct RunGateTests {
    @Test("a thread that left for a reset comes back even if the gate was closed and opened again before it looked")
    func shortClosing() throws {
        let gate = RunGate()
        gate.open()
        let closings = gate.enter()
        gate.leave()
        gate.close {}
        gate.open()
        let isBack = Monitor(false)
        _ = try HostThread(name: "vcpu") {
            gate.waitUntilClosed(since: closings)
            isBack.withLock { $0 = true }
        }
        #expect(isBack.wait(deadline: .after(seconds: 10)) { $0 ? true : nil } == true)
    }

    @Test("a thread that left waits as long as the gate stays open")
    func stillOpen() throws {
        let gate = RunGate()
        gate.open()
        let closings = gate.enter()
        gate.leave()
        let isBack = Monitor(false)
        _ = try HostThread(name: "vcpu") {
            gate.waitUntilClosed(since: closings)
            isBack.withLock { $0 = true }
        }
        #expect(isBack.wait(deadline: .after(milliseconds: 50)) { $0 ? true : nil } == nil)
        gate.close {}
        #expect(isBack.wait(deadline: .after(seconds: 10)) { $0 ? true : nil } == true)
    }

    @Test(
        "a thread that leaves because the gate is being closed comes back, even if it was opened again before it looked"
    )
    func closedMeanwhile() throws {
        let gate = RunGate()
        gate.open()
        let closings = gate.enter()
        let closer = try HostThread(name: "closer") { gate.close {} }
        while !gate.mustStop { Clock.sleep(nanoseconds: 100_000) }
        gate.leave()
        closer.join()
        gate.open()
        let isBack = Monitor(false)
        _ = try HostThread(name: "vcpu") {
            gate.waitUntilClosed(since: closings)
            isBack.withLock { $0 = true }
        }
        #expect(isBack.wait(deadline: .after(seconds: 10)) { $0 ? true : nil } == true)
    }
}
