import MigrationStream

// A postcopy whose connection was lost, and the next connection.
//
// The guest runs at the destination, on what it has; what it has not is here, and nowhere else. So nothing that goes wrong ends the
// migration: every failure leads back to `postcopyPaused`, and the operator may try again, to another address too. On the new connection
// the destination first says which pages it has (QEMU's RECV_BITMAP); only what it has not is sent.
//
// To QEMU the connection begins with those words, without a header. Between two Godwits it begins as a resumed precopy's does: the
// destination shows that it is the same process, and hears the migration's name, before anything is told.

extension SourceCore {
    /// QEMU's sentence.
    static let nothingToPause =
        "migrate-pause is currently only supported during postcopy-active or postcopy-recover state"

    /// The operator gives up the connection of a guest that has moved: `recover` makes another.
    mutating func breakOffPostcopy(_ actions: inout [SourceAction]) {
        let follows = [.pulled, .pulledWhole].contains(phase) && packageArrived
        guard follows || (.recoverConnecting...SourcePhase.resumingPostcopy).contains(phase) else {
            return actions.append(.refused(Self.nothingToPause))
        }
        pausePostcopy("the operator paused the migration", &actions)
    }

    mutating func recover(_ actions: inout [SourceAction]) {
        report(.postcopyRecoverSetup, &actions)
        actions.append(.connect)
        enter(.recoverConnecting, deadline: configuration.deadlines.connect, &actions)
    }

    mutating func recoveryConnected(_ direction: ConnectionDirection, _ actions: inout [SourceAction]) {
        isConnected = true
        guard direction == .bothWays else { return pausePostcopy("nobody answers on this transport", &actions) }
        (pongsAwaited, unaskedWords) = (0, 0)
        (urgentChannelIsAsked, urgentChannelIsOpen, urgentChannelsAreGreeted) = (false, false, false)
        helloFeatures = nil
        actions.append(.prepareRecovery)
        report(.postcopyRecover, &actions)
        guard rule == .twoPhase else { return askForBitmaps(&actions) }
        let (name, uuid) = (configuration.machineName, configuration.uuid)
        pongsAwaited = 1
        send(&actions) { writer in
            writer.header()
            writer.configuration(machine: name, subsections: uuid.map { [.uuid($0)] } ?? [])
            writer.command(.openReturnPath)
            writer.command(.ping(Wire.godwitPing))
        }
        enter(.recoverGreeting, deadline: configuration.deadlines.greeting, &actions)
    }

    private mutating func askForBitmaps(_ actions: inout [SourceAction]) {
        let names = configuration.blocks.map(\.name)
        bitmapsAwaited = Set(names)
        send(&actions) { writer in
            for name in names { writer.command(.postcopy(.receiveBitmap(block: name))) }
        }
        // A QEMU 7.2 takes up nothing before it has both connections; for others the first bitmap says that the main one is known.
        expectUrgentChannel(&actions)
        enter(.recoveringBitmaps, deadline: configuration.deadlines.acknowledgement, &actions)
    }

    mutating func receivedInRecovery(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        switch (phase, message) {
        case (.recoverGreeting, .hello(let version, let features, let instance)):
            guard version > 0, helloFeatures == nil, peer == nil || instance == peer else {
                return pausePostcopy(Self.strangerListens, &actions)
            }
            helloFeatures = features
        case (.recoverGreeting, .pong(Wire.godwitPing)):
            guard let offered = helloFeatures, features.isSubset(of: offered) else {
                return pausePostcopy(Self.strangerListens, &actions)
            }
            let (migration, features) = (configuration.migration, features)
            send(&actions) { $0.command(.resume(migration, features)) }
            enter(.recoverGreeting, deadline: configuration.deadlines.ready, &actions)
        case (.recoverGreeting, .resumed):
            let blocks = wireBlocks
            send(&actions) { $0.ramSetup(id: Self.ramSectionID, blocks: blocks) }
            askForBitmaps(&actions)
        // It has all of the memory: what was lost was its last word.
        case (_, .shut(0)) where rule == .twoPhase && helloFeatures != nil: complete(&actions)
        case (.recoveringBitmaps, .postcopy(.bitmapEnded(let block))): bitmapEnded(block, &actions)
        case (.resumingPostcopy, .postcopy(.resumeAcknowledged)): goOn(&actions)
        case (_, .pong): break
        case (_, .failure(let reason)): pausePostcopy("what listens there refuses it: \(reason)", &actions)
        case (_, .shut(let value)):
            pausePostcopy("the destination ended the connection (SHUT \(value))", &actions)
        default: pausePostcopy("the destination sent a message out of turn", &actions)
        }
    }

    private mutating func bitmapEnded(_ block: String, _ actions: inout [SourceAction]) {
        guard bitmapsAwaited.remove(block) != nil else {
            return pausePostcopy("the destination said twice what it has of RAM block '\(block)'", &actions)
        }
        openUrgentChannel(&actions)
        enter(.recoveringBitmaps, deadline: configuration.deadlines.acknowledgement, &actions)
        guard bitmapsAwaited.isEmpty else { return }
        actions.append(.adoptBitmaps)
        resumeWhenReady(&actions)
    }

    mutating func urgentChannelReopened(_ actions: inout [SourceAction]) {
        urgentChannelIsOpen = true
        resumeWhenReady(&actions)
    }

    private mutating func resumeWhenReady(_ actions: inout [SourceAction]) {
        guard bitmapsAwaited.isEmpty, urgentChannelIsOpen || configuration.postcopy?.usesUrgentChannel != true
        else { return }
        send(&actions) { $0.command(.postcopy(.resume)) }
        enter(.resumingPostcopy, deadline: configuration.deadlines.acknowledgement, &actions)
    }

    private mutating func goOn(_ actions: inout [SourceAction]) {
        packageArrived = true
        allWasSent = false
        enter(.pulled, deadline: nil, &actions)
        report(.postcopyActive, &actions)
        ramSectionIsOpen = true
        send(&actions) { $0.ramRound(final: false, id: Self.ramSectionID) }
        actions.append(.servePages)
    }
}
