import MigrationStream

// A switchover that would take longer than the source's downtime limit is void: what was loaded is forgotten, RAM is awaited again.

extension DestinationCore {
    /// COMMIT_WITHIN counts from READY on, by our own clock: the source cannot have heard READY before it was said, so a guest that
    /// starts in time has stood still for no longer than the source allows.
    mutating func commit(_ attempt: UInt32, within nanoseconds: UInt64, _ actions: inout [DestinationAction]) {
        guard rule == .twoPhase, features.contains(.retraction), phase == .ready else {
            return outOfTurn("COMMIT", &actions)
        }
        guard now - readyAt <= nanoseconds else { return reopen(attempt, &actions) }
        committed = attempt
        let (deadline, isForEver) = readyAt.addingReportingOverflow(nanoseconds)
        startGuest(by: isForEver ? nil : deadline, &actions)
    }

    /// The time was over before a vCPU could enter the guest: COMMIT_WITHIN came too late after all.
    mutating func startedTooLate(_ actions: inout [DestinationAction]) {
        guard phase == .starting, let attempt = committed else { return }
        phase = .ready
        let isAskedFor = visitors.values.contains { $0.wish == .verdict }
        // One that came back takes the guest for one that runs: it has no way back either.
        guard source != nil, !isAskedFor, !isRecovering else {
            fail("the guest could not start in time, and its source is lost", tellsSource: isRecovering, &actions)
            return answerVisitors(&actions)
        }
        reopen(attempt, &actions)
    }

    mutating func retract(_ attempt: UInt32, _ actions: inout [DestinationAction]) {
        guard rule == .twoPhase, features.contains(.retraction), retraction == nil else {
            return outOfTurn("RETRACT", &actions)
        }
        switch phase {
        case .loading:
            retraction = attempt
            // It may be waiting for a page that does not come any more.
            unlisten(&actions)
        case .ready: reopen(attempt, &actions)
        // Only to forget what was out of date then.
        case .receiving where pull >= .discarding: reopen(attempt, &actions)
        default: outOfTurn("RETRACT", &actions)
        }
    }

    /// As if PREPARE had not been said, nor any device state sent.
    mutating func reopen(_ attempt: UInt32, _ actions: inout [DestinationAction]) {
        guard let source else { return fail("the source is lost", &actions) }
        retraction = nil
        // RAM goes on, and one of the channels that should bring it is gone.
        if let lostChannel {
            if canKeep { keep(lostChannel, &actions) } else { fail(lostChannel, &actions) }
            return
        }
        sections = []
        stateBytes = 0
        guestState = nil
        committed = nil
        rootIsSame = false
        phase = .receiving
        expectMore(&actions)
        report(.active, &actions)
        unlisten(&actions)
        guard !isUnlistening else { return owedRetraction = attempt }
        send(.retracted(attempt: attempt), to: source, &actions)
    }
}
