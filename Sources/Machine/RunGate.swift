import Host
import Synchronization

/// Lets the vCPU threads run, or holds them. Closing waits until every thread is held.
final class RunGate: Sendable {
    private struct State {
        var isOpen = false
        /// Threads between `enter` and `leave`.
        var inside = 0
        /// How often the gate was closed.
        var closings: UInt64 = 0
    }

    private let state = Monitor(State())
    /// Looked at by every vCPU before it enters the guest.
    private let closing = Atomic<Bool>(true)

    /// A vCPU should come out.
    var mustStop: Bool { closing.load(ordering: .acquiring) }

    /// Waits until the gate is open, and goes in. - Returns: how often it has been closed so far, for `waitUntilClosed`.
    @discardableResult
    func enter() -> UInt64 {
        state.wait { state -> UInt64? in
            guard state.isOpen else { return nil }
            state.inside += 1
            return state.closings
        } ?? 0
    }

    func leave() { state.withLock { $0.inside -= 1 } }

    /// Waits until the gate is closed, or has been closed since `enter` returned `closings`: it may be open again by now.
    func waitUntilClosed(since closings: UInt64) { state.wait { !$0.isOpen || $0.closings > closings ? () : nil } }

    func open() {
        state.withLock {
            closing.store(false, ordering: .releasing)
            $0.isOpen = true
        }
    }

    /// Closes the gate; `kick` makes the threads look. Returns when none is inside.
    func close(kick: () -> Void) {
        state.withLock {
            if $0.isOpen { $0.closings += 1 }
            $0.isOpen = false
            closing.store(true, ordering: .sequentiallyConsistent)
        }
        kick()
        state.wait { $0.inside == 0 ? () : nil }
    }
}
