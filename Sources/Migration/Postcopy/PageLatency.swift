import GuestMemory
import Host
import Synchronization

/// How long pages that were asked for took: from the moment a fault was read until the page was in its place.
final class PageLatency: Sendable {
    struct Place: Hashable {
        let block: Int
        let page: PageIndex
    }

    private struct State {
        /// Since when each page that has not come is waited for: as many as threads wait.
        var open: [Place: UInt64] = [:]
        var histogram = LatencyHistogram()
    }
    private let state = Mutex(State())
    /// When somebody began to wait last.
    private let latest = Atomic<UInt64>(0)

    /// The first one's time counts.
    func asked(_ place: Place) {
        let now = Clock.monotonicNanoseconds
        latest.store(now, ordering: .relaxed)
        state.withLock { state in
            if state.open[place] == nil { state.open[place] = now }
        }
    }

    func arrived(_ place: Place) {
        let now = Clock.monotonicNanoseconds
        state.withLock { state in
            if let began = state.open.removeValue(forKey: place) { state.histogram.record(now - min(began, now)) }
        }
    }

    /// Nobody has to be asked after all: the page was here.
    func withdraw(_ place: Place) { state.withLock { _ = $0.open.removeValue(forKey: place) } }

    /// For how long nobody has begun to wait; none while somebody waits.
    var quietNanoseconds: UInt64 {
        guard openRequests == 0 else { return 0 }
        let now = Clock.monotonicNanoseconds
        return now - min(now, latest.load(ordering: .relaxed))
    }

    var histogram: LatencyHistogram { state.withLock { $0.histogram } }
    /// Pages that were asked for and have not come.
    var openRequests: Int { state.withLock { $0.open.count } }
}
