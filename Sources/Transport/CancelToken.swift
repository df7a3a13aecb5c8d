public import Host
import Synchronization

/// Ends, from any thread, a connect or an accept that waits. Once cancelled it stays so.
public final class CancelToken: Sendable {
    /// Readable once cancelled.
    let event: EventDescriptor
    private let flag = Atomic(false)

    public init() throws(SystemError) { event = try EventDescriptor() }

    /// Never blocks; may be called often.
    public func cancel() {
        flag.store(true, ordering: .releasing)
        event.raise()
    }

    public var isCancelled: Bool { flag.load(ordering: .acquiring) }

    func check() throws(ChannelError) {
        if isCancelled { throw .cancelled }
    }
}
