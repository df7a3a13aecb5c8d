import MigrationStream

// From loaded state to the running guest: the only place where the guest is started.

extension DestinationCore {
    mutating func stateLoaded(_ nanoseconds: UInt64, _ actions: inout [DestinationAction]) {
        loadIsUnderWay = false
        loadIsVoid = false
        guard phase == .loading else { return goOnIfQuiet(&actions) }
        sections = []
        if let attempt = retraction { return reopen(attempt, &actions) }
        readyAt = now
        guard rule == .twoPhase else { return startGuest(&actions) }
        guard let source else { return fail("the source is lost", &actions) }
        send(.ready(nanoseconds: nanoseconds), to: source, &actions)
        enter(.ready, deadline: configuration.deadlines.ready, &actions)
    }

    /// - Parameter moment: by when, on the core's clock; `nil`: whenever it is.
    mutating func startGuest(by moment: UInt64? = nil, _ actions: inout [DestinationAction]) {
        enter(.starting, deadline: nil, &actions)
        if pull == .packaged { pull = .running }
        if pull == .running, hasNet { actions.append(.armEpochs) }
        let ranThere = guestState?.runs ?? true
        actions.append(.startGuest(running: ranThere && configuration.startsGuest, by: moment))
    }

    mutating func guestStarted(_ nanoseconds: UInt64, _ actions: inout [DestinationAction]) {
        guard phase == .starting else { return }
        if pull == .running {
            if rule == .twoPhase, let source { send(.started(nanoseconds: nanoseconds), to: source, &actions) }
            return beginPulling(&actions)
        }
        arrive(startedAfter: nanoseconds, &actions)
    }

    /// Guest and memory are here.
    mutating func arrive(startedAfter nanoseconds: UInt64? = nil, _ actions: inout [DestinationAction]) {
        // The source closes when it has heard us: closing first could destroy what it has not read yet.
        enter(.started, deadline: source == nil ? nil : configuration.deadlines.acknowledgement, &actions)
        if pull == .advised { forgetNet(&actions) }
        if let source, returnPathIsOpen {
            if rule == .twoPhase, let nanoseconds { send(.started(nanoseconds: nanoseconds), to: source, &actions) }
            send(.shut(0), to: source, &actions)
        }
        answerVisitors(&actions)
        report(.completed, &actions)
        actions.append(.finished(.completed))
    }

    mutating func startFailed(_ reason: String, _ actions: inout [DestinationAction]) {
        guard phase == .starting else { return }
        giveUpGuest(reason, tellsSource: true, &actions)
        answerVisitors(&actions)
    }

    // MARK: What goes wrong

    mutating func rejected(_ connection: ConnectionID, _ reason: String, _ actions: inout [DestinationAction]) {
        if visitors[connection] != nil { return dismiss(connection, reason, &actions) }
        if urgent.contains(connection) { return urgentLost(connection, reason, &actions) }
        guard connection == source else { return channelLost(connection, reason, &actions) }
        if pull >= .running { return losePull(reason, &actions) }
        if phase < .starting { fail(reason, &actions) } else { dropSource(&actions) }
    }

    mutating func disconnected(_ connection: ConnectionID, _ reason: String, _ actions: inout [DestinationAction]) {
        if visitors[connection] != nil { return dismiss(connection, reason, &actions) }
        if urgent.contains(connection) { return urgentLost(connection, reason, &actions) }
        guard connection == source else { return channelLost(connection, reason, &actions) }
        if pull >= .running { return losePull(reason, &actions) }
        // A QEMU source without a return path, and a one-way transport, close when everything was said.
        let everythingWasSaid = phase == .loading && rule != .twoPhase && !returnPathIsOpen
        if canKeep {
            keep("the source is lost: \(reason)", &actions)
        } else if phase < .starting, !everythingWasSaid {
            fail("the source is lost: \(reason)", tellsSource: false, &actions)
        } else {
            dropSource(&actions)
        }
    }

    mutating func dropSource(_ actions: inout [DestinationAction]) {
        guard let source else { return }
        if phase == .started { cancelTimer(.deadline, &actions) }
        actions.append(.close(source))
        self.source = nil
        closeChannels(&actions)
    }

    mutating func fired(_ timer: ProtocolTimer, _ actions: inout [DestinationAction]) {
        guard timers.fired(timer) else { return }
        if case .visitor(let connection) = timer.kind {
            if spare(connection) { return }
            return dismiss(connection, "it does not say in time what it wants", &actions)
        }
        if timer.kind == .channels { return channelsAreLate(&actions) }
        if isRecovering { return losePull("it did not go on in time", &actions) }
        if canKeep, phase != .loading { return keep("the source says nothing any more", &actions) }
        switch phase {
        case .kept: fail("the source did not come back in time", &actions)
        case .rejoining: fail("what the lost connection brought was not placed in time", &actions)
        case .opened, .receiving: fail("the source sends nothing any more", &actions)
        case .loading: fail("the device state was not loaded in time", &actions)
        case .ready: fail("the source did not say COMMIT in time", &actions)
        case .started: dropSource(&actions)
        case .pulling: losePull("it sends nothing any more", &actions)
        case .waiting, .starting, .pullPaused, .failed: break
        }
    }

    mutating func giveUp(_ actions: inout [DestinationAction]) {
        guard phase < .starting else { return }
        memoryWasTouched = true
        fail("the operator gave up the destination", &actions)
    }

    /// Ends the migration before the guest was started: the one place for it.
    mutating func fail(_ reason: String, tellsSource: Bool = true, _ actions: inout [DestinationAction]) {
        guard phase < .starting else { return }
        giveUpGuest(reason, tellsSource: tellsSource, &actions)
    }

    private mutating func giveUpGuest(_ reason: String, tellsSource: Bool, _ actions: inout [DestinationAction]) {
        if let migration {
            history.append(migration)
            if history.count > Self.historyLimit { history.removeFirst() }
        }
        if let source {
            if tellsSource, returnPathIsOpen {
                send(helloWasSaid ? .failure(reason: reason) : .shut(1), to: source, &actions)
            }
            actions.append(.close(source))
        }
        let isSpoiled = memoryWasTouched || isLastChance
        // That no other source can come may show a moment later, and is not why this one did not arrive.
        if !isSpoiled { lastDismissal = reason }
        closeChannels(&actions)
        forgetPull(&actions)
        forget()
        enter(isSpoiled ? .failed : .waiting, deadline: nil, &actions)
        report(isSpoiled ? .failed : .none, &actions)
        actions.append(.finished(isSpoiled ? .failed(reason) : .waitsForAnother(reason)))
    }

    private mutating func forget() {
        source = nil
        sourceHears = false
        returnPathIsOpen = false
        helloWasSaid = false
        migration = nil
        rule = nil
        features = []
        ramIsComplete = false
        sections = []
        stateBytes = 0
        guestState = nil
        retraction = nil
        committed = nil
        oldReaders = []
        readersHaveEnded = true
        rootIsSame = false
        isNarrowing = false
        isUnlistening = false
        owedRetraction = nil
    }
}
