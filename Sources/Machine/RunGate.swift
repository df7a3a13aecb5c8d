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
        /// Until the first thread is in: when it must be, at the latest.
        var deadline: UInt64?
        /// Closed for good.
        var isRetired = false
        /// Nobody goes in for a moment, open or not.
        var isHeld = false
    }

    private let state = Monitor(State())
    /// A thread has gone in since the gate was opened with a deadline.
    private let isDecided = Monitor(false)
    /// Looked at by every vCPU before it enters the guest.
    private let closing = Atomic<Bool>(true)
    private let retired = Atomic<Bool>(false)

    /// A vCPU should come out.
    var mustStop: Bool { closing.load(ordering: .acquiring) }

    /// Waits until the gate is open, and goes in. - Returns: how often it has been closed so far, for `waitUntilClosed`.
    @discardableResult
    func enter() -> UInt64 {
        var isFirst = false
        let closings = state.wait { state -> UInt64? in
            guard state.isOpen, !state.isHeld else { return nil }
            if let deadline = state.deadline {
                guard Clock.monotonicNanoseconds <= deadline else { return nil }
                state.deadline = nil
                isFirst = true
            }
            state.inside += 1
            return state.closings
        }
        // Whoever opened it waits for this, and takes the lock above then: it may have a higher priority, and would find it taken.
        if isFirst { isDecided.withLock { $0 = true } }
        return closings ?? 0
    }

    func leave() { state.withLock { $0.inside -= 1 } }

    /// Waits until the gate is closed, or has been closed since `enter` returned `closings`: it may be open again by now.
    func waitUntilClosed(since closings: UInt64) { state.wait { !$0.isOpen || $0.closings > closings ? () : nil } }

    func open() {
        state.withLock {
            guard !$0.isRetired else { return }
            closing.store($0.isHeld, ordering: .releasing)
            $0.isOpen = true
        }
    }

    // MARK: For a moment

    /// Lets nobody in, and has those that are inside come out, whether the gate is open or is opened meanwhile. Does not wait: a thread may
    /// sleep inside for memory that is still to come.
    func hold(kick: () -> Void) {
        state.withLock {
            $0.isHeld = true
            closing.store(true, ordering: .sequentiallyConsistent)
        }
        kick()
    }

    /// - Returns: whether none is inside, or comes out by then; `isAwaited` is asked from time to time.
    func waitUntilEmpty(while isAwaited: () -> Bool) -> Bool {
        while isAwaited() {
            let isEmpty = state.wait(deadline: .after(nanoseconds: 20_000_000)) { $0.inside == 0 ? true : nil }
            if isEmpty == true { return true }
        }
        return false
    }

    /// The gate is as it was again, or as it was made meanwhile.
    func release() {
        state.withLock {
            $0.isHeld = false
            closing.store(!$0.isOpen, ordering: .sequentiallyConsistent)
        }
    }

    /// Opens the gate for threads of which the first goes in by a moment of the monotonic clock: the clock is read by that thread, as it
    /// goes in. If none does in time, the gate is closed as before, and none ever does.
    /// - Precondition: the gate is closed, and some thread wants in.
    /// - Returns: whether one is in.
    func open(until deadline: UInt64) -> Bool {
        isDecided.withLock { $0 = false }
        let isRetired = state.withLock {
            guard !$0.isRetired else { return true }
            closing.store(false, ordering: .releasing)
            $0.deadline = deadline
            $0.isOpen = true
            return false
        }
        if isRetired { return false }
        let now = Clock.monotonicNanoseconds
        isDecided.wait(deadline: .after(nanoseconds: deadline > now ? deadline - now : 0)) { $0 ? () : nil }
        return state.withLock { state in
            guard state.deadline != nil else { return true }
            state.deadline = nil
            state.isOpen = false
            closing.store(true, ordering: .sequentiallyConsistent)
            return false
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

    /// What threads still bring out of the guest does not count.
    var isRetired: Bool { retired.load(ordering: .acquiring) }

    /// Closes the gate for good, and does not wait until none is inside: some may sleep for memory that never comes.
    func retire(kick: () -> Void) {
        state.withLock {
            if $0.isOpen { $0.closings += 1 }
            $0.isOpen = false
            $0.isRetired = true
            closing.store(true, ordering: .sequentiallyConsistent)
            retired.store(true, ordering: .sequentiallyConsistent)
        }
        kick()
    }
}
