/// How long a channel waits for a peer that moves no byte, in milliseconds. `nil` is for ever.
public struct StallLimits: Sendable, Equatable {
    public var sendMilliseconds: UInt64?
    public var receiveMilliseconds: UInt64?

    /// Sends wait 30 seconds. Receives wait for ever: a peer may have nothing to say.
    public init(sendMilliseconds: UInt64? = 30_000, receiveMilliseconds: UInt64? = nil) {
        self.sendMilliseconds = sendMilliseconds
        self.receiveMilliseconds = receiveMilliseconds
    }

    /// A blocking socket wakes up this many times in one limit, so that a stall is noticed within 1/8 after its limit.
    static let slices: UInt64 = 8

    static func slice(of milliseconds: UInt64?) -> UInt64? { milliseconds.map { max(1, ($0 + slices - 1) / slices) } }
}
