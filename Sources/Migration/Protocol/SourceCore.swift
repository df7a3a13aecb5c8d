public import MigrationStream

/// How far a source is. The order is that of a migration that goes well; the last ones are the ways out.
public enum SourcePhase: Int, Comparable, Sendable {
    case idle
    case connecting
    /// The connection was lost, the guest runs, the operator is awaited.
    case paused
    /// The operator wants it to go on: a new connection is made.
    case reopening
    /// Waiting for PONG.
    case greeting
    /// RESUME was said, RESUMED is awaited.
    case resuming
    case startingTracking
    case collecting
    case sendingRound
    /// PING was said before the guest is stopped, PONG is awaited: what stands in socket buffers arrives while the guest runs.
    case draining
    /// A switchover is not worth trying just now: the guest runs, a moment is let pass.
    case resting
    /// Postcopy: the channel for requested pages is not open yet, the guest runs.
    case openingUrgentChannel
    /// A switchover was broken off and the guest runs again; what was under way then is to end.
    case breakingOff
    /// RETRACT was said, RETRACTED is awaited.
    case retracting
    case stoppingGuest
    /// The operator wants to be asked before the switch.
    case preSwitchover
    case finalCollecting
    case finalSending
    /// QEMU's rule: PING was said behind the last pages, PONG is awaited. There is no way back once END was said.
    case confirming
    case savingState
    /// Postcopy: what the destination must forget leaves, while the state is saved.
    case discarding
    /// One-way: all but EOF leaves.
    case flushingState
    /// Two-phase: PREPARE was said, READY is awaited.
    case preparing
    /// The destination's record of RAM differs, and it asks for digests to find out where. The guest runs on.
    case narrowing
    // From here on the right to run is given up.
    /// COMMIT or QEMU's EOF was said, the acknowledgement is awaited.
    case committed
    /// One-way: EOF leaves.
    case handingOver
    /// One-way: the other end says how it went.
    case closing
    /// STARTED was heard, SHUT is awaited.
    case acknowledged
    /// Postcopy: the package with the guest's state is being handed over.
    case packageLeaving
    /// Postcopy: the guest runs there, its memory follows.
    case pulled
    /// Postcopy: all memory and EOF were sent, SHUT is awaited.
    case pulledWhole
    /// Postcopy: the connection was lost, the guest moved, what is missing of its memory is here.
    case postcopyPaused
    /// Postcopy: the operator wants it to go on, and a new connection is made.
    case recoverConnecting
    /// Between two Godwits: the destination is to show that it is the same process, and takes the new connection (RESUMED).
    case recoverGreeting
    /// RECV_BITMAP was said for all blocks, what the destination has is awaited.
    case recoveringBitmaps
    /// POSTCOPY_RESUME was said, RESUME_ACK is awaited.
    case resumingPostcopy
    // Ways out.
    /// The migration failed or was cancelled; the round under way ends, then CANCEL is said.
    case retreating
    case unsettled
    case reconnecting
    /// SETTLE was said, VERDICT is awaited.
    case asking
    case finished

    public static func < (left: SourcePhase, right: SourcePhase) -> Bool { left.rawValue < right.rawValue }
}

/// The source's side of one migration, as a value: events go in, actions come out. See `ProtocolEvents.swift` for what a
/// shell does with them.
///
/// Its promise: the guest runs here, or is made to run again after any failure, as long as ``mayRun``; and the right to
/// run is given up before the bytes that let the destination start it are sent. A guest that would stand still for longer than the
/// downtime limit runs on here instead, as long as the destination was not told to start it (`SourceCore+Contract`).
public struct SourceCore: Sendable {
    public internal(set) var phase = SourcePhase.idle
    public internal(set) var status = MigrationStatus.none
    /// Known once the destination answered, or at once on a one-way transport.
    public internal(set) var rule: HandoverRule?
    public internal(set) var features: FeatureSet = []
    /// The right to run the guest: false from just before COMMIT (or EOF) is sent.
    public internal(set) var mayRun = true
    public internal(set) var configuration: SourceConfiguration

    static let ramSectionID: UInt32 = 2
    /// The PING of `draining`.
    static let drainPing: UInt32 = 2
    /// The PING of `confirming`, counted up from here.
    static let confirmPing: UInt32 = 0x100
    /// So little in flight is not waited for.
    static let drainLimitBytes: UInt64 = 64 << 10

    var timers = TimerLedger()
    var writer = StreamWriter()
    var direction = ConnectionDirection.bothWays
    var isConnected = false
    var helloFeatures: FeatureSet?
    /// The process that answered first: no other has what was sent.
    var peer: InstanceIdentifier?
    var roundIsUnderWay = false
    var ramSectionIsOpen = false
    var stopWasAsked = false
    var isTracking = false
    var unansweredPings: UInt64 = 0
    /// PINGs of this core on this connection that no PONG was heard for, and words that came without having been asked for.
    var pongsAwaited: UInt64 = 0
    var unaskedWords: UInt64 = 0
    /// So many are put up with: a destination that never stops would cost a processor for as long as the migration takes.
    static let unaskedWordLimit: UInt64 = 64
    /// The destination said that the guest may be stopped (SWITCHOVER_ACK).
    var switchoverIsAcknowledged = false
    /// What the destination may not have taken yet: sent since its last PONG.
    var undrainedBytes: UInt64 = 0
    var guestWasRunning = true
    /// All that is sent behind RAM.
    var sections: [DeviceSection] = []
    /// The moment of the event that is handled.
    var now: UInt64 = 0
    /// When the guest was told to stop, or the operator let it go on from `preSwitchover`.
    var stoppedAt: UInt64?
    /// When the part of the standstill that is under way began.
    var partBegan: UInt64 = 0
    /// Whether the downtime limit, if there is one, binds the standstill that is under way.
    var isBound = false
    /// Attempts that came as far as PREPARE, or as far as the PING of `confirming`.
    var attempt: UInt32 = 0
    /// The last one for which READY was heard.
    var readyAttempt: UInt32 = 0
    /// Answers of the shell that are still to come, `breakingOff`.
    var awaited: Awaited?
    /// A new connection takes up the migration.
    var isResuming = false
    /// The shortest way there and back so far.
    var roundTripNanoseconds: UInt64 = 200_000
    var greetedAt: UInt64 = 0
    /// How often the destination asked for digests.
    var digestQuestions = 0
    /// The operator said that the guest shall move before its memory.
    var postcopyIsWanted = false
    /// The guest was stopped for that.
    var isPostcopy = false
    var urgentChannelIsAsked = false
    var urgentChannelIsOpen = false
    /// They are a Godwit's.
    var urgentChannelsAreGreeted = false
    /// Answers still to come of channels that were asked for by mistake.
    var urgentChannelsInVain = 0
    /// DISCARD was asked for: all that was dirty then is to follow the guest.
    var pagesAreHandedOver = false
    /// The destination may have memory to forget.
    var hasSentPages = false
    /// How often it was told to while the guest ran on, and when the last time.
    var turnsAhead = 0
    var turnBegan: UInt64 = 0
    /// Moves of this kind that were broken off.
    var brokenMoves = 0
    /// The last one was: let the policy have a moment pass first.
    var restsBeforeMove = false
    var discardsAreSent = false
    /// What the package will hold.
    var packagedState: [UInt8]?
    /// The destination has the package.
    var packageArrived = false
    /// All pages and the end of the stream were sent, over the last connection that worked.
    var allWasSent = false
    /// Why the connection is gone, while it is not known yet whether the package had left.
    var lossDuringPackage: String?
    /// Blocks of which the destination has not said yet what it has, on a connection that recovers.
    var bitmapsAwaited: Set<String> = []
    /// The guest will never be taken back (`x-postcopy-safety-net`), or is just being.
    var guestIsReleased = false
    var takesBack = false
    /// The destination said meanwhile that it will not run the guest.
    var refusalDuringPackage: String?
    /// How the migration will end once it has retreated, and what the destination hears of it.
    var ending: SourceOutcome?
    var farewell: String?

    public init(_ configuration: SourceConfiguration) {
        self.configuration = configuration
    }

    /// What the shell of a broken switchover still owes.
    enum Awaited: Sendable {
        case stop, collect, round, state, nothing
        /// DISCARD and the state, as far as they are still to come.
        case package
    }

    /// Takes one event and returns what to do, in order.
    /// - Parameter now: the moment of the event, in nanoseconds of a clock that never goes back.
    public mutating func handle(_ event: SourceEvent, at now: UInt64 = 0) -> [SourceAction] {
        self.now = max(now, self.now)
        var actions: [SourceAction] = []
        handle(event, &actions)
        return actions
    }

    private mutating func handle(_ event: SourceEvent, _ actions: inout [SourceAction]) {
        switch event {
        case .start: start(&actions)
        case .connected(let direction): connected(direction, &actions)
        case .connectFailed(let reason): connectFailed(reason, &actions)
        case .received(let message): received(message, &actions)
        case .disconnected(let reason): disconnected(reason, &actions)
        case .trackingStarted: trackingStarted(&actions)
        case .collected(let pages): collected(pages, &actions)
        case .progressed: progressed(&actions)
        case .roundSent(let report): roundSent(report, &actions)
        case .guestStopped: guestStopped(event, &actions)
        case .stateSaved(let sections): stateSaved(sections, &actions)
        case .urgentChannelOpened: urgentChannelOpened(&actions)
        case .urgentChannelFailed(let reason): urgentChannelFailed(reason, &actions)
        case .urgentChannelLost(let reason): urgentChannelLost(reason, &actions)
        case .discardsSent: discardsSent(&actions)
        case .packageSent: packageSent(&actions)
        case .packageCut(let reason): packageCut(reason, &actions)
        case .pagesServed: pagesServed(&actions)
        case .startPostcopy: startPostcopy(&actions)
        case .guestStays: guestStays(&actions)
        case .takeBackGuest: takeBackGuest(&actions)
        case .guestTakenBack: guestTakenBack(&actions)
        case .takeBackFailed(let reason): takeBackFailed(reason, &actions)
        case .breakOff: breakOffPostcopy(&actions)
        case .trackingFailed(let reason), .stopFailed(let reason), .stateFailed(let reason):
            if phase < .committed { retreat(.failed(reason), farewell: reason, &actions) }
        case .flushed: flushed(&actions)
        case .closed(let error): closed(error, &actions)
        case .timer(let timer): fired(timer, &actions)
        case .cancel: cancel(&actions)
        case .proceed: proceed(&actions)
        case .resume: resume(&actions)
        case .settle(let settlement): settle(settlement, &actions)
        case .setDowntimeLimit(let nanoseconds): setDowntimeLimit(nanoseconds, &actions)
        case .setBandwidthLimit(let bytesPerSecond):
            configuration.switchover.limit(to: bytesPerSecond, roundIsUnderWay: roundIsUnderWay)
        case .setAvailableBandwidth(let bytesPerSecond):
            configuration.switchover.availableBytesPerSecond = bytesPerSecond
        }
    }

    // MARK: What all phases use

    mutating func enter(_ phase: SourcePhase, deadline nanoseconds: UInt64?, _ actions: inout [SourceAction]) {
        self.phase = phase
        if let nanoseconds {
            actions.append(.setTimer(timers.set(.deadline), nanoseconds: nanoseconds))
        } else {
            cancelTimer(.deadline, &actions)
        }
    }

    mutating func cancelTimer(_ kind: ProtocolTimer.Kind, _ actions: inout [SourceAction]) {
        if timers.cancel(kind) { actions.append(.cancelTimer(kind)) }
    }

    mutating func report(_ status: MigrationStatus, _ actions: inout [SourceAction]) {
        guard self.status != status else { return }
        self.status = status
        actions.append(.report(status))
    }

    mutating func send(_ actions: inout [SourceAction], _ write: (inout StreamWriter) -> Void) {
        write(&writer)
        actions.append(.send(writer.take()))
    }

    mutating func ping(_ value: UInt32, _ actions: inout [SourceAction]) {
        pongsAwaited += 1
        send(&actions) { $0.command(.ping(value)) }
    }

    private mutating func progressed(_ actions: inout [SourceAction]) {
        switch phase {
        case .sendingRound, .finalSending, .breakingOff, .discarding, .flushingState, .handingOver:
            enter(phase, deadline: configuration.deadlines.stall, &actions)
        default: break
        }
    }

    /// What a deadline that passed means: one sentence per phase.
    var missedDeadline: String {
        switch phase {
        case .openingUrgentChannel: "the channel for requested pages was not opened in time (postcopy-preempt)"
        case .pulled: "the destination did not say in time that it has the guest's state"
        case .pulledWhole: "the destination did not say in time that all memory is there"
        case .connecting, .reconnecting, .reopening, .recoverConnecting:
            "the connection to the destination was not made in time"
        case .greeting where configuration.multifd != nil:
            "the destination does not answer; a QEMU waits for as many channels as its multifd-channels says"
        case .greeting, .resuming, .asking, .recoverGreeting: "the destination does not answer"
        case .recoveringBitmaps: "the destination did not say in time which pages it has"
        case .resumingPostcopy: "the destination did not go on in time"
        case .startingTracking: "dirty page tracking did not start in time"
        case .collecting, .finalCollecting: "the dirty pages were not collected in time"
        case .sendingRound, .finalSending, .breakingOff, .discarding, .flushingState, .handingOver, .packageLeaving:
            "the destination takes no more data"
        case .draining, .confirming: "the destination does not take what was sent"
        case .retracting: "the destination did not take the switchover back in time"
        case .stoppingGuest: "the guest did not stop in time"
        case .savingState: "the device state was not saved in time"
        case .narrowing: "the destination did not say in time which pages differ (x-verify)"
        case .preparing: "the destination did not become ready in time"
        case .committed: "the destination did not say in time whether it runs the guest"
        case .closing: "the other end did not finish in time"
        default: "a deadline passed"
        }
    }
}
