import MigrationStream

// A source that is lost before COMMIT, where that was agreed: what it sent is kept, and a later connection may go on with it (RESUME).

extension DestinationCore {
    /// Whether the migration outlives its connection as it is now.
    public var isResumable: Bool { canKeep }

    var canKeep: Bool {
        rule == .twoPhase && features.contains(.resumption) && memoryWasTouched && migration != nil && !isLastChance
            && phase > .kept && phase < .starting
    }

    /// The guest cannot start from here: COMMIT counts on the source's connection only, and there is none.
    mutating func keep(_ reason: String, _ actions: inout [DestinationAction]) {
        dropConnections(&actions)
        enter(.kept, deadline: configuration.deadlines.kept, &actions)
        report(.paused, &actions)
        let sentence = "\(reason); what it sent is kept, and the source is waited for"
        actions.append(.keeps(sentence, forNanoseconds: configuration.deadlines.kept))
    }

    /// RAM stays; whatever the connection was in the middle of is void.
    private mutating func dropConnections(_ actions: inout [DestinationAction]) {
        if let source {
            actions.append(.close(source))
            oldReaders.append(source)
        }
        closeChannels(&actions)
        unlisten(&actions)
        closeUrgent(&actions)
        owedRetraction = nil
        // It says ADVISE anew.
        pull = .none
        source = nil
        sourceHears = false
        returnPathIsOpen = false
        helloWasSaid = false
        ramIsComplete = false
        sections = []
        stateBytes = 0
        guestState = nil
        retraction = nil
        rootIsSame = false
        isNarrowing = false
    }

    /// The operator waits for the lost source no longer. A migration whose source is here is ended there.
    mutating func discard(_ actions: inout [DestinationAction]) {
        guard phase == .kept else { return }
        fail("the operator gave up what was kept of the migration", &actions)
    }

    // MARK: Candidates

    /// What a visitor with the right machine says: it may be the source that comes back, before we know that its old connection is lost.
    mutating func hear(_ connection: ConnectionID, _ item: StreamItem, _ actions: inout [DestinationAction]) {
        switch item {
        case .configurationSubsection: break
        case .command(.openReturnPath): visitors[connection]?.opensReturnPath = true
        // Once: a stranger that asks and asks, and reads nothing, must not keep anybody waiting.
        case .command(.ping(Wire.godwitPing))
        where visitors[connection]?.opensReturnPath == true && visitors[connection]?.wasGreeted == false:
            visitors[connection]?.wasGreeted = true
            let hello = ReturnPathMessage.hello(
                version: 1, features: configuration.features, instance: configuration.instance)
            send(hello, to: connection, &actions)
            send(.pong(Wire.godwitPing), to: connection, &actions)
        case .command(.resume(let migration, let features)): rejoin(connection, migration, features, &actions)
        default: refuseCandidate(connection, "another migration is here already", &actions)
        }
    }

    mutating func refuseCandidate(
        _ connection: ConnectionID, _ reason: String, _ actions: inout [DestinationAction]
    ) {
        guard let visitor = visitors[connection] else { return }
        refuse(connection, visitor, reason, &actions)
    }

    private mutating func rejoin(
        _ connection: ConnectionID, _ asked: MigrationIdentifier, _ chosen: FeatureSet,
        _ actions: inout [DestinationAction]
    ) {
        if mayRejoinPull { return rejoinPull(connection, asked, chosen, &actions) }
        guard asked == migration, chosen == features, phase > .waiting, phase < .starting else {
            return refuseCandidate(connection, "migration \(asked) is not kept here", &actions)
        }
        guard visitors[connection]?.opensReturnPath == true else {
            return refuseCandidate(connection, "the source did not open the return path", &actions)
        }
        // The old connection may still stand here: its last words are void from now on.
        dropConnections(&actions)
        visitors[connection] = nil
        cancelTimer(.visitor(connection), &actions)
        source = connection
        sourceHears = true
        returnPathIsOpen = true
        helloWasSaid = true
        readersHaveEnded = oldReaders.isEmpty
        enter(.rejoining, deadline: configuration.deadlines.localWork, &actions)
        if !readersHaveEnded { actions.append(.awaitReaders(oldReaders)) }
        goOnIfQuiet(&actions)
    }

    mutating func readersEnded(_ connections: [ConnectionID], _ actions: inout [DestinationAction]) {
        // The answer to an earlier question says nothing of connections that were lost since.
        oldReaders.removeAll { connections.contains($0) }
        guard phase == .rejoining else { return }
        readersHaveEnded = oldReaders.isEmpty
        goOnIfQuiet(&actions)
    }

    /// Nothing of the old connection is under way any more: the new one's RAM may come.
    mutating func goOnIfQuiet(_ actions: inout [DestinationAction]) {
        guard phase == .rejoining, readersHaveEnded, !loadIsUnderWay, !isUnlistening, let source else { return }
        send(.resumed, to: source, &actions)
        if configuration.acknowledgesSwitchover { send(.switchoverAcknowledged, to: source, &actions) }
        enter(.opened, deadline: configuration.deadlines.idle, &actions)
        sortChannels(&actions)
    }

    /// Channels of an attempt to resume that came to nothing: those of this one were accepted after its main connection.
    func precedes(_ connection: ConnectionID) -> String? {
        guard features.contains(.resumption), let source, connection.rawValue < source.rawValue else { return nil }
        return "it belongs to a connection that was lost"
    }
}
