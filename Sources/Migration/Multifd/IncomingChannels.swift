import Host

/// Where the channels of an incoming migration and its main channel wait for each other (multifd).
///
/// A channel waits here after its greeting until the core admits it, and at each SYNC until the main channel has come to the place in its
/// stream that belongs to it. The main channel waits there until all channels are at their SYNC. Whoever waits is let go, with a word
/// that it is over, when its connection was closed.
final class IncomingChannels: Sendable {
    private enum Stage {
        case greeted, reading, synchronized
        /// It said that nothing more comes, behind a whole packet.
        case ended
    }

    private struct State {
        /// All connections that were not closed.
        var open: Set<ConnectionID> = []
        var stages: [ConnectionID: Stage] = [:]
        /// How many channels the migration has; known when one was admitted.
        var expected: Int?
        /// Grows with whatever comes on a channel.
        var packets: UInt64 = 0
    }
    private let state = Monitor(State())
    /// So long may the main channel wait while nothing comes on the others.
    private let stallNanoseconds: UInt64

    init(stallNanoseconds: UInt64) { self.stallNanoseconds = stallNanoseconds }

    // MARK: Connections

    func opened(_ connection: ConnectionID) { state.withLock { _ = $0.open.insert(connection) } }

    func closed(_ connection: ConnectionID) {
        state.withLock { state in
            state.open.remove(connection)
            state.stages[connection] = nil
            if state.stages.isEmpty { state.expected = nil }
        }
    }

    func admit(_ connection: ConnectionID, of count: Int) {
        state.withLock { state in
            guard state.stages[connection] == .greeted else { return }
            state.stages[connection] = .reading
            state.expected = count
        }
    }

    // MARK: The thread of a channel

    /// Before the core hears of the greeting.
    func greeted(_ connection: ConnectionID) {
        state.withLock { if $0.open.contains(connection) { $0.stages[connection] = .greeted } }
    }

    /// - Returns: whether the channel may be read; false when its connection was closed.
    func waitForAdmission(_ connection: ConnectionID) -> Bool { waits(connection, at: .greeted) }

    /// A packet came: the main channel may wait on.
    func came() {
        // Nobody need wake up for it.
        _ = state.wait { state -> Bool? in
            state.packets += 1
            return true
        }
    }

    /// - Returns: whether the channel goes on; false when its connection was closed.
    func synchronize(_ connection: ConnectionID) -> Bool {
        state.withLock { if $0.stages[connection] != nil { $0.stages[connection] = .synchronized } }
        return waits(connection, at: .synchronized)
    }

    /// Nothing more comes. Waits until the core is done with the connection.
    func endAndWait(_ connection: ConnectionID) {
        state.withLock { if $0.stages[connection] != nil { $0.stages[connection] = .ended } }
        _ = waits(connection, at: .ended)
    }

    private func waits(_ connection: ConnectionID, at stage: Stage) -> Bool {
        state.wait { state -> Bool? in
            guard let now = state.stages[connection] else { return false }
            return now == stage ? nil : true
        } ?? false
    }

    // MARK: The thread of the main channel

    enum Outcome { case complete, closed, channelEnded, stalled }

    /// Waits until all channels are at their SYNC, and lets them go on.
    func waitForAll(main: ConnectionID) -> Outcome {
        var seen = state.withLock { $0.packets }
        while true {
            let outcome = state.wait(deadline: .after(nanoseconds: stallNanoseconds)) { state -> Outcome? in
                guard state.open.contains(main) else { return .closed }
                let admitted = state.stages.filter { $0.value != .greeted }
                if admitted.values.contains(.ended) { return .channelEnded }
                guard admitted.count == state.expected, admitted.values.allSatisfy({ $0 == .synchronized }) else {
                    return nil
                }
                for connection in admitted.keys { state.stages[connection] = .reading }
                return .complete
            }
            // Those who wait at their SYNC look again.
            if outcome == .complete { state.withLock { _ in } }
            if let outcome { return outcome }
            let packets = state.withLock { $0.packets }
            if packets == seen { return .stalled }
            seen = packets
        }
    }
}
