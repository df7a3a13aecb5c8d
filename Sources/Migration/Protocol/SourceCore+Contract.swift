import MigrationStream

// The downtime limit as a contract: as long as the destination was not told to start the guest, a standstill that would take longer
// than the limit is broken off, and the guest runs on here.
//
// COMMIT_WITHIN carries what is left of the limit when READY has been heard. The destination counts it from the moment it said READY,
// which was before: so a guest that starts there has stood still for no longer than the limit, however late COMMIT_WITHIN arrives.

extension SourceCore {
    private var limit: UInt64 { configuration.switchover.downtimeLimitNanoseconds }

    /// What the destination needs to hear of it and start: must be left of the limit when it is told.
    private var reserve: UInt64 {
        min(configuration.switchover.costs.commit(roundTrip: roundTripNanoseconds), limit / 4)
    }

    /// How long the guest has stood still so far.
    var standstill: UInt64 { stoppedAt.map { now - $0 } ?? 0 }

    /// The guest is told to stop, or goes on from its operator's hold, which does not count.
    mutating func beginStandstill(_ actions: inout [SourceAction]) {
        stoppedAt = now
        partBegan = now
        isBound = true
        if limit > 0 { setContractTimer(&actions) }
    }

    private mutating func setContractTimer(_ actions: inout [SourceAction]) {
        let end = limit - reserve
        let left = max(end - min(end, standstill), 1)
        actions.append(.setTimer(timers.set(.contract), nanoseconds: left))
    }

    /// The operator changed the limit: it holds for a standstill that is under way, too.
    mutating func setDowntimeLimit(_ nanoseconds: UInt64, _ actions: inout [SourceAction]) {
        // With every parameter that is changed all are told.
        guard limit != nanoseconds else { return }
        configuration.switchover.downtimeLimitNanoseconds = nanoseconds
        guard isBound else { return }
        if limit > 0 { setContractTimer(&actions) } else { cancelTimer(.contract, &actions) }
    }

    /// The operator's hold, or the end of the standstill.
    mutating func suspendContract(_ actions: inout [SourceAction]) {
        isBound = false
        cancelTimer(.contract, &actions)
    }

    mutating func endStandstill(_ actions: inout [SourceAction]) {
        suspendContract(&actions)
        stoppedAt = nil
    }

    /// A part of the standstill has ended. - Returns: how long it took.
    @discardableResult
    mutating func endPart(_ part: SwitchoverCosts.Part? = nil) -> UInt64 {
        let nanoseconds = now - partBegan
        partBegan = now
        if let part { configuration.switchover.costs.learn(part, nanoseconds) }
        return nanoseconds
    }

    /// Whether the guest would stand still for too long if `rest` were still to come before the destination is told to start it.
    /// A timer says so, too; but events may have been waiting before it.
    func isTooLate(withRest rest: UInt64 = 0) -> Bool {
        guard isBound, limit > 0 else { return false }
        let (sum, overflow) = standstill.addingReportingOverflow(rest)
        return overflow || sum > limit - reserve
    }

    /// What COMMIT_WITHIN allows: what is left of the limit, less the start itself. Without a limit, for ever.
    var timeLeft: UInt64 {
        guard isBound, limit > 0 else { return .max }
        let spent = standstill + min(configuration.switchover.costs.nanoseconds(.start), reserve)
        return limit > spent ? limit - spent : 0
    }

    /// What is certain to come after the last collection: the pages at the lower bound of the rate.
    func isTooMuch(_ pages: UInt64) -> Bool { isTooLate(withRest: configuration.switchover.sendingNanoseconds(pages)) }

    mutating func contractExpired(_ actions: inout [SourceAction]) {
        guard isBound else { return }
        switch phase {
        case .stoppingGuest: breakOff("the guest did not stop in time", owing: .stop, &actions)
        case .finalCollecting: breakOff("collecting the last pages took too long", owing: .collect, &actions)
        case .finalSending: breakOff("the last pages were not sent in time", owing: .round, &actions)
        case .confirming: breakOff("the destination did not take the last pages in time", &actions)
        case .savingState: breakOff("saving the state took too long", owing: .state, &actions)
        case .discarding: breakOff("the state was not on its way in time", owing: .package, &actions)
        case .preparing: breakOff("the destination was not ready in time", &actions)
        default: break
        }
    }

    // MARK: Breaking off

    /// The guest runs on here, at once. What is under way ends first, then RAM goes on.
    /// - Parameter owing: what the shell still answers.
    mutating func breakOff(_ reason: String, owing: Awaited = .nothing, _ actions: inout [SourceAction]) {
        let wasPreparing = phase == .preparing
        tellBroken(reason, &actions)
        switch owing {
        case .stop: configuration.switchover.costs.learn(.stop, atLeast: now - partBegan)
        case .collect: configuration.switchover.costs.learn(.collect, atLeast: now - partBegan)
        case .state: configuration.switchover.costs.learn(.state, atLeast: now - partBegan)
        case .package: break
        case .round: actions.append(.interruptRound)
        case .nothing: if wasPreparing { configuration.switchover.costs.learn(.load, atLeast: now - partBegan) }
        }
        if wasPreparing || pagesAreHandedOver && owing == .nothing, features.contains(.retraction) {
            return retract(&actions)
        }
        guard owing != .nothing else { return goOn(&actions) }
        awaited = owing
        let deadlines = configuration.deadlines
        let isForPeer = owing == .round || owing == .package
        enter(.breakingOff, deadline: isForPeer ? deadlines.stall : deadlines.localWork, &actions)
    }

    private mutating func retract(_ actions: inout [SourceAction]) {
        closeRAMSection(&actions)
        let attempt = attempt
        send(&actions) { $0.command(.retract(attempt: attempt)) }
        enter(.retracting, deadline: configuration.deadlines.ready, &actions)
    }

    /// - Precondition: the right to run is here.
    private mutating func tellBroken(_ reason: String, _ actions: inout [SourceAction]) {
        let broken = BrokenSwitchover(
            number: configuration.switchover.brokenSwitchovers + 1, nanoseconds: standstill, limitNanoseconds: limit,
            reason: reason)
        actions.append(.resumeGuest)
        stopWasAsked = false
        if isPostcopy {
            brokenMoves += 1
            restsBeforeMove = true
        }
        endStandstill(&actions)
        configuration.switchover.brokeOff()
        actions.append(.brokeOff(broken))
        report(.active, &actions)
    }

    /// The answer that a broken switchover still owed.
    mutating func settleOwed(_ owed: Awaited, _ actions: inout [SourceAction]) {
        guard phase == .breakingOff, awaited == owed else { return }
        awaited = nil
        // The destination began to forget.
        if pagesAreHandedOver { retract(&actions) } else { goOn(&actions) }
    }

    /// RETRACTED: the destination waits for RAM again.
    mutating func retracted(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        switch message {
        case .retracted(attempt):
            undrainedBytes = 0
            goOn(&actions)
        // Said before RETRACT was heard: it is void, and tells how long loading took.
        case .ready(let nanoseconds):
            readyAttempt = attempt
            // It is the destination's word, and may be any number.
            configuration.switchover.costs.learn(.load, min(nanoseconds, 1 << 60) + roundTripNanoseconds)
        default: outOfTurn(message, &actions)
        }
    }

    /// RETRACTED after COMMIT_WITHIN: it came too late there. The guest did not start, and does not on that word.
    mutating func cameTooLate(_ actions: inout [SourceAction]) {
        mayRun = true
        actions.append(.regainRightToRun)
        // It may have been the network; what it is taken for is bounded, so that it is tried again.
        let start = now - partBegan - min(now - partBegan, roundTripNanoseconds)
        configuration.switchover.costs.learn(.start, atLeast: min(start, limit / 4))
        tellBroken("the word to start reached the destination too late", &actions)
        goOn(&actions)
    }

    private mutating func goOn(_ actions: inout [SourceAction]) {
        closeRAMSection(&actions)
        takeBackPages(&actions)
        collect(&actions)
    }

    // MARK: Resting

    /// Rests may follow each other for as long as the guest writes; that the destination is still there shows only when it is asked.
    mutating func rest(_ nanoseconds: UInt64, _ actions: inout [SourceAction]) {
        if direction == .bothWays, !timers.isRunning(.keepAlive) { scheduleKeepAlive(&actions) }
        enter(.resting, deadline: nanoseconds, &actions)
    }
}
