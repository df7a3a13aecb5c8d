import Accelerator
import Host
import Synchronization

/// Slows all vCPUs down alike: each runs for a part of the time and sleeps for the rest, in its own thread.
///
/// A vCPU that runs guest code does not look at the clock. The thread `throttle`, which is there only while a percentage is set, kicks it out
/// when its time is up; how long it sleeps then is its own affair (`DutyCycle`).
final class VirtualCPUThrottle: Sendable {
    private struct State {
        var percentage = 0
        var isThreadThere = false
    }
    private let state = Monitor(State())
    private let cpus: [KVMVirtualCPU]
    /// At least so often it looks, in nanoseconds: a vCPU may just have woken up.
    private static let longestLook: UInt64 = 1_000_000
    private static let shortestLook: UInt64 = 50_000

    init(_ cpus: [KVMVirtualCPU]) { self.cpus = cpus }

    /// - Throws: `AcceleratorError` for a percentage that is not possible, or a thread the host does not grant.
    func set(_ percentage: Int) throws(AcceleratorError) {
        guard (0...99).contains(percentage) else {
            throw AcceleratorError("a throttle of \(percentage) %: possible are 0 to 99 %, as a vCPU must run at times")
        }
        let mustStart = state.withLock { state in
            state.percentage = percentage
            guard percentage > 0, !state.isThreadThere else { return false }
            state.isThreadThere = true
            return true
        }
        for cpu in cpus { cpu.throttle(to: percentage) }
        guard mustStart else { return }
        do throws(SystemError) {
            _ = try HostThread(name: "throttle") { [self] in run() }
        } catch {
            state.withLock { $0 = State() }
            for cpu in cpus { cpu.throttle(to: 0) }
            throw AcceleratorError(error.description)
        }
    }

    private func run() {
        // Busy vCPUs would keep it from seeing that their time is up.
        _ = HostThread.runBeforeOthers()
        while true {
            let now = Clock.monotonicNanoseconds
            var next = now + Self.longestLook
            for cpu in cpus { next = min(next, cpu.kickIfDue(now)) }
            next = max(next, now + Self.shortestLook)
            let mustEnd = state.wait(deadline: Deadline(at: next)) { state -> Bool? in
                guard state.percentage == 0 else { return nil }
                state.isThreadThere = false
                return true
            }
            if mustEnd == true { return }
        }
    }
}
