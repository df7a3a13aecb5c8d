import CLinux

/// An eventfd: a flag that another thread, or the kernel, raises and a poll sees.
public final class EventDescriptor: Sendable {
    public let descriptor: Descriptor

    public init() throws(SystemError) {
        descriptor = Descriptor(owning: try checked(gw_eventfd(), "eventfd"), name: "eventfd")
    }

    /// Makes the descriptor readable. Never blocks.
    public func raise() { _ = try? descriptor.write([1, 0, 0, 0, 0, 0, 0, 0]) }

    /// Makes the descriptor unreadable again.
    public func clear() {
        _ = try? descriptor.read(upTo: 8)
    }

    public var isRaised: Bool {
        guard let ready = try? poll([(descriptor, .readable)], deadline: Deadline(at: 0)) else { return false }
        return ready[0].contains(.readable)
    }
}
