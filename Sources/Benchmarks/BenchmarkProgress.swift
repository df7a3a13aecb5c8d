import CommandLineKit
import Host
import Synchronization

/// Tells people what is measured, how many steps are left and about how long they take.
public final class BenchmarkProgress: Sendable {
    private struct State {
        var steps: Int
        var done = 0
        let start = Clock.monotonicNanoseconds
    }

    private let state: Mutex<State>
    private let options: BenchmarkOptions

    /// - Parameter steps: how many times `step` will be called.
    public init(steps: Int, _ options: BenchmarkOptions) {
        state = Mutex(State(steps: max(1, steps)))
        self.options = options
    }

    /// Says what is measured next. - Throws: `CommandFailure` once the user has asked for the end.
    public func step(_ what: String) throws {
        try options.checkInterruption()
        let line = state.withLock { state in
            state.done += 1
            let elapsed = Clock.monotonicNanoseconds - state.start
            return Self.line(what, step: state.done, of: state.steps, elapsedNanoseconds: elapsed)
        }
        options.progress(line)
    }

    /// `[3/20] ring 400 MB/s, about 40 s left`: the steps that are left take as long as those before, on average.
    static func line(_ what: String, step: Int, of steps: Int, elapsedNanoseconds: UInt64) -> String {
        let head = "[\(step)/\(max(step, steps))] \(what)"
        let before = step - 1
        guard before > 0, step <= steps else { return head }
        let left = Double(elapsedNanoseconds) / Double(before) * Double(steps - before)
        let seconds = UInt64((left / 1e9).rounded(.up))
        return "\(head), about \(Amount.time(nanoseconds: seconds * 1_000_000_000)) left"
    }
}
