import MigrationStream

// From the stopped guest to the destination's acknowledgement: the only place where the right to run is given up.

extension SourceCore {
    mutating func guestStopped(_ event: SourceEvent, _ actions: inout [SourceAction]) {
        if phase == .breakingOff { return settleOwed(.stop, &actions) }
        guard phase == .stoppingGuest, case .guestStopped(let wasRunning) = event else { return answeredLate(.stop) }
        guestWasRunning = wasRunning
        endPart(.stop)
        // A guest that was paused waits for nothing; and an operator's hold is the operator's.
        if !wasRunning || configuration.pausesBeforeSwitchover { suspendContract(&actions) }
        if isTooLate() { return breakOff("the guest did not stop in time", &actions) }
        guard configuration.pausesBeforeSwitchover else { return beginSwitch(&actions) }
        report(.preSwitchover, &actions)
        enter(.preSwitchover, deadline: nil, &actions)
        if direction == .bothWays { scheduleKeepAlive(&actions) }
    }

    mutating func proceed(_ actions: inout [SourceAction]) {
        guard phase == .preSwitchover else {
            actions.append(.refused("the migration is not waiting before its switch, its status is \(status.rawValue)"))
            return
        }
        cancelTimer(.keepAlive, &actions)
        partBegan = now
        if guestWasRunning { beginStandstill(&actions) }
        releaseMove(&actions)
        beginSwitch(&actions)
    }

    private mutating func beginSwitch(_ actions: inout [SourceAction]) {
        report(isPostcopy ? .postcopyDevice : .device, &actions)
        actions.append(.collect(final: true))
        enter(.finalCollecting, deadline: configuration.deadlines.localWork, &actions)
    }

    mutating func scheduleKeepAlive(_ actions: inout [SourceAction]) {
        actions.append(.setTimer(timers.set(.keepAlive), nanoseconds: configuration.deadlines.keepAlive))
    }

    /// While the operator is awaited, or nothing is sent for long: the destination hears that we live, and we hear that it does.
    mutating func keepAlive(_ actions: inout [SourceAction]) {
        // In between the section of RAM is closed. In any other phase something else has a deadline.
        guard [.preSwitchover, .resting, .collecting].contains(phase) else { return }
        guard unansweredPings * configuration.deadlines.keepAlive < configuration.deadlines.stall else {
            let reason =
                phase == .preSwitchover
                ? "the destination does not answer while the migration waits before its switch"
                : "the destination does not answer any more"
            if canPause { return pause(reason, &actions) }
            return retreat(.failed(reason), farewell: nil, &actions)
        }
        unansweredPings += 1
        ping(1, &actions)
        scheduleKeepAlive(&actions)
    }

    // MARK: State

    mutating func stateSaved(_ saved: [DeviceSection], _ actions: inout [SourceAction]) {
        if phase == .breakingOff, awaited != .package { return settleOwed(.state, &actions) }
        if phase == .discarding || phase == .breakingOff { return stateSavedForPackage(saved, &actions) }
        guard phase == .savingState else { return answeredLate(.state) }
        endPart(.state)
        if isTooLate() { return breakOff("saving the state took too long", &actions) }
        sections = saved + [GlobalState(runState: guestWasRunning ? "running" : "paused").section]
        if let reason = unsendable { return retreat(.failed(reason), farewell: reason, &actions) }
        let described = describedSections
        // Between two Godwits RAM is open until the guest runs there; for everybody else this is the point of no return.
        if !features.contains(.retraction) {
            suspendContract(&actions)
            endRAM(&actions)
        }
        send(&actions) { writer in
            for (index, entry) in described.enumerated() {
                writer.deviceSection(entry.section, id: Self.ramSectionID + 1 + UInt32(index), layout: entry.layout)
            }
        }
        switch rule {
        case .twoPhase:
            attempt &+= 1
            if features.contains(.verification) { actions.append(.sendRoot) }
            send(&actions) { $0.command(.prepare) }
            enter(.preparing, deadline: configuration.deadlines.ready, &actions)
        case .oneWay:
            actions.append(.flush)
            enter(.flushingState, deadline: configuration.deadlines.stall, &actions)
        case .qemu, .none:
            giveUpRightToRun(&actions)
            sendEnd(&actions)
            enter(.committed, deadline: configuration.deadlines.acknowledgement, &actions)
        }
    }

    var describedSections: [(section: DeviceSection, layout: SectionLayout)] {
        sections.map { ($0, configuration.catalogue.layout(of: $0.name) ?? .lengthPrefixed()) }
    }

    /// Why the state cannot be written as the catalogue says.
    var unsendable: String? {
        for section in sections {
            guard let layout = configuration.catalogue.layout(of: section.name),
                configuration.catalogue.version(of: section.name) == section.version
            else { return "device section '\(section.name)' version \(section.version) is not in the catalogue" }
            switch layout {
            case .fixed(let byteCount) where section.body.count == byteCount: continue
            case .lengthPrefixed(let maximum) where section.body.count <= maximum: continue
            default: return "device section '\(section.name)' has \(section.body.count) bytes, which does not fit it"
            }
        }
        return nil
    }

    // MARK: Handover

    private mutating func giveUpRightToRun(_ actions: inout [SourceAction]) {
        mayRun = false
        actions.append(.giveUpRightToRun)
    }

    private mutating func endRAM(_ actions: inout [SourceAction]) {
        // An older QEMU waits for its channels at every end of a section, also where no page was sent.
        if configuration.multifd == .eachSection { actions.append(.synchronizeChannels) }
        send(&actions) { writer in
            writer.ramRound(final: true, id: Self.ramSectionID)
            writer.ramSectionEnd(id: Self.ramSectionID)
        }
    }

    private mutating func sendEnd(_ actions: inout [SourceAction]) {
        let json = VMDescription.json(for: describedSections)
        send(&actions) { writer in
            writer.endOfStream()
            writer.vmDescription(json)
        }
    }

    /// READY: the destination can start at once. The one place where it is told to.
    private mutating func commit(after loading: UInt64, _ actions: inout [SourceAction]) {
        readyAttempt = attempt
        let travel = endPart(.load)
        if travel > loading { roundTripNanoseconds = min(roundTripNanoseconds, travel - loading) }
        if isTooLate() { return breakOff("the destination was not ready in time", &actions) }
        let left = timeLeft
        suspendContract(&actions)
        giveUpRightToRun(&actions)
        if features.contains(.retraction) {
            let attempt = attempt
            closeRAMSection(&actions)
            send(&actions) { $0.command(.commitWithin(attempt: attempt, nanoseconds: left)) }
            if isPostcopy { serveRequests(&actions) }
        } else {
            send(&actions) { $0.command(.commit) }
            sendEnd(&actions)
        }
        enter(.committed, deadline: configuration.deadlines.acknowledgement, &actions)
    }

    mutating func received(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        if isUnasked(message) {
            unaskedWords += 1
            if unaskedWords > Self.unaskedWordLimit { return endlessTalk(&actions) }
        }
        if case .switchoverAcknowledged = message {
            switchoverIsAcknowledged = true
            return
        }
        // Marks between pages are the shell's, which knows what stood before each, and keeps those that it said.
        if case .pong(let value) = message {
            if ResumptionMark(pong: value) != nil { return }
            pongsAwaited -= min(pongsAwaited, 1)
        }
        if case .digestsWanted(let range) = message, answerDigests(range, &actions) { return }
        switch phase {
        case .greeting: greeted(message, &actions)
        case .resuming: resumed(message, &actions)
        case .draining: drained(message, &actions)
        case .confirming: confirmed(message, &actions)
        case .retracting: retracted(message, &actions)
        case .preparing:
            if case .ready(let loading) = message {
                commit(after: loading, &actions)
            } else {
                outOfTurn(message, &actions)
            }
        case .committed: answered(message, &actions)
        case .acknowledged: complete(&actions)
        case .packageLeaving...SourcePhase.pulledWhole: receivedInPostcopy(message, &actions)
        case .recoverGreeting...SourcePhase.resumingPostcopy: receivedInRecovery(message, &actions)
        case .asking: judged(message, &actions)
        case .startingTracking..<SourcePhase.preparing, .narrowing: outOfTurn(message, &actions)
        default: break
        }
    }

    /// Words that change nothing and may come at any time: the only ones of which there could be any number.
    private func isUnasked(_ message: ReturnPathMessage) -> Bool {
        switch message {
        case .pong(let value): pongsAwaited == 0 || ResumptionMark(pong: value) != nil
        case .switchoverAcknowledged: switchoverIsAcknowledged
        // Behind RETRACT: one may have been on its way.
        case .ready: phase == .retracting && readyAttempt == attempt
        default: false
        }
    }

    /// Deadlines would end most of it, but not soon.
    private mutating func endlessTalk(_ actions: inout [SourceAction]) {
        let reason = "the destination goes on answering what it was not asked"
        if isResuming { return pause(reason, &actions) }
        switch phase {
        // None of it says whether the guest runs there.
        case .committed: doubt(reason, &actions)
        // How it ended for the package decides; nobody need listen meanwhile.
        case .packageLeaving where isConnected:
            postcopyLost(reason, &actions)
            actions.append(.abandon)
            isConnected = false
        case .packageLeaving...SourcePhase.pulledWhole: postcopyLost(reason, &actions)
        case .recoverGreeting...SourcePhase.resumingPostcopy: pausePostcopy(reason, &actions)
        case .retreating: disconnected(reason, &actions)
        default: retreat(.failed(reason), farewell: reason, &actions)
        }
    }

    private mutating func answered(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        switch message {
        case .started where isPostcopy: startedBeforeMemory(&actions)
        case .started where rule == .twoPhase:
            if features.contains(.retraction) {
                endRAM(&actions)
                sendEnd(&actions)
            }
            enter(.acknowledged, deadline: configuration.deadlines.acknowledgement, &actions)
        case .shut(0): complete(&actions)
        case .shut(let value) where rule == .qemu:
            takeBack("the destination could not run the guest (SHUT \(value))", &actions)
        case .failure(let reason): takeBack("the destination could not run the guest: \(reason)", &actions)
        case .retracted(attempt) where features.contains(.retraction): cameTooLate(&actions)
        case .pong: break
        default: doubt("the destination answered COMMIT with something else", &actions)
        }
    }

    /// A message in a phase that has no use for it, before the right to run is given up.
    mutating func outOfTurn(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        switch message {
        case .pong: unansweredPings = 0
        case .failure(let reason):
            retreat(.failed("the destination gave up: \(reason)"), farewell: nil, &actions)
        case .shut(let value):
            retreat(.failed("the destination ended the migration early (SHUT \(value))"), farewell: nil, &actions)
        default:
            let reason = "the destination sent a message out of turn"
            retreat(.failed(reason), farewell: reason, &actions)
        }
    }

    // MARK: One-way transports

    mutating func flushed(_ actions: inout [SourceAction]) {
        switch phase {
        case .flushingState:
            giveUpRightToRun(&actions)
            sendEnd(&actions)
            actions.append(.flush)
            enter(.handingOver, deadline: configuration.deadlines.stall, &actions)
        case .handingOver:
            actions.append(.close)
            enter(.closing, deadline: configuration.deadlines.acknowledgement, &actions)
        default: break
        }
    }

    mutating func closed(_ error: String?, _ actions: inout [SourceAction]) {
        guard phase == .closing else { return }
        isConnected = false
        guard let error else { return complete(&actions) }
        doubt("the whole stream was handed over, but its reader failed: \(error)", &actions)
    }

    // MARK: The end that everybody wants

    mutating func complete(_ actions: inout [SourceAction]) {
        // First: the guest's standstill ended where it was started, and lasts no longer for what is tidied up here.
        report(.completed, &actions)
        wind(up: &actions)
        actions.append(.finished(.completed))
    }

    /// Everything stops: timers, tracking, the connection.
    mutating func wind(up actions: inout [SourceAction]) {
        cancelTimer(.keepAlive, &actions)
        cancelTimer(.urgentChannel, &actions)
        endStandstill(&actions)
        enter(.finished, deadline: nil, &actions)
        if isTracking { actions.append(.stopTracking) }
        isTracking = false
        if isConnected { actions.append(.close) }
        isConnected = false
    }
}
