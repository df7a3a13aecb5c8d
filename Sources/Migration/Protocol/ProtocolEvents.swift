// The protocol's face to the shell: what goes into `SourceCore` and `DestinationCore`, and what comes out. `SourceEvents.swift` and
// `DestinationEvents.swift` have the words of each side, here is what holds for both.
//
// Rules for a shell:
// * Actions are performed in the order given. An action with an arrow answers with exactly one of the events named, at
//   once or later; other events may come in between. Answers nobody waits for any more are ignored by the core, so a
//   shell need not withdraw them.
// * Whoever owns the core feeds it one event at a time and never blocks on the network while doing so: `send` queues or
//   writes, and a write that fails is told as `disconnected`. `close` interrupts a write or read that is stuck.
// * Bytes that arrived before a connection ended are told before `disconnected`.
// * Timers are one-shot; setting a timer of the same `kind` replaces it. A timer that fires although it was replaced or
//   cancelled is recognised by its generation and ignored.
// * A core serves one migration (source) or one waiting process (destination). It holds no clock: durations come in
//   events, measured by the shell, and the moment of an event comes with it (`at`, monotonic).

/// Which timer, and which setting of it.
public struct ProtocolTimer: Hashable, Sendable {
    public enum Kind: Hashable, Sendable {
        /// The wait of the present phase.
        case deadline
        /// The next sign of life to send.
        case keepAlive
        /// By then the destination must have been told to start, or the guest runs on at the source.
        case contract
        /// The wait for the first PONG before the channel for requested pages is opened.
        case urgentChannel
        /// The wait for a further connection to say what it wants.
        case visitor(ConnectionID)
        /// The wait for all channels of a multifd migration.
        case channels
    }

    public let kind: Kind
    public let generation: UInt64

    public init(kind: Kind, generation: UInt64) {
        self.kind = kind
        self.generation = generation
    }
}

/// How long each wait may last, in nanoseconds.
public struct ProtocolDeadlines: Hashable, Sendable {
    /// The connection is made.
    public var connect: UInt64 = 30_000_000_000
    /// The peer's first words: PONG at the source, the header at the destination.
    public var greeting: UInt64 = 10_000_000_000
    /// The peer takes or sends no data for that long.
    public var stall: UInt64 = 30_000_000_000
    /// Work of the own process: tracking starts, the guest stops, state is saved or loaded, the guest starts.
    public var localWork: UInt64 = 30_000_000_000
    /// At the source, from PREPARE to READY. At the destination, from READY to COMMIT.
    public var ready: UInt64 = 30_000_000_000
    /// From COMMIT (or QEMU's EOF) to the last acknowledgement.
    public var acknowledgement: UInt64 = 30_000_000_000
    /// A CANCEL is delivered to the peer, the guest meanwhile runs again.
    public var farewell: UInt64 = 1_000_000_000
    /// Between two signs of life while the source waits for its operator.
    public var keepAlive: UInt64 = 5_000_000_000
    /// A destination hears nothing from its source for that long. Not with a QEMU source, which is silent for as long as
    /// its operator lets it wait before the switch.
    public var idle: UInt64 = 120_000_000_000
    /// A destination whose source was lost waits for RESUME: a day.
    public var kept: UInt64 = 86_400_000_000_000

    public init() {}
}
