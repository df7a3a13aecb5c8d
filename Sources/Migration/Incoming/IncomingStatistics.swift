import Host
import Synchronization

/// What is counted during an incoming migration. Written by its threads, read by anybody.
final class IncomingStatistics: Sendable {
    private struct State {
        var info = MigrationInfo()
        var began: UInt64?
        var ended: UInt64?
        /// Until when a lost source is waited for.
        var keptUntil: UInt64?
        var postcopy: PendingPages?
    }
    private let state: Mutex<State>

    init(totalBytes: UInt64, listening: [ListeningAddress]) {
        var initial = State()
        initial.info.direction = .incoming
        initial.info.listening = listening
        initial.info.ram = MigrationInfo.RAM()
        initial.info.ram?.total = totalBytes
        state = Mutex(initial)
    }

    func info() -> MigrationInfo {
        state.withLock { state in
            var info = state.info
            let now = Clock.monotonicNanoseconds
            if let began = state.began { info.totalNanoseconds = (state.ended ?? now) - began }
            if let end = state.keptUntil, info.status == .paused { info.keptNanoseconds = end - min(end, now) }
            if let postcopy = state.postcopy { Self.add(postcopy, to: &info) }
            return info
        }
    }

    private static func add(_ postcopy: PendingPages, to info: inout MigrationInfo) {
        let histogram = postcopy.latency.histogram
        info.pageLatency = histogram.count > 0 ? histogram : nil
        info.blockTime = postcopy.blockTime?.figures
        info.ram?.remaining = postcopy.missingPages * 4096
    }

    func enter(_ status: MigrationStatus) {
        state.withLock { state in
            if state.info.status == .paused, status == .active {
                state.info.resumptions += 1
                state.info.errorDescription = nil
            }
            if [.postcopyRecover, .postcopyPaused].contains(state.info.status), status == .postcopyActive {
                state.info.resumptions += 1
                state.info.errorDescription = nil
            }
            state.info.status = status
            switch status {
            case .setup:
                // What an earlier attempt left does not count.
                let total = state.info.ram?.total
                state.info.ram = MigrationInfo.RAM()
                state.info.ram?.total = total ?? 0
                state.info.errorDescription = nil
                state.postcopy = nil
                (state.info.pageLatency, state.info.blockTime, state.info.hugeShare) = (nil, nil, nil)
                (state.began, state.ended) = (nil, nil)
            case .active where state.began == nil: state.began = Clock.monotonicNanoseconds
            case .completed, .failed:
                state.ended = Clock.monotonicNanoseconds
                // The figures stay, the record of every page is of no use any more.
                if let postcopy = state.postcopy { Self.add(postcopy, to: &state.info) }
                state.postcopy = nil
            default: break
            }
        }
    }

    func listens(at addresses: [ListeningAddress]) { state.withLock { $0.info.listening = addresses } }

    func agreed(_ rule: HandoverRule) { state.withLock { $0.info.rule = rule } }

    func end(error: String?) { state.withLock { $0.info.errorDescription = error } }

    /// The source is lost, and waited for.
    func keeps(_ sentence: String, forNanoseconds nanoseconds: UInt64) {
        state.withLock { state in
            state.info.errorDescription = sentence
            state.keptUntil = Clock.monotonicNanoseconds + nanoseconds
        }
    }

    /// Postcopy may come.
    func watch(_ pending: PendingPages) { state.withLock { $0.postcopy = pending } }

    /// That share of allocated RAM is huge after postcopy.
    func isHuge(_ share: Double) { state.withLock { $0.info.hugeShare = share } }

    /// Pages were asked for, each once.
    func asked(for pages: UInt64) { state.withLock { $0.info.ram?.postcopyRequests += pages } }

    func received(
        bytes: UInt64, normal: UInt64, duplicate: UInt64, overChannels: Bool = false, inPostcopy: Bool = false
    ) {
        state.withLock { state in
            if inPostcopy { state.info.ram?.postcopyBytes += bytes }
            state.info.ram?.transferred += bytes
            if overChannels { state.info.ram?.multifdBytes += bytes }
            state.info.ram?.normal += normal
            state.info.ram?.duplicate += duplicate
        }
    }
}
