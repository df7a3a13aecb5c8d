import MigrationStream

// Postcopy: the guest runs here before its memory is here. From RUN on there is no way back by QEMU's rule, so nothing that happens to
// the connection ends the migration any more: what is missing is waited for (`pullPaused`).

/// How far postcopy has come. It goes on beside the phases: pages arrive while state is loaded and while the guest starts.
enum PullProgress: Int, Comparable, Sendable {
    case none
    /// The source may switch to postcopy.
    case advised
    /// It does: what it sent and the guest wrote since is being forgotten.
    case discarding
    /// Missing pages are waited for by whoever touches them.
    case listening
    /// Between two Godwits: RUN was said, which is the end of the package and starts nothing.
    case packaged
    /// RUN was said, or COMMIT behind it: the guest is ours, and must start.
    case running
    /// No page is missing.
    case complete

    static func < (left: PullProgress, right: PullProgress) -> Bool { left.rawValue < right.rawValue }
}

extension DestinationCore {
    /// Whether the guest is started while pages are missing: nothing that waits for memory may then be done under the core's lock.
    public var isPulling: Bool { pull >= .listening }

    /// Whether a connection without a greeting may be the source's channel for requested pages (QEMU's `postcopy-preempt`).
    public var expectsUrgentChannel: Bool {
        pull >= .advised && pull < .complete && urgent.isEmpty && migration == nil && source != nil && phase > .opened
            && (phase < .pullPaused || isRecovering)
    }

    /// The right to run has passed, and pages are missing.
    var isBound: Bool { pull == .running && phase != .failed }

    // MARK: What the source says

    mutating func take(_ command: PostcopyCommand, _ actions: inout [DestinationAction]) {
        switch command {
        case .advise(let advice): advise(advice, &actions)
        case .discard(let discard):
            guard phase == .receiving, pull == .advised || pull == .discarding else {
                return outOfTurn("POSTCOPY_RAM_DISCARD", &actions)
            }
            pull = .discarding
            memoryWasTouched = true
            actions.append(.discardPages(discard))
        case .packaged:
            guard phase == .receiving, pull == .advised || pull == .discarding, !packageHasCome else {
                return outOfTurn("PACKAGED", &actions)
            }
            packageHasCome = true
        case .listen:
            guard phase == .receiving, packageHasCome, pull == .advised || pull == .discarding else {
                return outOfTurn("POSTCOPY_LISTEN", &actions)
            }
            pull = .listening
            memoryWasTouched = true
            actions.append(.listen)
            report(.postcopyActive, &actions)
        case .run:
            guard phase == .receiving, pull == .listening else { return outOfTurn("POSTCOPY_RUN", &actions) }
            if rule == .twoPhase { return pull = .packaged }
            load(&actions)
            if phase == .loading { pull = .running }
        case .resume, .receiveBitmap: outOfTurn("a command of a recovery", &actions)
        }
    }

    private mutating func advise(_ advice: PostcopyAdvice?, _ actions: inout [DestinationAction]) {
        guard phase == .opened, pull == .none else { return outOfTurn("POSTCOPY_ADVISE", &actions) }
        guard configuration.allowsPostcopy else {
            let remedy = "set the capability postcopy-ram here before migrate-incoming"
            return fail("the source may switch to postcopy, which is off here; \(remedy)", &actions)
        }
        guard returnPathIsOpen else {
            return fail("the source may switch to postcopy, but there is no way back to it", &actions)
        }
        guard migration == nil || features.contains(.postcopy) else {
            return fail("the source may switch to postcopy, which it did not choose in BEGIN", &actions)
        }
        guard let advice else { return fail("the source may switch to postcopy of something else than RAM", &actions) }
        // A Godwit sends page by page, whatever stands behind it there and here.
        let own = migration == nil ? configuration.blockPageSizes : UInt64(Wire.pageSize)
        guard advice.blockPageSizes == own else {
            return fail(
                "the source's memory has pages of 0x\(hex(advice.blockPageSizes)) bytes (the sizes of all blocks joined), this "
                    + "machine's of 0x\(hex(own)); postcopy needs the same on both sides",
                &actions)
        }
        pull = .advised
        actions.append(.preparePostcopy)
        if hasNet { actions.append(.prepareEpochs) }
    }

    private func hex(_ value: UInt64) -> String { String(value, radix: 16) }

    /// What the source says behind RUN: pages, and that they were all.
    mutating func takeBehindRun(_ item: StreamItem, _ actions: inout [DestinationAction]) {
        if isRecovering { return takeInRecovery(item, &actions) }
        switch item {
        case .ramRound, .page, .zeroPage, .pageBatch, .ramRecordsEnded, .vmDescription: break
        case .ramSectionEnded(let type): if type == .end { ramIsComplete = true }
        case .command(.ping(let value)): answer(ping: value, &actions)
        case .endOfStream:
            guard ramIsComplete else { return losePull("it ended its stream before its RAM", &actions) }
            if phase == .pulling { enter(.pulling, deadline: nil, &actions) }
            finishPull(waits: true, &actions)
        default: losePull("it sent something out of turn", &actions)
        }
    }

    /// Pages that loading state waits for come before the guest runs.
    var takesRequestedPages: Bool {
        pull == .packaged && !ramIsComplete && phase >= .receiving && phase < .starting
    }

    // MARK: Back to precopy

    /// Memory is not watched any more: all that was discarded comes again, as pages of a round.
    mutating func unlisten(_ actions: inout [DestinationAction]) {
        guard pull >= .discarding else { return }
        let closed = urgent.sorted { $0.rawValue < $1.rawValue }
        closeUrgent(&actions)
        pull = .advised
        packageHasCome = false
        pullLoss = nil
        isUnlistening = true
        loadIsVoid = loadIsUnderWay
        actions.append(.unlisten(closed))
    }

    mutating func unlistened(_ actions: inout [DestinationAction]) {
        guard isUnlistening else { return }
        isUnlistening = false
        if phase == .rejoining { return goOnIfQuiet(&actions) }
        guard let attempt = owedRetraction, let source else { return }
        owedRetraction = nil
        send(.retracted(attempt: attempt), to: source, &actions)
    }

    // MARK: The channel for requested pages

    /// A visitor's first bytes are neither a stream's nor a greeting.
    mutating func cameForUrgentPages(_ connection: ConnectionID, _ actions: inout [DestinationAction]) {
        guard let visitor = visitors[connection], visitor.wish == .unknown else { return }
        guard expectsUrgentChannel, visitor.answers else {
            return dismiss(connection, "it is neither a migration nor a channel of one", &actions)
        }
        visitors[connection] = nil
        cancelTimer(.visitor(connection), &actions)
        urgent.insert(connection)
    }

    /// It said its last word: what was requested came.
    mutating func urgentEnded(_ connection: ConnectionID, _ actions: inout [DestinationAction]) {
        guard urgent.remove(connection) != nil else { return }
        urgentNumbers[connection] = nil
        actions.append(.close(connection))
    }

    mutating func urgentLost(_ connection: ConnectionID, _ reason: String, _ actions: inout [DestinationAction]) {
        urgent.remove(connection)
        urgentNumbers[connection] = nil
        actions.append(.close(connection))
        // A Godwit closes those of a move that it takes back, of which one may come here behind RETRACT; and it hears itself of one that breaks.
        if rule == .twoPhase, phase == .receiving, pull < .listening { return }
        let sentence = "its channel for requested pages is lost: \(reason)"
        if isBound { return losePull(sentence, &actions) }
        if canKeep { keep(sentence, &actions) } else { fail("the source is lost: \(sentence)", &actions) }
    }

    /// Who may become that channel says nothing before the first request, which may never come: it has no deadline as long as nobody is it.
    /// - Returns: false: that visitor has to speak, or had a second deadline already.
    mutating func spare(_ connection: ConnectionID) -> Bool {
        guard expectsUrgentChannel, let visitor = visitors[connection], visitor.wish == .unknown, visitor.answers,
            !visitor.isSpared
        else { return false }
        visitors[connection]?.isSpared = true
        return true
    }

    /// That channel is known, or none comes any more: whoever was spared for it is somebody else, and says soon what it wants.
    mutating func hurrySilent(_ actions: inout [DestinationAction]) {
        guard !expectsUrgentChannel else { return }
        for (connection, visitor) in visitors.sorted(by: { $0.key.rawValue < $1.key.rawValue })
        where visitor.isSpared && visitor.wish == .unknown && !timers.isRunning(.visitor(connection)) {
            actions.append(
                .setTimer(timers.set(.visitor(connection)), nanoseconds: configuration.deadlines.greeting))
        }
    }

    // MARK: The end

    /// The guest runs, and pages are missing.
    mutating func beginPulling(_ actions: inout [DestinationAction]) {
        if isRecovering {
            enter(.pullPaused, deadline: configuration.deadlines.acknowledgement, &actions)
        } else if isForsaken {
            enter(.pullPaused, deadline: nil, &actions)
        } else {
            enter(.pulling, deadline: ramIsComplete ? nil : configuration.deadlines.stall, &actions)
        }
        beginEpochs(&actions)
        answerVisitors(&actions)
    }

    /// - Parameter missing: pages that did not come though the source says that it sent all, or that its connection is lost.
    mutating func pullEnded(missing: UInt64, _ actions: inout [DestinationAction]) {
        guard isBound else { return }
        pullEndsOwed -= 1
        guard missing == 0 else {
            // An answer to an earlier question, on a connection that was lost since, says nothing of this one.
            if pullEndsOwed == 0, source != nil, ramIsComplete {
                losePull("it ended its stream, and \(missing) pages did not come", &actions)
            }
            return
        }
        if isWhole(&actions) { pullIsComplete(&actions) }
    }

    mutating func pullIsComplete(_ actions: inout [DestinationAction]) {
        pull = .complete
        pullLoss = nil
        isRecovering = false
        closeUrgent(&actions)
        if phase >= .pulling, phase < .started { arrive(&actions) }
    }

    /// The connection is of no use any more. The guest runs on as far as its memory is here.
    mutating func losePull(_ reason: String, _ actions: inout [DestinationAction]) {
        // Nothing more is wanted of it; the guest is started all the same.
        if pull == .complete { return dropSource(&actions) }
        guard isBound, let source else { return }
        let lost = [source] + urgent.sorted { $0.rawValue < $1.rawValue }
        for connection in lost { actions.append(.drop(connection)) }
        oldReaders += lost
        self.source = nil
        returnPathIsOpen = false
        (urgent, urgentNumbers) = ([], [:])
        closeChannels(&actions)
        pullLoss = reason
        // Perhaps nothing is missing.
        finishPull(waits: false, &actions)
        pausePull(reason, &actions)
    }

    private mutating func finishPull(waits: Bool, _ actions: inout [DestinationAction]) {
        pullEndsOwed += 1
        actions.append(.finishPull(waits: waits))
    }

    /// Pages come, or the source is lost: until all are here it sends what nobody asked for, however slowly.
    mutating func expectMorePages(_ actions: inout [DestinationAction]) {
        guard phase == .pulling, !ramIsComplete else { return }
        enter(.pulling, deadline: configuration.deadlines.stall, &actions)
    }

    /// A guest that is still being started is not paused before it runs: it may need none of the rest for that, or wait for it.
    private mutating func pausePull(_ reason: String, _ actions: inout [DestinationAction]) {
        isRecovering = false
        enter(phase == .pulling ? .pullPaused : phase, deadline: nil, &actions)
        if phase == .pullPaused, hasNet { actions.append(.holdEpochs) }
        // Whoever sees the status sees why.
        actions.append(
            .pullPaused(
                "the source is lost: \(reason); \(hasNet ? Self.standsStill : "the guest runs on as far as its memory is here"); go on with "
                    + "migrate-recover here and migrate with 'resume' there"))
        report(.postcopyPaused, &actions)
    }

    mutating func closeUrgent(_ actions: inout [DestinationAction]) {
        for connection in urgent.sorted(by: { $0.rawValue < $1.rawValue }) { actions.append(.close(connection)) }
        (urgent, urgentNumbers) = ([], [:])
    }

    mutating func forgetPull(_ actions: inout [DestinationAction]) {
        closeUrgent(&actions)
        if pull > .none { actions.append(.endPostcopy) }
        forgetNet(&actions)
        pull = .none
        packageHasCome = false
        pullLoss = nil
        pullEndsOwed = 0
        recoveryIsAwaited = false
        isRecovering = false
    }
}
