import Accelerator
import GuestMemory
import Host
import Synchronization

/// One client's door to a machine's `DirtyTracking`.
final class KVMDirtyTracker: DirtyTracker {
    let client: DirtyClient
    private let tracking: DirtyTracking
    /// CPU time spent in calls of this tracker.
    private let spent = Atomic<UInt64>(0)
    private struct Others: Sendable {
        var atStart: UInt64?
        var counted: UInt64 = 0
    }
    /// CPU time of threads that harvest beside the calls.
    private let others = Mutex(Others())

    var method: String { tracking.source.method }

    init(_ tracking: DirtyTracking, for client: DirtyClient) {
        self.tracking = tracking
        self.client = client
    }

    var cpuNanoseconds: UInt64 {
        let beside = others.withLock { others in
            others.atStart.map { tracking.source.otherCPUNanoseconds - $0 } ?? others.counted
        }
        return spent.load(ordering: .relaxed) + beside
    }

    func makePages() throws(AcceleratorError) -> sending [any DirtyPages] { try tracking.makePages() }

    func start() throws(AcceleratorError) {
        try counted { () throws(AcceleratorError) in try tracking.start(self) }
        others.withLock { $0.atStart = tracking.source.otherCPUNanoseconds }
    }

    func collect(into pages: [any DirtyPages]) throws(AcceleratorError) {
        try counted { () throws(AcceleratorError) in try tracking.collect(self, into: pages) }
    }

    func willSend(_ pages: Range<PageIndex>, of block: Int, marked record: any DirtyPages) throws(AcceleratorError) {
        try counted { () throws(AcceleratorError) in
            try tracking.willSend(pages, of: block, marked: record, self)
        }
    }

    func stop() {
        others.withLock { others in
            guard let start = others.atStart else { return }
            others = Others(atStart: nil, counted: tracking.source.otherCPUNanoseconds - start)
        }
        counted { tracking.stop(self) }
    }

    private func counted<E: Error>(_ body: () throws(E) -> Void) throws(E) {
        let before = Clock.threadCPUNanoseconds
        defer { spent.add(Clock.threadCPUNanoseconds - before, ordering: .relaxed) }
        try body()
    }
}
