import MigrationStream

// Postcopy at the source: the guest moves first, its memory follows as it is asked for.
//
// Rounds go on, or none is sent, until `startPostcopy`. Then the destination forgets what is out of date (DISCARD), the guest stops, what it
// wrote meanwhile is forgotten as well, and all device state goes in one package whose last word is RUN. The right to run is given up before a byte of the package is handed over. A
// destination reads a package whole before it looks into it: so as long as RUN did not leave, the guest cannot run there, and a failure
// has it run on here. Afterwards it never runs here again, whatever happens: half of its memory may be newer there.

extension SourceCore {
    /// The PING behind DISCARD, as QEMU says it; nobody waits for its PONG.
    private static let discardPing: UInt32 = 2
    /// The PING right before RUN: its PONG says that the package arrived.
    private static let packagePing: UInt32 = 3

    /// Why the guest cannot move before its memory, if it is to.
    func unmovable(_ rule: HandoverRule, _ features: FeatureSet) -> String? {
        guard configuration.postcopy != nil else { return nil }
        switch rule {
        case .qemu: return nil
        case .oneWay:
            return
                "postcopy-ram: nobody answers on this transport, so pages could not be asked for; turn the capability off"
        case .twoPhase where features.isSuperset(of: [.postcopy, .twoPhaseHandover, .retraction]): return nil
        case .twoPhase:
            return
                "postcopy-ram: the destination is a Godwit where it is not set; set the capability there, before it listens, or turn it "
                + "off here"
        }
    }

    /// Between two Godwits pages go one by one.
    var wireBlocks: [RAMBlockDescription] {
        rule == .twoPhase ? configuration.blocks.map(\.uniform) : configuration.blocks
    }

    /// What a destination hears before RAM begins.
    mutating func advise(_ actions: inout [SourceAction]) {
        guard configuration.postcopy != nil else { return }
        let advice = PostcopyAdvice(blockPageSizes: wireBlocks.reduce(0) { $0 | $1.pageSize })
        send(&actions) { $0.command(.postcopy(.advise(advice))) }
    }

    /// So long is the first PONG awaited before the channel for requested pages is opened all the same.
    private static let firstPongNanoseconds: UInt64 = 300_000_000

    /// No byte is said on that channel before a page is: what keeps it from being taken for the main one is that it comes later. A PONG
    /// shows that the main one is known. But QEMU 7.1 and 7.2 say none, and nothing else, before they have both.
    mutating func expectUrgentChannel(_ actions: inout [SourceAction]) {
        guard configuration.postcopy?.usesUrgentChannel == true else { return }
        actions.append(.setTimer(timers.set(.urgentChannel), nanoseconds: Self.firstPongNanoseconds))
    }

    mutating func openUrgentChannel(_ actions: inout [SourceAction]) {
        cancelTimer(.urgentChannel, &actions)
        guard configuration.postcopy?.usesUrgentChannel == true else { return }
        // A Godwit that was slow to say so was taken for a QEMU that says nothing before it has both.
        let isMistaken = rule == .twoPhase && !urgentChannelsAreGreeted
        guard !urgentChannelIsAsked || isMistaken else { return }
        if urgentChannelIsAsked { urgentChannelsInVain += urgentChannelIsOpen ? 0 : 1 }
        urgentChannelIsAsked = true
        urgentChannelIsOpen = false
        urgentChannelsAreGreeted = rule == .twoPhase
        let terms = configuration.postcopy ?? PostcopyTerms()
        let count = terms.urgentChannels + (terms.hasNet ? 1 : 0)
        actions.append(rule == .twoPhase ? .openUrgentChannels(count) : .openUrgentChannel)
    }

    mutating func urgentChannelOpened(_ actions: inout [SourceAction]) {
        guard configuration.postcopy?.usesUrgentChannel == true else { return }
        guard urgentChannelsInVain == 0 else { return urgentChannelsInVain -= 1 }
        if phase == .recoveringBitmaps { return urgentChannelReopened(&actions) }
        guard phase < .committed else { return }
        urgentChannelIsOpen = true
        if phase == .openingUrgentChannel { collect(&actions) }
    }

    /// It was asked for, so without it the migration would not be what was asked for.
    mutating func urgentChannelFailed(_ reason: String, _ actions: inout [SourceAction]) {
        let sentence = "postcopy-preempt: the channel for requested pages could not be opened: \(reason)"
        if phase == .recoveringBitmaps { return pausePostcopy(sentence, &actions) }
        retreat(.failed(sentence), farewell: nil, &actions)
    }

    mutating func urgentChannelLost(_ reason: String, _ actions: inout [SourceAction]) {
        let sentence = "the channel for requested pages: \(reason)"
        switch phase {
        // A destination that takes the move back closes it as well: what it says tells.
        case .committed, .retracting: lossDuringPackage = lossDuringPackage ?? sentence
        // It is closed and opened again anyway.
        case .breakingOff where pagesAreHandedOver: break
        // All was sent, and a destination that has it closes it.
        case .pulledWhole where rule == .twoPhase: break
        // Of a move that was taken back.
        case .idle..<SourcePhase.committed where !urgentChannelIsOpen: break
        default: disconnected(sentence, &actions)
        }
    }

    // MARK: The operator's word

    mutating func startPostcopy(_ actions: inout [SourceAction]) {
        guard configuration.postcopy != nil else {
            actions.append(.refused("Enable postcopy with migrate_set_capability before the start of migration"))
            return
        }
        guard phase > .idle, ![.retreating, .finished].contains(phase) else {
            actions.append(.refused("Postcopy must be started after migration has been started"))
            return
        }
        // A switchover that is under way goes on; this counts should it be broken off.
        postcopyIsWanted = true
        switch phase {
        case .resting: collect(&actions)
        case .sendingRound: actions.append(.interruptRound)
        default: break
        }
    }

    /// After a collect, instead of a decision: the guest stops as soon as it can, however much is left.
    mutating func switchToPostcopy(with pages: UInt64, _ actions: inout [SourceAction]) {
        if configuration.postcopy?.usesUrgentChannel == true, !urgentChannelIsOpen {
            openUrgentChannel(&actions)
            return enter(.openingUrgentChannel, deadline: configuration.deadlines.connect, &actions)
        }
        // What stands in socket buffers would stand before the package.
        if undrainedBytes > Self.drainLimitBytes { return drain(&actions) }
        if isWorthForgetting(pages) { return discardAhead(&actions) }
        isPostcopy = true
        stopWasAsked = true
        actions.append(.stopGuest)
        beginStandstill(&actions)
        releaseMove(&actions)
        enter(.stoppingGuest, deadline: configuration.deadlines.localWork, &actions)
    }

    /// A page here and there takes a destination long to forget: huge pages are split for it, one after the other. So it begins with that
    /// while the guest runs on here, and says when it is done. There are no rounds any more: what was named comes behind the guest.
    private mutating func discardAhead(_ actions: inout [SourceAction]) {
        attempt &+= 1
        turnsAhead = pagesAreHandedOver ? turnsAhead + 1 : 1
        turnBegan = now
        pagesAreHandedOver = true
        actions.append(.sendDiscards)
        drain(&actions)
    }

    /// What the guest wrote in a turn that took long is worth another.
    private func isWorthForgetting(_ pages: UInt64) -> Bool {
        guard hasSentPages, let terms = configuration.postcopy, pages >= terms.pagesForgottenAhead else { return false }
        guard pagesAreHandedOver else { return true }
        return turnsAhead < Self.mostTurnsAhead && now - turnBegan > roundTripNanoseconds + Self.shortTurnNanoseconds
    }

    private static let mostTurnsAhead = 2
    private static let shortTurnNanoseconds: UInt64 = 2_000_000

    /// What is left of RAM does not count, and device state is what it is: another attempt will not find much else.
    mutating func releaseMove(_ actions: inout [SourceAction]) {
        guard isPostcopy, rule != .twoPhase || brokenMoves >= Self.boundMoves else { return }
        suspendContract(&actions)
    }

    /// So many attempts are held to the downtime limit, where a destination can take a start back.
    private static let boundMoves = 4

    /// After a collect.
    var mayMoveNow: Bool { postcopyIsWanted && !mustAwaitAcknowledgement && !restsBeforeMove }

    // MARK: The package

    /// The last dirty pages are known.
    mutating func beginDiscarding(_ actions: inout [SourceAction]) {
        attempt &+= 1
        pagesAreHandedOver = true
        actions.append(.sendDiscards)
        actions.append(.saveState)
        discardsAreSent = false
        packagedState = nil
        enter(.discarding, deadline: configuration.deadlines.stall, &actions)
    }

    mutating func discardsSent(_ actions: inout [SourceAction]) {
        guard phase == .discarding || awaited == .package else { return }
        discardsAreSent = true
        sendPackage(&actions)
    }

    mutating func stateSavedForPackage(_ saved: [DeviceSection], _ actions: inout [SourceAction]) {
        if phase == .discarding { endPart(.state) }
        sections = saved + [GlobalState(runState: guestWasRunning ? "running" : "paused").section]
        if let reason = unsendable { return retreat(.failed(reason), farewell: nil, &actions) }
        var package = StreamWriter()
        package.command(.postcopy(.listen))
        for (index, entry) in describedSections.enumerated() {
            package.deviceSection(entry.section, id: Self.ramSectionID + 1 + UInt32(index), layout: entry.layout)
        }
        if rule == .qemu {
            pongsAwaited += 1
            package.command(.ping(Self.packagePing))
        }
        package.command(.postcopy(.run))
        guard package.bytes.count <= StreamLimit.packageBytes else {
            let reason =
                "the device state has \(package.bytes.count) bytes, more than the \(StreamLimit.packageBytes) that fit into one "
                + "package; migrate without postcopy"
            return retreat(.failed(reason), farewell: nil, &actions)
        }
        packagedState = package.bytes
        sendPackage(&actions)
    }

    /// DISCARD is in the kernel's hands, and the state is known: the one place where a guest is let go before its memory.
    private mutating func sendPackage(_ actions: inout [SourceAction]) {
        guard discardsAreSent, let state = packagedState else { return }
        if phase == .breakingOff { return settleOwed(.package, &actions) }
        packagedState = nil
        if rule == .twoPhase { return prepareMove(state, &actions) }
        ping(Self.discardPing, &actions)
        mayRun = false
        actions.append(.giveUpRightToRun)
        actions.append(.sendPackage(packaged(state)))
        // The guest may ask for pages at once.
        ramSectionIsOpen = true
        send(&actions) { $0.ramRound(final: false, id: Self.ramSectionID) }
        actions.append(.servePages)
        enter(.packageLeaving, deadline: configuration.deadlines.acknowledgement, &actions)
    }

    private func packaged(_ state: [UInt8]) -> [UInt8] {
        var writer = StreamWriter()
        writer.command(.postcopy(.packaged(byteCount: UInt32(state.count))))
        return writer.bytes + state
    }

    mutating func packageSent(_ actions: inout [SourceAction]) {
        guard phase == .packageLeaving else { return }
        enter(.pulled, deadline: packageArrived ? nil : configuration.deadlines.acknowledgement, &actions)
        if let reason = refusalDuringPackage { return takeBack(reason, &actions) }
        if let reason = lossDuringPackage { return postcopyLost(reason, &actions) }
        if packageArrived { report(.postcopyActive, &actions) }
    }

    /// RUN did not leave: the destination cannot start the guest, ever.
    mutating func packageCut(_ reason: String, _ actions: inout [SourceAction]) {
        // Its sender was stuck, so it was given up in doubt: that ends the doubt.
        let wasGivenUp = phase == .unsettled && isPostcopy && rule == .qemu
        guard phase == .packageLeaving || wasGivenUp else { return }
        takeBack("\(reason), before the destination had all of the guest's state", &actions)
    }

    // MARK: Between two Godwits

    /// As in precopy the right to run goes with COMMIT: the package is what PREPARE speaks of, and RUN in it starts nothing. Until then a
    /// page goes only where the state that is loaded there asks for it: what else went would stand before COMMIT.
    private mutating func prepareMove(_ state: [UInt8], _ actions: inout [SourceAction]) {
        if isTooLate() { return breakOff("the state was not on its way in time", &actions) }
        actions.append(.sendPackage(packaged(state)))
        send(&actions) { $0.command(.prepare) }
        serveRequests(&actions)
        enter(.preparing, deadline: configuration.deadlines.ready, &actions)
    }

    mutating func serveRequests(_ actions: inout [SourceAction]) {
        ramSectionIsOpen = true
        send(&actions) { $0.ramRound(final: false, id: Self.ramSectionID) }
        actions.append(.serveRequests)
    }

    /// STARTED: the guest runs there, and nothing of this migration can be taken back any more.
    mutating func startedBeforeMemory(_ actions: inout [SourceAction]) {
        packageArrived = true
        actions.append(.servePages)
        enter(.pulled, deadline: nil, &actions)
        report(.postcopyActive, &actions)
        if let reason = lossDuringPackage { postcopyLost(reason, &actions) }
    }

    /// The destination watches nothing any more. - Parameter isReconnected: it is another connection, where nothing holds that was open.
    mutating func takeBackPages(isReconnected: Bool = false, _ actions: inout [SourceAction]) {
        isPostcopy = false
        lossDuringPackage = nil
        guard pagesAreHandedOver || isReconnected && configuration.postcopy != nil else { return }
        pagesAreHandedOver = false
        discardsAreSent = false
        packagedState = nil
        (urgentChannelIsAsked, urgentChannelIsOpen, urgentChannelsAreGreeted) = (false, false, false)
        actions.append(.takeBackPages)
    }

    // MARK: The guest runs there

    mutating func receivedInPostcopy(_ message: ReturnPathMessage, _ actions: inout [SourceAction]) {
        switch message {
        case .pong(Self.packagePing) where !packageArrived:
            packageArrived = true
            guard phase > .packageLeaving else { return }
            if phase == .pulled { enter(.pulled, deadline: nil, &actions) }
            report(.postcopyActive, &actions)
        case .pong: break
        case .shut(0) where phase == .pulledWhole: complete(&actions)
        // What it answers comes in order: it did not carry out RUN.
        case .shut(let value) where value != 0 && !packageArrived:
            let reason = "the destination could not run the guest (SHUT \(value))"
            guard phase > .packageLeaving else { return refusalDuringPackage = reason }
            takeBack(reason, &actions)
        case .shut(let value):
            postcopyLost("the destination ended the migration before all memory was there (SHUT \(value))", &actions)
        default: postcopyLost("the destination sent a message out of turn", &actions)
        }
    }

    mutating func pagesServed(_ actions: inout [SourceAction]) {
        guard phase == .pulled else { return }
        allWasSent = true
        closeRAMSection(&actions)
        send(&actions) { writer in
            writer.ramRound(final: true, id: Self.ramSectionID)
            writer.ramSectionEnd(id: Self.ramSectionID)
            writer.endOfStream()
        }
        enter(.pulledWhole, deadline: configuration.deadlines.acknowledgement, &actions)
    }

    /// The connection is gone, or of no use. Memory stays as it is: nobody else has all of it.
    mutating func postcopyLost(_ reason: String, _ actions: inout [SourceAction]) {
        switch phase {
        // How it ended for the package decides, and its sender says so.
        case .packageLeaving: lossDuringPackage = lossDuringPackage ?? reason
        case .pulled, .pulledWhole:
            guard packageArrived else { return doubt(reason, &actions) }
            pausePostcopy(reason, &actions)
        default: break
        }
    }

    /// The guest is known to have moved.
    mutating func pausePostcopy(_ reason: String, _ actions: inout [SourceAction]) {
        actions.append(.abandon)
        cancelTimer(.urgentChannel, &actions)
        isConnected = false
        ramSectionIsOpen = false
        bitmapsAwaited = []
        enter(.postcopyPaused, deadline: nil, &actions)
        // A QEMU that has it all listens no more: no recovery would ever tell.
        let state =
            allWasSent && !hasNet
            ? "every page was sent, and the destination may be complete: ask it with query-migrate; if it says 'completed', quit here, else"
            : "the guest moved, and what is missing of its memory stays here;"
        actions.append(.paused("\(reason); \(state) \(remedyForMoved)"))
        report(.postcopyPaused, &actions)
    }
}
