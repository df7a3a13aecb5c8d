import GuestMemory
import Host
import Synchronization

/// How long each vCPU stood still for pages, and how long all did at once (capability `postcopy-blocktime`).
///
/// A vCPU is known by its thread. Where the kernel has a thread of its own fetch a page for a halted vCPU, that wait is one of the others', as
/// are those of QMP commands.
final class BlockTime: Sendable {
    private struct Wait {
        let place: PageLatency.Place
        let since: UInt64
    }

    private struct State {
        /// By number of the vCPU: what it waits for, and what it waited for before.
        var waits: [Wait?]
        var sums: [MigrationInfo.BlockTime.Sum]
        /// Other threads, by the kernel's id.
        var others: [Int32: Wait] = [:]
        var otherSum = MigrationInfo.BlockTime.Sum()
        /// Since when none runs, and how long that was the case before.
        var allSince: UInt64?
        var allNanoseconds: UInt64 = 0
    }
    private let state: Mutex<State>
    private let threads: [Int32]

    /// - Parameter threads: the kernel's ids of the vCPUs' threads, in order.
    init(threads: [Int32]) {
        self.threads = threads
        state = Mutex(State(waits: threads.map { _ in nil }, sums: threads.map { _ in .init() }))
    }

    /// A thread waits for a page. One that was sent away meanwhile may wait for another, or for the same once more.
    func began(_ place: PageLatency.Place, thread: Int32) {
        let cpu = threads.firstIndex(of: thread)
        state.withLock { state in
            // Here, and not before: who comes to the lock later has the later time.
            let now = Clock.monotonicNanoseconds
            let before = cpu.map { state.waits[$0] } ?? state.others[thread]
            guard before?.place != place else { return }
            let wait = Wait(place: place, since: now)
            guard let cpu else {
                if let before { state.otherSum.add(now - before.since) }
                state.others[thread] = wait
                return
            }
            if let before { state.sums[cpu].add(now - before.since) }
            state.waits[cpu] = wait
            if state.allSince == nil, state.waits.allSatisfy({ $0 != nil }) { state.allSince = now }
        }
    }

    /// These pages are in memory.
    func ended(_ pages: Range<PageIndex>, of block: Int) {
        func isOver(_ wait: Wait) -> Bool { wait.place.block == block && pages.contains(wait.place.page) }
        state.withLock { state in
            let now = Clock.monotonicNanoseconds
            for cpu in state.waits.indices {
                guard let wait = state.waits[cpu], isOver(wait) else { continue }
                state.waits[cpu] = nil
                state.sums[cpu].add(now - wait.since)
                if let since = state.allSince { state.allNanoseconds += now - since }
                state.allSince = nil
            }
            for (thread, wait) in state.others where isOver(wait) {
                state.others[thread] = nil
                state.otherSum.add(now - wait.since)
            }
        }
    }

    var figures: MigrationInfo.BlockTime {
        state.withLock { .init(allNanoseconds: $0.allNanoseconds, cpus: $0.sums, others: $0.otherSum) }
    }
}
