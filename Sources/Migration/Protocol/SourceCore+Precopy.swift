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
        default:
            // Too late: nobody waits for it any more.
            if !isConnected { actions.append(.close) }
            return
        }
        self.direction = direction
        isConnected = true
        let name = configuration.machineName
        send(&actions) { writer in
            writer.header()
            writer.configuration(machine: name)
            guard direction == .bothWays else { return }
            writer.command(.openReturnPath)
            writer.command(.ping(Wire.godwitPing))
        }
        if direction == .bothWays {
            enter(.greeting, deadline: configuration.deadlines.greeting, &actions)
        } else {
            agree(on: .oneWay, features: [], &actions)
        }
    }

    /// HELLO and PONG: the destination's first words.
    mutating func greeted(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        switch message {
        case .hello(let version, let features, _):
            guard version > 0, helloFeatures == nil else { return outOfTurn(message, &actions) }
            helloFeatures = features.intersection(configuration.features)
            if configuration.multifd == nil {
                helloFeatures?.remove(.multifd)
            } else if !features.contains(.multifd) {
                let reason = "the destination is a Godwit that knows no multifd; turn the capability off"
                retreat(.failed(reason), farewell: nil, &actions)
            }
        case .pong(Wire.godwitPing):
            guard let features = helloFeatures else { return agree(on: .qemu, features: [], &actions) }
            let migration = configuration.migration
            send(&actions) { $0.command(.begin(migration, features)) }
            agree(on: features.contains(.twoPhaseHandover) ? .twoPhase : .qemu, features: features, &actions)
        default: outOfTurn(message, &actions)
        }
    }

    private mutating func agree(on rule: HandoverRule, features: FeatureSet, _ actions: inout [SourceAction]) {
        self.rule = rule
        self.features = features
        actions.append(.agreed(rule, features: features))
        isTracking = true
        actions.append(.startTracking)
        enter(.startingTracking, deadline: configuration.deadlines.localWork, &actions)
    }

    mutating func trackingStarted(_ actions: inout [SourceAction]) {
        guard phase == .startingTracking else { return }
        let blocks = configuration.blocks
        let flushesChannels = configuration.multifd == .flush
        send(&actions) { $0.ramSetup(id: Self.ramSectionID, blocks: blocks, flushesChannels: flushesChannels) }
        if configuration.multifd != nil { actions.append(.synchronizeChannels) }
        report(.active, &actions)
        collect(&actions)
    }

    private mutating func collect(_ actions: inout [SourceAction]) {
        actions.append(.collect(final: false))
        enter(.collecting, deadline: configuration.deadlines.localWork, &actions)
    }

    mutating func collected(_ pages: UInt64, _ actions: inout [SourceAction]) {
        switch phase {
        case .collecting:
            switch configuration.switchover.decide(remainingPages: pages) {
            case .iterate: sendRound(final: false, &actions)
            case .switchOver where direction == .bothWays && undrainedBytes > Self.drainLimitBytes: drain(&actions)
            case .switchOver:
                stopWasAsked = true
                actions.append(.stopGuest)
                enter(.stoppingGuest, deadline: configuration.deadlines.localWork, &actions)
            }
        case .finalCollecting: sendRound(final: true, &actions)
        default: break
        }
    }

    /// The kernel took the last round, but the destination may be megabytes behind: the guest need not stand still for those.
    private mutating func drain(_ actions: inout [SourceAction]) {
        send(&actions) { $0.command(.ping(Self.drainPing)) }
        enter(.draining, deadline: configuration.deadlines.stall, &actions)
    }

    mutating func drained(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        guard message == .pong(Self.drainPing) else { return outOfTurn(message, &actions) }
        undrainedBytes = 0
        collect(&actions)
    }

    private mutating func sendRound(final: Bool, _ actions: inout [SourceAction]) {
        ramSectionIsOpen = true
        send(&actions) { $0.ramRound(final: final, id: Self.ramSectionID) }
        askForRound(final: final, &actions)
    }

    private mutating func askForRound(final: Bool, _ actions: inout [SourceAction]) {
        roundIsUnderWay = true
        actions.append(.sendRound(final: final, batches: features.contains(.pageBatches)))
        enter(final ? .finalSending : .sendingRound, deadline: configuration.deadlines.stall, &actions)
    }

    mutating func roundSent(_ round: RoundReport, _ actions: inout [SourceAction]) {
        guard roundIsUnderWay else { return }
        roundIsUnderWay = false
        undrainedBytes += round.bytes
        switch phase {
        case .sendingRound:
            configuration.switchover.sent(round)
            closeRAMSection(&actions)
            collect(&actions)
        case .finalSending:
            // Nobody asked for an early end: whatever is left must still go.
            if round.interrupted { return askForRound(final: true, &actions) }
            closeRAMSection(&actions)
            actions.append(.saveState)
            enter(.savingState, deadline: configuration.deadlines.localWork, &actions)
        case .retreating: finishRetreat(&actions)
        default: break
        }
    }

    mutating func closeRAMSection(_ actions: inout [SourceAction]) {
        guard ramSectionIsOpen else { return }
        ramSectionIsOpen = false
        send(&actions) { $0.ramSectionEnd(id: Self.ramSectionID) }
    }
}
