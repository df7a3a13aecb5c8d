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

    @Test("a gate that is open until a moment lets threads in before it, and none after it, also one that wakes later")
    func deadline() throws {
        let gate = RunGate()
        let inside = Monitor(0)
        func vcpu() throws { try Self.enter(gate, inside) }
        try vcpu()
        #expect(!gate.open(until: Clock.monotonicNanoseconds - 1), "the moment has passed")
        #expect(gate.mustStop)
        try vcpu()
        #expect(inside.wait(deadline: .after(milliseconds: 30)) { $0 > 0 ? $0 : nil } == nil)
        #expect(gate.open(until: Clock.monotonicNanoseconds + 10_000_000_000))
        #expect(!gate.mustStop)
        #expect(inside.wait(deadline: .after(seconds: 10)) { $0 == 2 ? $0 : nil } == 2)
    }

    /// A thread that goes in, and counts itself then.
    private static func enter(_ gate: RunGate, _ inside: Monitor<Int>) throws {
        _ = try HostThread(name: "vcpu") {
            gate.enter()
            inside.withLock { $0 += 1 }
        }
    }

    @Test("a gate that is held lets nobody in, whatever is done to it meanwhile, and is then as it was made")
    func held() throws {
        let gate = RunGate()
        let inside = Monitor(0)
        gate.open()
        gate.enter()
        gate.hold {}
        #expect(gate.mustStop)
        #expect(!gate.waitUntilEmpty { false }, "somebody is inside")
        gate.leave()
        #expect(gate.waitUntilEmpty { true })
        gate.close {}
        gate.open()
        #expect(gate.mustStop, "it is held")
        try Self.enter(gate, inside)
        #expect(inside.wait(deadline: .after(milliseconds: 30)) { $0 > 0 ? $0 : nil } == nil)
        gate.release()
        #expect(!gate.mustStop)
        #expect(inside.wait(deadline: .after(seconds: 10)) { $0 == 1 ? $0 : nil } == 1)
        gate.hold {}
        gate.leave()
        gate.close {}
        gate.release()
        #expect(gate.mustStop, "it was closed meanwhile")
    }

    @Test("the first of several threads decides: who comes after the moment goes in, too")
    func late() throws {
        let gate = RunGate()
        let inside = Monitor(0)
        func vcpu() throws { try Self.enter(gate, inside) }
        try vcpu()
        let moment = Clock.monotonicNanoseconds + 2_000_000_000
        #expect(gate.open(until: moment))
        while Clock.monotonicNanoseconds <= moment { Clock.sleep(nanoseconds: 10_000_000) }
        try vcpu()
        #expect(inside.wait(deadline: .after(seconds: 10)) { $0 == 2 ? $0 : nil } == 2)
    }

    @Test("a gate whose threads do not come in time is closed again when the moment comes")
    func nobody() {
        let gate = RunGate()
        let began = Clock.monotonicNanoseconds
        #expect(!gate.open(until: began + 20_000_000))
        #expect(Clock.monotonicNanoseconds >= began + 20_000_000)
        #expect(gate.mustStop)
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
