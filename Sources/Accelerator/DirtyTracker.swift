public import GuestMemory

/// Reports which pages were written, to one client. Used by one thread at a time; trackers of different clients go side by side.
///
/// What a tracker has reported or will report is never lost: a page stays reported until `willSend` names it, and a write after
/// `willSend` is reported again; not when a memory slot is moved, resized or removed, and not when a ring fills. A page that was never
/// touched is never reported.
public protocol DirtyTracker: AnyObject, Sendable {
    var client: DirtyClient { get }
    /// Empty records for `collect`, one per RAM block, of the kind that suits this tracker.
    func makePages() throws(AcceleratorError) -> sending [any DirtyPages]
    /// Starts tracking. The first `collect` reports every page that was ever touched.
    func start() throws(AcceleratorError)
    /// Adds pages written since they were last sent to `pages`, one record per RAM block in order. Clears them for this client alone.
    func collect(into pages: [any DirtyPages]) throws(AcceleratorError)
    /// Call before reading pages to send them: those marked in `record` inside `pages` are watched afresh from now on.
    /// - Precondition: `pages` starts at a multiple of 64.
    func willSend(_ pages: Range<PageIndex>, of block: Int, marked record: any DirtyPages) throws(AcceleratorError)
    /// Stops tracking for this client; with the last client the guest runs at full speed again.
    func stop()
    /// `log` or `ring`, for the report.
    var method: String { get }
    /// CPU time spent in this tracker's calls, and in threads that harvest for it, in nanoseconds.
    var cpuNanoseconds: UInt64 { get }
}

/// Dirty rates by vCPU, and limits to them: what a dirty ring makes possible.
public protocol DirtyRateControl: AnyObject, Sendable {
    /// Pages reported dirty by each vCPU since it was made; counts only while a tracker is on. A ring entry counts once, whatever
    /// becomes of it.
    var dirtiedPages: [UInt64] { get }
    /// Collects what stands in the rings, so that `dirtiedPages` is up to date. Does not stop vCPUs.
    func harvest() throws(AcceleratorError)
    /// Limits one vCPU, or all (`nil`), to `bytesPerSecond` of dirtied pages; `nil` ends the limit. Keeps tracking on while set.
    /// - Throws: `AcceleratorError` for a vCPU that is not there.
    func setLimit(_ bytesPerSecond: UInt64?, of cpu: Int?) throws(AcceleratorError)
    /// The limits that are set: vCPU, limit and present rate, in bytes per second.
    var limits: [DirtyLimit] { get }
}

/// One vCPU's limit and what it does.
public struct DirtyLimit: Sendable, Equatable {
    public let cpu: Int
    public let limitBytesPerSecond: UInt64
    public let currentBytesPerSecond: UInt64
    /// The part of its time in which the limit kept it from running.
    public let pausedShare: Double
    public init(cpu: Int, limitBytesPerSecond: UInt64, currentBytesPerSecond: UInt64, pausedShare: Double = 0) {
        self.pausedShare = pausedShare
        self.cpu = cpu
        self.limitBytesPerSecond = limitBytesPerSecond
        self.currentBytesPerSecond = currentBytesPerSecond
    }
}
