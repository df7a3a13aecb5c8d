import MigrationStream

// A postcopy whose connection was lost, and the next connection. The guest runs on meanwhile, as far as its memory is here; who touches
// a missing page waits.
//
// A QEMU source says without a header which bitmaps it wants: who does so is believed where the operator has just said that one may come
// (`migrate-recover`), and only there. A Godwit's guest is given to nobody who does not know the migration's name.

extension DestinationCore {
    /// Whether the guest is ours and its source is lost.
    var isForsaken: Bool { isBound && source == nil }

    /// Whether that connection may be told what is here.
    public func isRecovering(_ connection: ConnectionID) -> Bool { connection == source && isRecovering }

    /// Closed ones that a thread may still be reading.
    public var earlierConnections: [ConnectionID] { oldReaders }

    mutating func cameToRecover(_ connection: ConnectionID, _ actions: inout [DestinationAction]) {
        guard let visitor = visitors[connection], visitor.wish == .unknown else { return }
        guard isForsaken, recoveryIsAwaited, visitor.answers else {
            return dismiss(connection, "it would take up a postcopy, and nobody said migrate-recover", &actions)
        }
        // A Godwit knows the migration's name, and says it.
        guard rule != .twoPhase else {
            return dismiss(connection, "it would take up a postcopy without saying which", &actions)
        }
        takeUp(connection, &actions)
    }

    private mutating func takeUp(_ connection: ConnectionID, _ actions: inout [DestinationAction]) {
        visitors[connection] = nil
        cancelTimer(.visitor(connection), &actions)
        source = connection
        sourceHears = true
        returnPathIsOpen = true
        ramIsComplete = false
        isRecovering = true
        enter(phase, deadline: configuration.deadlines.acknowledgement, &actions)
        report(.postcopyRecover, &actions)
    }

    // MARK: Between two Godwits

    /// A Godwit source knows the migration's name, which nobody else does: it may come back where it was, without being announced.
    var mayRejoinPull: Bool {
        rule == .twoPhase && features.contains(.postcopy) && pull >= .running && phase >= .starting && phase != .failed
    }

    mutating func rejoinPull(
        _ connection: ConnectionID, _ asked: MigrationIdentifier, _ chosen: FeatureSet,
        _ actions: inout [DestinationAction]
    ) {
        guard asked == migration, chosen == features else {
            return refuseCandidate(connection, "migration \(asked) is not kept here", &actions)
        }
        guard visitors[connection]?.opensReturnPath == true else {
            return refuseCandidate(connection, "the source did not open the return path", &actions)
        }
        // The old connection may still stand here: its last words are void from now on.
        losePull("it comes back on another connection", &actions)
        guard pull == .running else {
            visitors[connection]?.wish = .answered
            return send(.shut(0), to: connection, &actions)
        }
        takeUp(connection, &actions)
        send(.resumed, to: connection, &actions)
    }

    // MARK: What is said on the new connection

    /// The bitmaps themselves are said by who reads the connection.
    mutating func takeInRecovery(_ item: StreamItem, _ actions: inout [DestinationAction]) {
        switch item {
        case .ramSetup, .ramRecordsEnded, .ramSectionEnded(.start): break
        case .command(.ping(let value)): answer(ping: value, &actions)
        case .command(.postcopy(.receiveBitmap)):
            enter(phase, deadline: configuration.deadlines.acknowledgement, &actions)
        case .command(.postcopy(.resume)): goOnPulling(&actions)
        default: losePull("it sent something out of turn while it recovers", &actions)
        }
    }

    /// What was asked for and has not come is asked for again by the shell, behind this answer.
    private mutating func goOnPulling(_ actions: inout [DestinationAction]) {
        guard let source else { return }
        pullLoss = nil
        recoveryIsAwaited = false
        isRecovering = false
        // A guest that is still being started goes on with that.
        let isStarted = phase == .pullPaused
        enter(isStarted ? .pulling : phase, deadline: isStarted ? configuration.deadlines.stall : nil, &actions)
        report(.postcopyActive, &actions)
        send(.postcopy(.resumeAcknowledged), to: source, &actions)
        goOnWithEpochs(&actions)
    }
}
