import MigrationStream

// From `start` to the stopped guest: greeting, tracking, rounds.

extension SourceCore {
    mutating func start(_ actions: inout [SourceAction]) {
        guard phase == .idle else { return }
        report(.setup, &actions)
        actions.append(.connect)
        enter(.connecting, deadline: configuration.deadlines.connect, &actions)
    }

    mutating func connected(_ direction: ConnectionDirection, _ actions: inout [SourceAction]) {
        switch phase {
        case .connecting: break
        case .reconnecting: return ask(&actions)
        case .reopening: break
        case .recoverConnecting: return recoveryConnected(direction, &actions)
        default:
            // Too late: nobody waits for it any more.
            if !isConnected { actions.append(.close) }
            return
        }
        self.direction = direction
        isConnected = true
        greetedAt = now
        (pongsAwaited, unaskedWords) = (0, 0)
        let (name, uuid) = (configuration.machineName, configuration.uuid)
        if let mapped = configuration.mapped {
            send(&actions) { $0.append(mapped.opening) }
            return agree(on: .oneWay, features: [], &actions)
        }
        send(&actions) { writer in
            writer.header()
            writer.configuration(machine: name, subsections: uuid.map { [.uuid($0)] } ?? [])
            guard direction == .bothWays else { return }
            writer.command(.openReturnPath)
            writer.command(.ping(Wire.godwitPing))
        }
        if direction == .bothWays {
            pongsAwaited = 1
            enter(.greeting, deadline: configuration.deadlines.greeting, &actions)
            expectUrgentChannel(&actions)
        } else {
            agree(on: .oneWay, features: [], &actions)
        }
    }

    /// HELLO and PONG: the destination's first words.
    mutating func greeted(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        switch message {
        case .hello(let version, let features, let instance):
            guard version > 0, helloFeatures == nil else { return misgreeted(message, &actions) }
            guard !isResuming || instance == peer else { return pause(Self.strangerListens, &actions) }
            peer = instance
            helloFeatures = features.intersection(configuration.features)
            if !configuration.isResumable || !features.contains(.twoPhaseHandover) {
                helloFeatures?.remove(.resumption)
            }
            if !features.contains(.twoPhaseHandover) { helloFeatures?.remove(.retraction) }
            if configuration.multifd == nil {
                helloFeatures?.remove(.multifd)
            } else if !features.contains(.multifd) {
                let reason = "the destination is a Godwit that knows no multifd; turn the capability off"
                retreat(.failed(reason), farewell: nil, &actions)
            }
        case .pong(Wire.godwitPing):
            roundTripNanoseconds = min(roundTripNanoseconds, now - greetedAt)
            if isResuming { return askToResume(&actions) }
            guard let features = helloFeatures else { return agree(on: .qemu, features: [], &actions) }
            if let reason = unusable(.twoPhase, features) {
                return retreat(.failed(reason), farewell: nil, &actions)
            }
            let migration = configuration.migration
            send(&actions) { $0.command(.begin(migration, features)) }
            agree(on: features.contains(.twoPhaseHandover) ? .twoPhase : .qemu, features: features, &actions)
        default: misgreeted(message, &actions)
        }
    }

    /// Whoever listens where a paused migration was to go on may not be its destination at all: what it says ends nothing.
    private mutating func misgreeted(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        guard isResuming else { return outOfTurn(message, &actions) }
        guard case .failure(let reason) = message else { return pause(Self.strangerListens, &actions) }
        pause("what listens there refuses it: \(reason)", &actions)
    }

    /// Why the destination cannot do what this migration was begun with.
    private func unusable(_ rule: HandoverRule, _ features: FeatureSet) -> String? {
        unverifiable(rule, features) ?? unresumable(rule, features) ?? unmovable(rule, features)
            ?? unreturnable(rule, features)
    }

    private mutating func agree(on rule: HandoverRule, features: FeatureSet, _ actions: inout [SourceAction]) {
        if let reason = unusable(rule, features) { return retreat(.failed(reason), farewell: nil, &actions) }
        self.rule = rule
        self.features = features
        actions.append(.agreed(rule, features: features))
        openUrgentChannel(&actions)
        isTracking = true
        actions.append(.startTracking)
        enter(.startingTracking, deadline: configuration.deadlines.localWork, &actions)
    }

    mutating func trackingStarted(_ actions: inout [SourceAction]) {
        guard phase == .startingTracking else { return }
        advise(&actions)
        beginRAM(&actions)
        collect(&actions)
    }

    /// The list of blocks; on every connection.
    mutating func beginRAM(_ actions: inout [SourceAction]) {
        let blocks = wireBlocks
        let flushesChannels = configuration.multifd == .flush
        if let mapped = configuration.mapped {
            for piece in mapped.pieces {
                send(&actions) { $0.append(piece.bytes) }
                if piece.gap > 0 { actions.append(.skip(piece.gap)) }
            }
            return report(.active, &actions)
        }
        let advised = configuration.postcopy != nil
        send(&actions) {
            $0.ramSetup(
                id: Self.ramSectionID, blocks: blocks, flushesChannels: flushesChannels, postcopyIsAdvised: advised)
        }
        if configuration.multifd != nil { actions.append(.synchronizeChannels) }
        report(.active, &actions)
    }

    mutating func collect(_ actions: inout [SourceAction]) {
        actions.append(.collect(final: false))
        enter(.collecting, deadline: configuration.deadlines.localWork, &actions)
    }

    mutating func collected(_ pages: UInt64, _ actions: inout [SourceAction]) {
        switch phase {
        case .collecting where mayMoveNow: switchToPostcopy(with: pages, &actions)
        case .collecting:
            restsBeforeMove = false
            switch configuration.switchover.decide(remainingPages: pages) {
            case .iterate: sendRound(final: false, &actions)
            // The destination has not said yet that it is prepared: what changes meanwhile is sent meanwhile.
            case .switchOver where mustAwaitAcknowledgement: rest(Self.acknowledgementLookNanoseconds, &actions)
            case .switchOver where direction == .bothWays && undrainedBytes > Self.drainLimitBytes: drain(&actions)
            case .rest(let nanoseconds): rest(nanoseconds, &actions)
            case .switchOver:
                stopWasAsked = true
                actions.append(.stopGuest)
                beginStandstill(&actions)
                enter(.stoppingGuest, deadline: configuration.deadlines.localWork, &actions)
            }
        case .finalCollecting where isPostcopy:
            endPart(.collect)
            if isTooLate() { return breakOff("the last collection took too long", &actions) }
            beginDiscarding(&actions)
        case .finalCollecting:
            endPart(.collect)
            if isTooMuch(pages) { return breakOff("the last collection found too many pages", &actions) }
            sendRound(final: true, &actions)
        case .breakingOff: settleOwed(.collect, &actions)
        default: answeredLate(.collect)
        }
    }

    var mustAwaitAcknowledgement: Bool {
        configuration.awaitsSwitchoverAcknowledgement && direction == .bothWays && !switchoverIsAcknowledged
    }

    /// How often a source looks whether it may stop its guest.
    private static let acknowledgementLookNanoseconds: UInt64 = 5_000_000

    /// The kernel took the last round, but the destination may be megabytes behind: the guest need not stand still for those.
    mutating func drain(_ actions: inout [SourceAction]) {
        ping(Self.drainPing, &actions)
        enter(.draining, deadline: configuration.deadlines.stall, &actions)
    }

    mutating func drained(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        guard message == .pong(Self.drainPing) else { return outOfTurn(message, &actions) }
        undrainedBytes = 0
        collect(&actions)
    }

    private mutating func sendRound(final: Bool, _ actions: inout [SourceAction]) {
        ramSectionIsOpen = true
        // The last round is a part like any other: END says that there is no way back.
        send(&actions) { $0.ramRound(final: false, id: Self.ramSectionID) }
        askForRound(final: final, &actions)
    }

    private mutating func askForRound(final: Bool, _ actions: inout [SourceAction]) {
        roundIsUnderWay = true
        actions.append(
            .sendRound(
                final: final, batches: features.contains(.pageBatches),
                keepsPages: !final && !configuration.switchover.isFitting))
        enter(final ? .finalSending : .sendingRound, deadline: configuration.deadlines.stall, &actions)
    }

    mutating func roundSent(_ round: RoundReport, _ actions: inout [SourceAction]) {
        guard roundIsUnderWay else { return }
        roundIsUnderWay = false
        undrainedBytes += round.bytes
        hasSentPages = hasSentPages || round.pages > 0
        switch phase {
        case .sendingRound:
            configuration.switchover.sent(round)
            closeRAMSection(&actions)
            collect(&actions)
        case .finalSending:
            if isTooLate() {
                configuration.switchover.sentBroken(round)
                return breakOff("the last pages were not sent in time", &actions)
            }
            // Nobody asked for an early end: whatever is left must still go.
            if round.interrupted { return askForRound(final: true, &actions) }
            closeRAMSection(&actions)
            if rule == .qemu, round.bytes > Self.drainLimitBytes { return confirm(&actions) }
            saveState(&actions)
        case .breakingOff:
            configuration.switchover.sentBroken(round)
            settleOwed(.round, &actions)
        case .retreating: finishRetreat(&actions)
        default: answeredLate(.round)
        }
    }

    private mutating func saveState(_ actions: inout [SourceAction]) {
        endPart()
        actions.append(.saveState)
        enter(.savingState, deadline: configuration.deadlines.localWork, &actions)
    }

    /// The last word before END, which a QEMU destination takes for the end of RAM: it should not wait in a socket buffer.
    private mutating func confirm(_ actions: inout [SourceAction]) {
        attempt &+= 1
        ping(Self.confirmPing &+ attempt, &actions)
        enter(.confirming, deadline: configuration.deadlines.stall, &actions)
    }

    mutating func confirmed(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        guard message == .pong(Self.confirmPing &+ attempt) else { return outOfTurn(message, &actions) }
        undrainedBytes = 0
        if isTooLate() { return breakOff("the destination did not take the last pages in time", &actions) }
        saveState(&actions)
    }

    mutating func closeRAMSection(_ actions: inout [SourceAction]) {
        guard ramSectionIsOpen else { return }
        ramSectionIsOpen = false
        send(&actions) { $0.ramSectionEnd(id: Self.ramSectionID) }
    }
}
