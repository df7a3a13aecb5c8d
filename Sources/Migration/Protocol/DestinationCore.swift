public import MigrationStream

/// How far a destination is. The order is that of a migration that goes well; `failed` is the way out.
public enum DestinationPhase: Int, Comparable, Sendable {
    /// No source is accepted yet.
    case waiting
    /// The source was lost; what it sent is kept, and RESUME awaited.
    case kept
    /// RESUME came: nothing that was read from the old connection may be placed any more.
    case rejoining
    /// A source named its machine.
    case opened
    /// RAM arrives, then device state.
    case receiving
    /// All state is complete and being loaded.
    case loading
    /// READY was said, COMMIT is awaited.
    case ready
    // From here on the guest is ours.
    /// The guest is being started: nobody but who does it knows whether there is a way back.
    case starting
    /// The guest runs, and pages of it are still to come (postcopy).
    case pulling
    /// The guest runs, the source is lost, and pages of it are missing: who touches one waits.
    case pullPaused
    case started
    /// The guest never starts here.
    case failed

    public static func < (left: DestinationPhase, right: DestinationPhase) -> Bool { left.rawValue < right.rawValue }
}

/// The destination's side, as a value: events go in, actions come out. See `ProtocolEvents.swift`.
///
/// Every connection begins as a visitor; the first that names the right machine is the source, others are turned away or
/// come to ask (SETTLE). Its promise: the guest starts only on COMMIT (with QEMU: when the stream is complete), only after
/// all state is loaded, and never once "never started" was answered or FAILURE was said. COMMIT_WITHIN that comes too late starts
/// nothing: state is forgotten, and RAM awaited again (`DestinationCore+Retraction`).
public struct DestinationCore: Sendable {
    public internal(set) var phase = DestinationPhase.waiting
    public internal(set) var status = MigrationStatus.none
    public internal(set) var rule: HandoverRule?
    public internal(set) var features: FeatureSet = []
    public let configuration: DestinationConfiguration

    /// A connection that is not the source's.
    struct Visitor: Sendable {
        enum Wish: Hashable, Sendable {
            case unknown
            /// Waits for the end of the start that is under way.
            case verdict
            case answered
            /// Belongs to a migration that has not begun yet.
            case channel(MultifdGreeting)
            /// Has the right machine: it may take up the migration that is here (RESUME).
            case candidate
        }

        let answers: Bool
        /// Of a candidate: it opened the return path.
        var opensReturnPath = false
        /// Of a candidate: it heard HELLO.
        var wasGreeted = false
        /// Its time was over, and it may be the channel for requested pages: it has one more, once that is known.
        var isSpared = false
        var wish = Wish.unknown
    }

    /// All channels of a source, and some more.
    static let visitorLimit = 8 + StreamLimit.multifdChannels
    static let historyLimit = 64
    static let stateLimitBytes = 64 << 20

    var timers = TimerLedger()
    var visitors: [ConnectionID: Visitor] = [:]
    /// No connection comes after those that are here.
    var isLastChance = false
    /// Why the last visitor was not the source, or why the last source did not arrive.
    var lastDismissal: String?
    /// Migrations that were begun here and will never start, oldest first.
    var history: [MigrationIdentifier] = []

    // The migration under way; `forget` resets them.
    var source: ConnectionID?
    var sourceHears = false
    var returnPathIsOpen = false
    var helloWasSaid = false
    var migration: MigrationIdentifier?
    var ramIsComplete = false
    var memoryWasTouched = false
    var sections: [DeviceSection] = []
    var stateBytes = 0
    var guestState: GlobalState?
    /// The channels that were admitted, and what they call themselves.
    var channels: [ConnectionID: UInt8] = [:]
    /// One that was lost when it did not seem to be needed any more: what to say if it is.
    var lostChannel: String?
    /// How many a Godwit source says there are.
    var announcedChannels: Int?
    /// Postcopy, as far as it has come.
    var pull = PullProgress.none
    var packageHasCome = false
    /// Why the source is lost, though RUN was said.
    var pullLoss: String?
    /// Answers to `finishPull` that are still to come.
    var pullEndsOwed = 0
    /// The operator said where the source may come to go on.
    var recoveryIsAwaited = false
    /// A new connection takes up what is missing, and learns what is here (RECV_BITMAP). The guest may still be being started.
    var isRecovering = false
    /// The safety net's channel; it is among `urgent` as long as it is there.
    var net: ConnectionID?
    /// The source cannot take the guest back any more (`x-postcopy-safety-net`).
    var netIsOver = false
    /// No page is missing, and the source can still take the guest back.
    var memoryIsWhole = false
    /// Memory is being given up to the source again, as if nothing had been discarded.
    var isUnlistening = false
    /// Whom to answer then: the attempt that is taken back.
    var owedRetraction: UInt32?
    /// What is being loaded will not be used, and may miss pages.
    var loadIsVoid = false
    /// Channels for requested pages.
    var urgent: Set<ConnectionID> = []
    /// What a Godwit's call themselves.
    var urgentNumbers: [ConnectionID: UInt8] = [:]
    /// When READY was said, at the latest.
    var readyAt: UInt64 = 0
    /// Closed connections of this migration from which a thread may still be placing pages.
    var oldReaders: [ConnectionID] = []
    var readersHaveEnded = true
    var loadIsUnderWay = false
    /// RETRACT came while state was being loaded: it is answered when that has ended.
    var retraction: UInt32?
    /// The attempt that was told to start.
    var committed: UInt32?
    /// The source's root was compared with ours since the last page came.
    var rootIsSame = false
    /// The records differ: the source is asked where.
    var isNarrowing = false
    /// The moment of the event that is handled.
    var now: UInt64 = 0

    public init(_ configuration: DestinationConfiguration) {
        self.configuration = configuration
    }

    /// Whether pages of that connection may be placed into guest memory now, without asking for each.
    public func acceptsPages(on connection: ConnectionID) -> Bool {
        if pull >= .listening {
            guard !isRecovering else { return false }
            return urgent.contains(connection) || connection == source && pull < .complete && !ramIsComplete
        }
        return phase == .receiving && !ramIsComplete && pull < .discarding
            && (connection == source || channels[connection] != nil)
    }

    /// The same, asked by who is about to place pages: what was placed stays. A channel may be ahead of the stream's own words.
    public mutating func takesPages(on connection: ConnectionID) -> Bool {
        guard acceptsPages(on: connection) else { return false }
        memoryWasTouched = true
        return true
    }

    /// Takes one event and returns what to do, in order.
    /// - Parameter now: the moment of the event, in nanoseconds of a clock that never goes back.
    public mutating func handle(_ event: DestinationEvent, at now: UInt64 = 0) -> [DestinationAction] {
        self.now = max(now, self.now)
        var actions: [DestinationAction] = []
        switch event {
        case .accepted(let connection, let answers): accepted(connection, answers, &actions)
        case .greeted(let connection, let greeting): greeted(connection, greeting, &actions)
        case .cameForUrgentPages(let connection): cameForUrgentPages(connection, &actions)
        case .urgentEnded(let connection): urgentEnded(connection, &actions)
        case .cameToRecover(let connection): cameToRecover(connection, &actions)
        case .awaitRecovery: recoveryIsAwaited = isForsaken
        case .breakOff: losePull("the operator paused the migration", &actions)
        case .pullEnded(let missing): pullEnded(missing: missing, &actions)
        case .unlistened: unlistened(&actions)
        case .guestReleased(let connection): guestReleased(connection, &actions)
        case .keepGuest: keepGuest(&actions)
        case .item(let connection, let item): take(item, from: connection, &actions)
        case .rejected(let connection, let reason): rejected(connection, reason, &actions)
        case .disconnected(let connection, let reason): disconnected(connection, reason, &actions)
        case .progressed(let connection):
            if connection == source || channels[connection] != nil { expectMore(&actions) }
            if connection == source || urgent.contains(connection) { expectMorePages(&actions) }
        case .readersEnded(let connections): readersEnded(connections, &actions)
        case .pagesFailed(let reason):
            if phase < .starting { fail(reason, &actions) } else { losePull(reason, &actions) }
        case .stateLoaded(let nanoseconds): stateLoaded(nanoseconds, &actions)
        case .loadFailed where loadIsVoid: stateLoaded(0, &actions)
        case .loadFailed(let reason):
            loadIsUnderWay = false
            fail(reason, &actions)
        case .compared(let verdict): compared(verdict, &actions)
        case .guestStarted(let nanoseconds): guestStarted(nanoseconds, &actions)
        case .startFailed(let reason): startFailed(reason, &actions)
        case .startedTooLate: startedTooLate(&actions)
        case .timer(let timer): fired(timer, &actions)
        case .noFurtherConnection: noFurtherConnection(&actions)
        case .giveUp: giveUp(&actions)
        case .discard: discard(&actions)
        }
        if !visitors.isEmpty { hurrySilent(&actions) }
        return actions
    }

    // MARK: What all phases use

    mutating func enter(_ phase: DestinationPhase, deadline nanoseconds: UInt64?, _ actions: inout [DestinationAction])
    {
        self.phase = phase
        if let nanoseconds {
            actions.append(.setTimer(timers.set(.deadline), nanoseconds: nanoseconds))
        } else {
            cancelTimer(.deadline, &actions)
        }
    }

    mutating func cancelTimer(_ kind: ProtocolTimer.Kind, _ actions: inout [DestinationAction]) {
        if timers.cancel(kind) { actions.append(.cancelTimer(kind)) }
    }

    mutating func report(_ status: MigrationStatus, _ actions: inout [DestinationAction]) {
        guard self.status != status else { return }
        self.status = status
        actions.append(.report(status))
    }

    func send(_ message: ReturnPathMessage, to connection: ConnectionID, _ actions: inout [DestinationAction]) {
        var writer = StreamWriter()
        writer.message(message)
        actions.append(.send(connection, writer.bytes))
    }

    /// The source's next words have a deadline again. A QEMU source may be silent for as long as its operator likes.
    mutating func expectMore(_ actions: inout [DestinationAction]) {
        guard phase == .opened || phase == .receiving else { return }
        let isPatient = phase == .receiving && rule != .twoPhase
        enter(phase, deadline: isPatient ? nil : configuration.deadlines.idle, &actions)
    }
}
