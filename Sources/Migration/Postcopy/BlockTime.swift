import GuestMemory
import Host
import Synchronization

/// How long each vCPU stood still for a page, and how long all did at once (capability `postcopy-blocktime`).
///
/// A vCPU is known by its thread. Where the kernel has a thread of its own fetch a page for a halted vCPU, that wait is nobody's.
final class BlockTime: Sendable {
    private struct Wait {
        let place: PageLatency.Place
        let since: UInt64
    }

    private struct State {
        /// By number of the vCPU.
        var waits: [Wait?]
        var nanoseconds: [UInt64]
        /// Since when none runs, and how long that was the case before.
        var allSince: UInt64?
        var allNanoseconds: UInt64 = 0
    }
    private let state: Mutex<State>
    private let threads: [Int32]

    /// - Parameter threads: the kernel's ids of the vCPUs' threads, in order.
    init(threads: [Int32]) {
        self.threads = threads
        state = Mutex(State(waits: threads.map { _ in nil }, nanoseconds: threads.map { _ in 0 }))
    }

    /// A thread waits for a page. One that was sent away meanwhile may wait for another, or for the same once more.
    func began(_ place: PageLatency.Place, thread: Int32) {
        guard let cpu = threads.firstIndex(of: thread) else { return }
        state.withLock { state in
            // Here, and not before: who comes to the lock later has the later time.
            let now = Clock.monotonicNanoseconds
            if let wait = state.waits[cpu] {
                guard wait.place != place else { return }
                state.nanoseconds[cpu] += now - wait.since
            }
            state.waits[cpu] = Wait(place: place, since: now)
            if state.allSince == nil, state.waits.allSatisfy({ $0 != nil }) { state.allSince = now }
        }
    }

    /// These pages are in memory.
    func ended(_ pages: Range<PageIndex>, of block: Int) {
        state.withLock { state in
            let now = Clock.monotonicNanoseconds
            for cpu in state.waits.indices {
                guard let wait = state.waits[cpu], wait.place.block == block, pages.contains(wait.place.page) else {
                    continue
                }
                state.waits[cpu] = nil
                state.nanoseconds[cpu] += now - wait.since
                if let since = state.allSince { state.allNanoseconds += now - since }
                state.allSince = nil
            }
        }
    }

    var figures: MigrationInfo.BlockTime {
        state.withLock { MigrationInfo.BlockTime(allNanoseconds: $0.allNanoseconds, cpuNanoseconds: $0.nanoseconds) }
    }
}
