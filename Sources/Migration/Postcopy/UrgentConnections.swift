import Host
import MigrationStream

/// At the destination: the channels for requested pages of a Godwit source, by their numbers.
///
/// A page is asked for on the channel that its neighbourhood has, whoever asks: neighbours follow each other there, and no two channels
/// bring the same page.
final class UrgentConnections: Sendable {
    private struct State {
        /// Read by a thread that waits to hear whether they belong here.
        var greeted: Set<ConnectionID> = []
        /// By number; `nil`: not there.
        var admitted: [ConnectionID?] = []
        /// The safety net's.
        var net: ConnectionID?
    }
    private let state = Monitor(State())
    private static let neighbours: UInt64 = 16

    /// Before the core is told of the greeting.
    func greeted(_ id: ConnectionID) { state.withLock { _ = $0.greeted.insert(id) } }

    /// The core takes it.
    func admit(_ id: ConnectionID, as number: UInt8, of count: Int) {
        state.withLock { state in
            if state.admitted.count != count { state.admitted = [ConnectionID?](repeating: nil, count: count) }
            state.admitted[Int(number)] = id
        }
    }

    func admitNet(_ id: ConnectionID) { state.withLock { $0.net = id } }
    func isNet(_ id: ConnectionID) -> Bool { state.withLock { $0.net == id } }

    func closed(_ id: ConnectionID) {
        state.withLock { state in
            if state.net == id { state.net = nil }
            state.greeted.remove(id)
            if let number = state.admitted.firstIndex(of: id) { state.admitted[number] = nil }
        }
    }

    /// - Returns: whether the core took it; false: it was closed.
    func waitForAdmission(_ id: ConnectionID) -> Bool {
        state.wait { state in
            if state.admitted.contains(id) || state.net == id { return true }
            return state.greeted.contains(id) ? nil : false
        } ?? false
    }

    /// - Returns: whether the core has closed that one, or closes it within that time.
    func waitUntilClosed(_ id: ConnectionID, nanoseconds: UInt64) -> Bool {
        guard nanoseconds > 0 else { return false }
        return state.wait(deadline: .after(nanoseconds: nanoseconds)) { $0.admitted.contains(id) ? nil : () } != nil
    }

    /// Which channel each page is asked for on; `nil`: on the source's main connection, as long as not all channels are there.
    func route(_ requests: [PageRequest]) -> [(connection: ConnectionID, requests: [PageRequest])]? {
        let channels = state.wait { .some($0.admitted) } ?? []
        guard !channels.isEmpty, !channels.contains(nil) else { return nil }
        if let only = channels[0], channels.count == 1 { return [(only, requests)] }
        var routes: [(connection: ConnectionID, requests: [PageRequest])] = []
        for (number, id) in channels.enumerated() {
            let own = requests.filter { Self.number(of: $0, of: channels.count) == number }
            if let id, !own.isEmpty { routes.append((id, own)) }
        }
        return routes
    }

    private static func number(of request: PageRequest, of count: Int) -> Int {
        let place = request.offset / UInt64(Wire.pageSize) / neighbours
        // Fibonacci's multiplier: strides of any length come to all channels.
        return Int((place &* 0x9e37_79b9_7f4a_7c15) >> 32 % UInt64(count))
    }
}
