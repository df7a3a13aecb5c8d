import GuestMemory
import Host
import MigrationStream
import Synchronization

/// Which pages were sent and not acknowledged: what may have been lost with the connection (capability `x-resumable`).
///
/// Pages are counted in stretches of 28 MiB with a mark (``ResumptionMark``) behind each. One stretch may be on its way while the next is
/// filled: so never more than 60 MiB are in doubt, a batch at the end of each included.
struct UnacknowledgedPages {
    private typealias Stretch = [(block: Int, runs: [Range<PageIndex>])]

    private var closed: [(mark: ResumptionMark, pages: Stretch)] = []
    private var current: Stretch = []
    private var currentPages: UInt64 = 0
    private var next = ResumptionMark(number: 0)

    private static let stretchPages: UInt64 = 28 << 8

    mutating func sent(_ runs: [Range<PageIndex>], of block: Int, pages: UInt64) {
        current.append((block, runs))
        currentPages += pages
    }

    /// Whether a mark belongs here.
    var isMarkDue: Bool { currentPages >= Self.stretchPages }
    /// Whether nothing may be sent before a mark is acknowledged.
    var isFull: Bool { closed.count > 1 }

    /// The mark behind what was sent.
    mutating func close() -> ResumptionMark {
        defer { next = next.next }
        closed.append((next, current))
        current = []
        currentPages = 0
        return next
    }

    /// All before that mark was placed. One that is not awaited changes nothing.
    mutating func acknowledged(_ mark: ResumptionMark) {
        guard let index = closed.firstIndex(where: { $0.mark == mark }) else { return }
        closed.removeSubrange(...index)
    }

    /// Marks all of it as dirty, and forgets it. - Returns: how many pages that were.
    mutating func putBack(into records: [any DirtyPages]) -> UInt64 {
        let before = records.reduce(0) { $0 + $1.count }
        for stretch in closed.map(\.pages) + [current] {
            for (block, runs) in stretch { for run in runs { records[block].set(run) } }
        }
        closed = []
        current = []
        currentPages = 0
        return records.reduce(0) { $0 + $1.count } - before
    }
}

/// The last mark that the destination acknowledged. Written where answers are read, waited for where
/// pages are sent.
final class MarkBoard: Sendable {
    private let latest = Monitor<ResumptionMark?>(nil)
    /// Marks that were said on this connection and not acknowledged.
    private let awaited = Mutex<UInt64>(0)
    private static let lookMilliseconds: UInt64 = 20

    /// Before a mark is said.
    func expect() { awaited.withLock { $0 += 1 } }

    /// - Returns: false if no mark is awaited: then it changes nothing.
    func acknowledged(_ mark: ResumptionMark) -> Bool {
        let isAwaited = awaited.withLock { count -> Bool in
            guard count > 0 else { return false }
            count -= 1
            return true
        }
        if isAwaited { latest.withLock { $0 = mark } }
        return isAwaited
    }

    /// Another connection begins, on which nothing was said yet. What was acknowledged on the last one holds.
    func startOver() { awaited.withLock { $0 = 0 } }

    /// The last one since this was asked before, if any; waits a moment for it where `waits`.
    func take(waits: Bool) -> ResumptionMark? {
        guard waits else {
            return latest.withLock { latest in
                defer { latest = nil }
                return latest
            }
        }
        return latest.wait(deadline: .after(milliseconds: Self.lookMilliseconds)) { latest in
            defer { latest = nil }
            return latest
        }
    }
}
