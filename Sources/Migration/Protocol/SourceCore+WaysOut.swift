import MigrationStream

// Failure, cancel, doubt and its settlement.

extension SourceCore {
    // MARK: What goes wrong

    mutating func connectFailed(_ reason: String, _ actions: inout [SourceAction]) {
        switch phase {
        case .connecting: retreat(.failed(reason), farewell: nil, &actions)
        case .reconnecting: doubt(reason, &actions)
        case .reopening: pause(reason, &actions)
        case .recoverConnecting: pausePostcopy(reason, &actions)
        default: break
        }
    }

    mutating func disconnected(_ reason: String, _ actions: inout [SourceAction]) {
        guard isConnected else { return }
        if canPause { return pause(reason, &actions) }
        switch phase {
        case .idle..<SourcePhase.committed: retreat(.failed(reason), farewell: nil, &actions)
        case .committed where rule == .qemu: takeBack("\(reason), before the destination acknowledged", &actions)
        case .committed, .handingOver, .closing, .asking: doubt(reason, &actions)
        case .acknowledged: complete(&actions)
        case .packageLeaving, .pulled, .pulledWhole: postcopyLost(reason, &actions)
        case .recoverGreeting, .recoveringBitmaps, .resumingPostcopy: pausePostcopy(reason, &actions)
        case .retreating:
            roundIsUnderWay = false
            leave(farewell: nil, &actions)
        default: break
        }
    }

    mutating func fired(_ timer: ProtocolTimer, _ actions: inout [SourceAction]) {
        guard timers.fired(timer) else { return }
        switch timer.kind {
        case .keepAlive: return keepAlive(&actions)
        case .contract: return contractExpired(&actions)
        case .urgentChannel: return openUrgentChannel(&actions)
        case .deadline where phase == .resting: return collect(&actions)
        default: break
        }
        let reason = missedDeadline
        if canPause, waitsForPeer { return pause(reason, &actions) }
        switch phase {
        case .idle..<SourcePhase.committed:
            let peerListens = phase > .greeting && ![.sendingRound, .finalSending, .breakingOff].contains(phase)
            retreat(.failed(reason), farewell: peerListens ? reason : nil, &actions)
        case .committed, .handingOver, .closing, .reconnecting, .asking: doubt(reason, &actions)
        case .acknowledged: complete(&actions)
        // Its sender is stuck: whether RUN left will not be known.
        case .packageLeaving: doubt(reason, &actions)
        case .pulled, .pulledWhole: postcopyLost(reason, &actions)
        case .recoverConnecting...SourcePhase.resumingPostcopy: pausePostcopy(reason, &actions)
        case .retreating: leave(farewell: nil, &actions)
        default: break
        }
    }

    mutating func cancel(_ actions: inout [SourceAction]) {
        switch phase {
        case .idle, .retreating, .finished: break
        case .connecting..<SourcePhase.committed:
            retreat(.cancelled, farewell: "the operator cancelled the migration", &actions)
        case .committed, .handingOver, .closing, .acknowledged:
            actions.append(.refused("too late to cancel: the destination was told to start the guest"))
        case .packageLeaving...SourcePhase.resumingPostcopy:
            let remedy =
                phase == .postcopyPaused ? "; \(remedyForMoved)" : ""
            actions.append(
                .refused(
                    "too late to cancel: the guest moved (postcopy), and nobody has all of its memory before the end\(remedy)"
                ))
        default:
            actions.append(.refused("too late to cancel: settle whether the destination runs the guest"))
        }
    }

    // MARK: Retreat: before the right to run is given up

    /// Ends the migration with the guest running here. The guest does not wait for anything; only CANCEL, a courtesy to
    /// a Godwit destination, waits until the round under way has ended, and not for long.
    mutating func retreat(_ outcome: SourceOutcome, farewell: String?, _ actions: inout [SourceAction]) {
        guard phase < .committed else { return }
        let wasPaused = phase == .paused || isResuming
        ending = outcome
        cancelTimer(.keepAlive, &actions)
        endStandstill(&actions)
        if outcome == .cancelled { report(.cancelling, &actions) }
        if stopWasAsked { actions.append(.resumeGuest) }
        stopWasAsked = false
        guard let farewell, rule == .twoPhase, isConnected, !wasPaused else { return leave(farewell: nil, &actions) }
        guard roundIsUnderWay else { return leave(farewell: farewell, &actions) }
        self.farewell = farewell
        actions.append(.interruptRound)
        enter(.retreating, deadline: configuration.deadlines.farewell, &actions)
    }

    mutating func finishRetreat(_ actions: inout [SourceAction]) { leave(farewell: farewell, &actions) }

    private mutating func leave(farewell: String?, _ actions: inout [SourceAction]) {
        if let farewell {
            closeRAMSection(&actions)
            send(&actions) { $0.command(.cancel(reason: farewell)) }
        } else if features.contains(.resumption) {
            tellKeeper(&actions)
        }
        let wasConnecting = phase == .connecting || phase == .reopening
        let outcome = ending ?? .cancelled
        wind(up: &actions)
        if wasConnecting { actions.append(.close) }
        report(outcome == .cancelled ? .cancelled : .failed, &actions)
        actions.append(.finished(outcome))
    }

    // MARK: Doubt: after it

    /// The destination certainly does not run the guest and never will.
    mutating func takeBack(_ reason: String, _ actions: inout [SourceAction]) {
        mayRun = true
        actions.append(.regainRightToRun)
        actions.append(.resumeGuest)
        stopWasAsked = false
        wind(up: &actions)
        report(.failed, &actions)
        actions.append(.finished(.failed(reason)))
    }

    /// Whether the destination runs the guest is not known: it stays stopped here.
    mutating func doubt(_ reason: String, _ actions: inout [SourceAction]) {
        let wasConnecting = phase == .reconnecting
        wind(up: &actions)
        if wasConnecting { actions.append(.close) }
        phase = .unsettled
        report(.unsettled, &actions)
        let sentence = "\(reason); whether the guest runs at the destination is not known, so it stays stopped here"
        actions.append(.finished(.unsettled(sentence)))
    }

    mutating func settle(_ settlement: Settlement, _ actions: inout [SourceAction]) {
        // The shell asks again from time to time: to say no would be taken for the answer of who takes the guest back.
        if takesBack, settlement == .askDestination { return }
        guard status == .unsettled, !takesBack else {
            actions.append(.refused("there is nothing to settle, the migration's status is \(status.rawValue)"))
            return
        }
        switch settlement {
        case .startedThere:
            stopAsking(&actions)
            // It moved, and not all of its memory did.
            if isPostcopy {
                return pausePostcopy("the operator settled that the guest runs at the destination", &actions)
            }
            complete(&actions)
        // It may have run there for a while, and given that back; or it was released, and runs there.
        case .resumeHere where isPostcopy && features.contains(.safetyNet): takeBackGuest(&actions)
        case .resumeHere:
            stopAsking(&actions)
            takeBack("the operator settled that the guest goes on here", &actions)
        case .askDestination:
            // It is being asked already.
            guard phase == .unsettled else { return }
            guard rule == .twoPhase else {
                actions.append(.refused("this destination cannot be asked; find out whether it runs the guest"))
                return
            }
            actions.append(.connect)
            enter(.reconnecting, deadline: configuration.deadlines.connect, &actions)
        }
    }

    /// The operator need not wait for a destination that does not answer.
    private mutating func stopAsking(_ actions: inout [SourceAction]) {
        if phase == .reconnecting { actions.append(.close) }
    }

    mutating func ask(_ actions: inout [SourceAction]) {
        isConnected = true
        let migration = configuration.migration
        send(&actions) { writer in
            writer.header()
            writer.command(.settle(migration))
        }
        enter(.asking, deadline: configuration.deadlines.acknowledgement, &actions)
    }

    mutating func judged(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        guard case .verdict(let verdict) = message else {
            return doubt("the destination answered SETTLE with something else", &actions)
        }
        switch verdict {
        case .started where isPostcopy:
            packageArrived = true
            pausePostcopy("the connection was lost when the guest was to start at the destination", &actions)
        case .started: complete(&actions)
        case .neverStarted: takeBack("the destination did not start the guest and never will", &actions)
        case .unknown, .invalid: doubt("the destination does not know this migration", &actions)
        }
    }
}
