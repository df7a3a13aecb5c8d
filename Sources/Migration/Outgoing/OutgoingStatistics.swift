import Host
import Synchronization

/// What is counted during an outgoing migration. Written by its threads, read by anybody.
final class OutgoingStatistics: Sendable {
    /// The parts of the standstill, in order. `hold` is the operator's, with pause-before-switchover.
    enum Part: String, CaseIterable, Sendable {
        case stop, hold, collect, send, state, load, start

        /// What comes behind those that have ended.
        init(after parts: [(name: String, nanoseconds: UInt64)]) {
            switch parts.last.flatMap({ Part(rawValue: $0.name) }) {
            case .none: self = .stop
            case .stop, .hold: self = .collect
            case .collect: self = .send
            case .send: self = .state
            case .state: self = .load
            case .load, .start: self = .start
            }
        }
    }

    private struct State {
        var info = MigrationInfo()
        var isUnderWay = true
        let began = Clock.monotonicNanoseconds
        var ended: UInt64?
        var lastMark: UInt64?
        /// Of the standstill that ended last without a handover.
        var brokenParts = MigrationInfo.Downtime()
        var sectionBytes: UInt64 = 0
        /// At the last collect: when, and what had been sent.
        var collectedAt: UInt64?
        var bytesAtCollect: UInt64 = 0
        var pagesAtCollect: UInt64 = 0
        var remainingPages: UInt64 = 0
        var isPostcopy = false
        /// Of the round under way.
        var deltas = XBZRLECounts()
    }
    private let state: Mutex<State>

    init(totalBytes: UInt64, tracking: String?, xbzrleCacheBytes: UInt64? = nil) {
        var initial = State()
        initial.info.direction = .outgoing
        initial.info.dirtyTracking = tracking
        initial.info.ram = MigrationInfo.RAM()
        initial.info.ram?.total = totalBytes
        if let xbzrleCacheBytes {
            initial.info.xbzrle = MigrationInfo.XBZRLE()
            initial.info.xbzrle?.cacheBytes = xbzrleCacheBytes
        }
        state = Mutex(initial)
    }

    var isUnderWay: Bool { state.withLock { $0.isUnderWay } }
    var status: MigrationStatus { state.withLock { $0.info.status } }

    func info() -> MigrationInfo {
        state.withLock { state in
            var info = state.info
            info.totalNanoseconds = (state.ended ?? Clock.monotonicNanoseconds) - state.began
            if !state.isUnderWay { info.expectedDowntimeNanoseconds = nil }
            return info
        }
    }

    func enter(_ status: MigrationStatus) {
        if status == .device, self.status == .preSwitchover { mark(.hold) }
        state.withLock { state in
            state.info.status = status
            switch status {
            case .completed, .cancelled, .failed, .unsettled:
                state.isUnderWay = false
                state.ended = Clock.monotonicNanoseconds
                if status == .completed { state.info.ram?.setRates(over: Clock.monotonicNanoseconds - state.began) }
            default: state.isUnderWay = true
            }
        }
    }

    /// A new connection took the migration up; so many pages are sent again that may have been lost with the old one.
    func resumed(repeatedPages: UInt64) {
        state.withLock { state in
            state.info.resumptions += 1
            state.info.repeatedPages += repeatedPages
            state.info.errorDescription = nil
            state.remainingPages += repeatedPages
            // The time between says nothing of the rates.
            state.collectedAt = nil
        }
    }

    /// A new connection took up postcopy: so many pages are not at the destination, and may have been sent before.
    func recovered(remainingPages: UInt64) {
        state.withLock { state in
            state.info.resumptions += 1
            state.info.repeatedPages += remainingPages - min(remainingPages, state.remainingPages)
            state.info.errorDescription = nil
            state.remainingPages = remainingPages
            state.info.ram?.remaining = remainingPages * 4096
        }
    }

    func agreed(_ rule: HandoverRule) { state.withLock { $0.info.rule = rule } }

    func end(error: String?) { state.withLock { $0.info.errorDescription = error } }

    // MARK: Sending

    /// Counts a batch of page records, or a packet of a channel besides the main one.
    /// - Parameter holes: zero pages that were not known to need sending.
    func sent(
        bytes: UInt64, normal: UInt64 = 0, duplicate: UInt64 = 0, holes: UInt64 = 0, overChannels: Bool = false
    ) {
        state.withLock { state in
            count(&state, bytes)
            if overChannels { state.info.ram?.multifdBytes += bytes }
            state.info.ram?.normal += normal
            state.info.ram?.duplicate += duplicate + holes
            state.remainingPages -= min(state.remainingPages, normal + duplicate)
            state.info.ram?.remaining = state.remainingPages * 4096
        }
    }

    private func count(_ state: inout State, _ bytes: UInt64) {
        state.info.ram?.transferred += bytes
        if state.isPostcopy {
            state.info.ram?.postcopyBytes += bytes
        } else if state.lastMark == nil {
            state.info.ram?.precopyBytes += bytes
        } else {
            state.info.ram?.downtimeBytes += bytes
        }
    }

    /// What is sent from here on follows a guest that moved.
    func beginPostcopy() { state.withLock { $0.isPostcopy = true } }

    /// Counts a request of the destination.
    func requested() { state.withLock { $0.info.ram?.postcopyRequests += 1 } }

    /// Counts what delta compression did with a batch; `bytes` of it are in the batch's already.
    func encoded(_ counts: XBZRLECounts) {
        guard counts.seen > 0 else { return }
        state.withLock { state in
            state.info.xbzrle?.add(counts)
            state.deltas.add(counts)
            state.remainingPages -= min(state.remainingPages, counts.deltasAndUnchanged)
            state.info.ram?.remaining = state.remainingPages * 4096
        }
    }

    /// The dirty pages were collected. - Returns: for the how manieth time.
    func collected(remainingPages: UInt64) -> UInt64 {
        state.withLock { state in
            let now = Clock.monotonicNanoseconds
            // As in QEMU, the first look at what is to be sent is a part of the setup.
            if state.info.setupNanoseconds == nil { state.info.setupNanoseconds = now - state.began }
            guard var ram = state.info.ram else { return 0 }
            let pages = ram.normal + ram.duplicate
            if state.lastMark != nil {
                // The guest stands still: its rates are those of before.
            } else if let before = state.collectedAt, now > before {
                let seconds = Double(now - before) / 1e9
                ram.mbps = Double(ram.transferred - state.bytesAtCollect) * 8 / 1e6 / seconds
                ram.pagesPerSecond = UInt64(Double(pages - state.pagesAtCollect) / seconds)
                let fresh = remainingPages - min(remainingPages, state.remainingPages)
                ram.dirtyPagesRate = UInt64(Double(fresh) / seconds)
            } else if ram.dirtySyncCount == 0 {
                ram.hole = ram.total / 4096 - min(ram.total / 4096, remainingPages)
            }
            ram.dirtySyncCount += 1
            state.info.xbzrle?.setRates(of: state.deltas)
            state.deltas = XBZRLECounts()
            ram.remaining = remainingPages * 4096
            state.info.ram = ram
            state.remainingPages = remainingPages
            (state.collectedAt, state.bytesAtCollect, state.pagesAtCollect) = (now, ram.transferred, pages)
            return ram.dirtySyncCount
        }
    }

    /// What the guest would see if it were stopped now.
    func expect(downtimeNanoseconds: UInt64) {
        state.withLock { $0.info.expectedDowntimeNanoseconds = downtimeNanoseconds }
    }

    // MARK: Downtime

    func beginDowntime() {
        state.withLock { state in
            state.info.downtime = MigrationInfo.Downtime()
            state.lastMark = Clock.monotonicNanoseconds
        }
    }

    /// A part of the standstill has ended.
    func mark(_ part: Part) {
        state.withLock { state in
            guard let last = state.lastMark else { return }
            let now = Clock.monotonicNanoseconds
            state.info.downtime?.parts.append((part.rawValue, now - last))
            state.lastMark = now
        }
    }

    func endDowntime(completed: Bool) {
        if completed { mark(.start) }
        state.withLock { state in
            if !completed {
                // Not for nothing: the guest stood still all the same (`brokeOff`).
                state.brokenParts = state.info.downtime ?? MigrationInfo.Downtime()
                if let last = state.lastMark {
                    let part = Part(after: state.brokenParts.parts)
                    state.brokenParts.parts.append((part.rawValue, Clock.monotonicNanoseconds - last))
                }
                state.info.downtime = nil
            }
            state.lastMark = nil
        }
    }

    /// The standstill that has just ended was broken off.
    func brokeOff(_ switchover: BrokenSwitchover) {
        state.withLock { state in
            var switchover = switchover
            switchover.nanoseconds = state.brokenParts.nanoseconds
            state.info.brokenSwitchovers += 1
            state.info.longestBrokenNanoseconds = max(state.info.longestBrokenNanoseconds, switchover.nanoseconds)
            state.info.brokenAttempts.append(.init(switchover: switchover, parts: state.brokenParts))
            let excess = state.info.brokenAttempts.count - MigrationInfo.brokenAttemptsKept
            if excess > 0 { state.info.brokenAttempts.removeFirst(excess) }
        }
    }
}

extension XBZRLECounts {
    fileprivate mutating func add(_ more: XBZRLECounts) {
        seen += more.seen
        pages += more.pages
        misses += more.misses
        bytes += more.bytes
        overflows += more.overflows
    }
}

extension MigrationInfo.XBZRLE {
    fileprivate mutating func add(_ more: XBZRLECounts) {
        cacheBytes = more.cacheBytes
        pages += more.pages
        cacheMisses += more.misses
        bytes += more.bytes
        overflows += more.overflows
    }

    /// Rates are those of the last round with such pages, as in QEMU.
    fileprivate mutating func setRates(of round: XBZRLECounts) {
        guard round.seen > 0 else { return }
        cacheMissRate = Double(round.misses) / Double(round.seen)
        guard round.pages > 0 else { return }
        encodingRate = round.bytes == 0 ? 0 : Double(round.pages * 4096) / Double(round.bytes)
    }
}

extension MigrationInfo.RAM {
    /// After the end, rates are those of the whole migration, as in QEMU.
    fileprivate mutating func setRates(over nanoseconds: UInt64) {
        let seconds = Double(max(nanoseconds, 1)) / 1e9
        mbps = Double(transferred) * 8 / 1e6 / seconds
        pagesPerSecond = UInt64(Double(normal + duplicate) / seconds)
    }
}
