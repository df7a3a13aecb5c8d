import MigrationStream

// A connection lost before the handover, between two Godwits that agreed on it: the guest runs here, the destination keeps what it has,
// and the migration waits for an operator. `resume` makes a new connection, on which RAM goes on where it was.

extension SourceCore {
    static let strangerListens =
        "what listens there is not the process that this migration had as its destination; only that one has what was sent"

    /// Why a lost connection would end this migration, if it is not to.
    func unresumable(_ rule: HandoverRule, _ features: FeatureSet) -> String? {
        guard configuration.isResumable, !features.contains(.resumption) else { return nil }
        let reason =
            switch rule {
            case .oneWay: "nobody answers on this transport"
            case .qemu: "the destination is no Godwit"
            case .twoPhase: "the destination is a Godwit that does not know it"
            }
        return "x-resumable: \(reason), so the migration could not go on there after its connection was lost; "
            + "turn the capability off"
    }

    /// Whether the loss of the connection pauses the migration. Before tracking began nothing was sent that is worth keeping.
    var canPause: Bool {
        if isResuming { return [.reopening, .greeting, .resuming].contains(phase) }
        return features.contains(.resumption) && phase > .startingTracking && phase < .committed
    }

    /// Whether the deadline of this phase is one for the destination; a host that does not answer itself is another matter.
    var waitsForPeer: Bool {
        switch phase {
        case .reopening, .greeting, .resuming, .sendingRound, .finalSending, .draining, .confirming, .retracting,
            .preparing, .narrowing, .discarding:
            true
        case .breakingOff: awaited == .round || awaited == .package
        default: false
        }
    }

    /// The guest runs on here, and what the destination did not acknowledge is not counted as sent.
    mutating func pause(_ reason: String, _ actions: inout [SourceAction]) {
        if !isResuming { awaited = owedAnswer }
        isResuming = false
        cancelTimer(.keepAlive, &actions)
        endStandstill(&actions)
        if stopWasAsked { actions.append(.resumeGuest) }
        stopWasAsked = false
        actions.append(.abandon)
        isConnected = false
        ramSectionIsOpen = false
        unansweredPings = 0
        undrainedBytes = 0
        enter(.paused, deadline: nil, &actions)
        actions.append(.paused(reason))
        report(.paused, &actions)
    }

    /// What the shell still answers.
    private var owedAnswer: Awaited? {
        switch phase {
        case .stoppingGuest: .stop
        case .collecting, .finalCollecting: .collect
        case .sendingRound, .finalSending: .round
        case .savingState: .state
        // Whether DISCARD left does not matter any more.
        case .discarding: packagedState == nil ? .state : nil
        case .breakingOff where awaited == .package: packagedState == nil ? .state : nil
        case .breakingOff: awaited
        default: nil
        }
    }

    /// An answer nobody waits for; a migration that goes on must not take it for another one's.
    mutating func answeredLate(_ answer: Awaited) {
        if awaited == answer { awaited = nil }
    }

    // MARK: Going on

    mutating func resume(_ actions: inout [SourceAction]) {
        if phase == .postcopyPaused, !takesBack { return recover(&actions) }
        guard phase == .paused else {
            actions.append(.refused("there is nothing to resume, the migration's status is \(status.rawValue)"))
            return
        }
        isResuming = true
        helloFeatures = nil
        switchoverIsAcknowledged = false
        report(.setup, &actions)
        actions.append(.connect)
        enter(.reopening, deadline: configuration.deadlines.connect, &actions)
    }

    /// HELLO and PONG were heard on the new connection.
    mutating func askToResume(_ actions: inout [SourceAction]) {
        guard let offered = helloFeatures, features.isSubset(of: offered) else {
            return pause(Self.strangerListens, &actions)
        }
        let (migration, features) = (configuration.migration, features)
        send(&actions) { $0.command(.resume(migration, features)) }
        enter(.resuming, deadline: configuration.deadlines.ready, &actions)
    }

    mutating func resumed(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        guard message == .resumed else { return outOfTurn(message, &actions) }
        isResuming = false
        actions.append(.rewind)
        takeBackPages(isReconnected: true, &actions)
        advise(&actions)
        beginRAM(&actions)
        guard awaited != nil else { return collect(&actions) }
        // What was asked before the connection was lost, and never answered.
        enter(.breakingOff, deadline: configuration.deadlines.localWork, &actions)
    }

    /// This migration ends here, and the destination may not have heard it: it need not keep anything.
    mutating func tellKeeper(_ actions: inout [SourceAction]) {
        let migration = configuration.migration
        var writer = StreamWriter()
        writer.header()
        writer.command(.settle(migration))
        actions.append(.bidFarewell(writer.bytes))
    }
}
