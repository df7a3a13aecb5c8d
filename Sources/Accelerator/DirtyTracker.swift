public import GuestMemory

/// Reports which pages were written. Used by one thread at a time.
///
/// What a tracker has reported or will report is never lost: a page stays reported until `willSend` names it, and a write after
/// `willSend` is reported again. A page that was never touched is never reported.
public protocol DirtyTracker: AnyObject, Sendable {
    /// Starts tracking. The first `collect` reports every page that was ever touched.
    func start() throws(AcceleratorError)
    /// Adds pages written since they were last sent to `bitmaps`, one per RAM block in order.
    func collect(into bitmaps: [DirtyBitmap]) throws(AcceleratorError)
    /// Call before reading pages to send them: those marked in `bitmap` inside `pages` are watched afresh from now on.
    /// - Precondition: `pages` starts at a multiple of 64.
    func willSend(_ pages: Range<PageIndex>, of block: Int, marked bitmap: DirtyBitmap) throws(AcceleratorError)
    /// Stops tracking; the guest runs at full speed again.
    func stop()
    /// `log`, for the report.
    var method: String { get }
}
