import Synchronization

/// The run state and the lock under which commands change it, one after the other.
///
/// A command may take long (a check of all memory); whoever only asks is told the state it started from.
final class RunControl: Sendable {
    private let state: Mutex<RunState>
    private let published: Mutex<RunState>

    init(_ initial: RunState) {
        state = Mutex(initial)
        published = Mutex(initial)
    }

    var current: RunState { published.withLock { $0 } }

    func withLock<R, E: Error>(_ body: (inout RunState) throws(E) -> R) throws(E) -> R {
        try state.withLock { (state) throws(E) -> R in
            // Under the lock: what is published follows the order of the changes.
            defer { published.withLock { [state] in $0 = state } }
            return try body(&state)
        }
    }
}
