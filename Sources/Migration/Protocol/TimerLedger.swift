/// Which timers run: tells a timer that fires in time from one that was replaced or cancelled meanwhile.
struct TimerLedger: Sendable {
    private var running: [ProtocolTimer.Kind: UInt64] = [:]
    private var generation: UInt64 = 0

    /// The timer that runs from now on in place of any other of its kind.
    mutating func set(_ kind: ProtocolTimer.Kind) -> ProtocolTimer {
        generation += 1
        running[kind] = generation
        return ProtocolTimer(kind: kind, generation: generation)
    }

    func isRunning(_ kind: ProtocolTimer.Kind) -> Bool { running[kind] != nil }

    /// - Returns: false when none of that kind ran.
    mutating func cancel(_ kind: ProtocolTimer.Kind) -> Bool { running.removeValue(forKey: kind) != nil }

    /// - Returns: false when the timer does not count any more.
    mutating func fired(_ timer: ProtocolTimer) -> Bool {
        guard running[timer.kind] == timer.generation else { return false }
        running[timer.kind] = nil
        return true
    }
}
