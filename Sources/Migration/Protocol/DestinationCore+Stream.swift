import MigrationStream

// What the source's stream says, item by item, until its state is complete.

extension DestinationCore {
    mutating func take(_ item: StreamItem, from connection: ConnectionID, _ actions: inout [DestinationAction]) {
        guard connection == source else { return visit(connection, item, &actions) }
        if pull >= .running { return takeBehindRun(item, &actions) }
        guard phase < .starting else { return }
        expectMore(&actions)
        if isUnlistening, !mayComeMeanwhile(item) {
            return fail("the source sent something else than RAM before it heard RETRACTED", &actions)
        }
        switch item {
        case .configurationSubsection(let subsection): check(subsection, &actions)
        case .command(let command): take(command, &actions)
        case .ramSetup: ramSetup(&actions)
        case .ramRound, .page, .zeroPage, .pageDelta, .pageBatch:
            guard takesRAM || takesRequestedPages else { return outOfTurn("RAM", &actions) }
            memoryWasTouched = true
            rootIsSame = false
        case .multifdFlush:
            guard phase == .receiving, !ramIsComplete else { return outOfTurn("MULTIFD_FLUSH", &actions) }
            guard usesChannels else {
                let remedy = "set the capability multifd and multifd-channels here before migrate-incoming"
                return fail("the source sends over several channels (multifd); \(remedy)", &actions)
            }
        case .ramSectionEnded(.end) where pull >= .discarding: outOfTurn("the end of its RAM", &actions)
        case .ramSectionEnded(let type): if type == .end { ramIsComplete = true }
        case .device(let head, let body): take(head, body, &actions)
        case .inferredSection(let head, _, _): outOfTurn("section '\(head.name)'", &actions)
        case .endOfStream:
            guard rule != .twoPhase else {
                return fail("the source ended its stream without COMMIT", &actions)
            }
            load(&actions)
        case .header, .configuration: outOfTurn("a second opening", &actions)
        case .ramRecordsEnded, .vmDescription, .mappedBlock: break
        }
    }

    /// Memory is being given up to the source again. What it said before it can have known of that is pages that were asked for, behind a
    /// COMMIT_WITHIN that came too late: wherever they go, they come again. But another move must not begin before this one is undone.
    private func mayComeMeanwhile(_ item: StreamItem) -> Bool {
        switch item {
        case .ramRound, .page, .zeroPage, .pageBatch, .ramRecordsEnded, .ramSectionEnded(.part): true
        case .command(.ping), .command(.cancel): true
        default: false
        }
    }

    private var takesRAM: Bool { phase == .receiving && !ramIsComplete && pull < .discarding }

    mutating func outOfTurn(_ what: String, _ actions: inout [DestinationAction]) {
        fail("the source sent \(what) out of turn", &actions)
    }

    private mutating func check(_ subsection: ConfigurationSubsection, _ actions: inout [DestinationAction]) {
        switch subsection {
        case .targetPageBits(let bits):
            if bits != 12 { fail("the source has pages of 2^\(bits) bytes, this machine of 4096", &actions) }
        case .capabilities(let all):
            let names = all.filter { $0 != MappedRAM.capability || !configuration.readsMappedRAM }
            guard !names.isEmpty else { return }
            fail("the source uses migration capability \(names.joined(separator: ", ")), not supported yet", &actions)
        case .uuid(let uuid):
            // As in QEMU: who was told none cannot compare.
            guard let own = configuration.uuid, own != uuid else { return }
            let reason = "the source's UUID is \(uuid.uuidText), this machine's is \(own.uuidText) (validate-uuid)"
            // It has not opened the return path yet; a Godwit source understands why all the same.
            if let source, sourceHears { send(.failure(reason: reason), to: source, &actions) }
            fail(reason, &actions)
        }
    }

    private mutating func take(_ command: ForwardCommand, _ actions: inout [DestinationAction]) {
        switch command {
        case .openReturnPath: openReturnPath(&actions)
        case .ping(let value): answer(ping: value, &actions)
        case .switchoverStart: break
        case .begin(let migration, let chosen): begin(migration, chosen, &actions)
        case .prepare:
            guard rule == .twoPhase, pull <= .advised || pull == .packaged else {
                return outOfTurn("PREPARE", &actions)
            }
            guard mayLoad(&actions) else { return }
            load(&actions)
        case .commit:
            guard phase == .ready else { return outOfTurn("COMMIT", &actions) }
            startGuest(&actions)
        case .commitWithin(let attempt, let nanoseconds): commit(attempt, within: nanoseconds, &actions)
        case .root(let value): compare(root: value, &actions)
        case .digests(let range, let values): compare(range, values, &actions)
        // The source is about to hear which pages differ.
        case .retract where isNarrowing: break
        case .retract(let attempt): retract(attempt, &actions)
        case .cancel(let reason): fail("the source cancelled: \(reason)", tellsSource: false, &actions)
        case .resume(let asked, _) where migration == nil: fail("migration \(asked) is not kept here", &actions)
        case .postcopy(let command): take(command, &actions)
        case .settle, .resume, .other: outOfTurn("a command", &actions)
        }
    }

    private mutating func openReturnPath(_ actions: inout [DestinationAction]) {
        returnPathIsOpen = sourceHears
        guard let source, returnPathIsOpen, configuration.acknowledgesSwitchover else { return }
        send(.switchoverAcknowledged, to: source, &actions)
    }

    mutating func answer(ping value: UInt32, _ actions: inout [DestinationAction]) {
        guard let source, returnPathIsOpen else { return }
        if value == Wire.godwitPing, phase == .opened, !helloWasSaid, !configuration.features.isEmpty {
            helloWasSaid = true
            let hello = ReturnPathMessage.hello(
                version: 1, features: configuration.features, instance: configuration.instance)
            send(hello, to: source, &actions)
        }
        send(.pong(value), to: source, &actions)
    }

    private mutating func begin(
        _ migration: MigrationIdentifier, _ chosen: FeatureSet, _ actions: inout [DestinationAction]
    ) {
        guard helloWasSaid, phase == .opened, self.migration == nil else { return outOfTurn("BEGIN", &actions) }
        guard chosen.isSubset(of: configuration.features) else {
            return fail("the source chose features that were not offered", &actions)
        }
        guard !history.contains(migration) else {
            return fail("migration \(migration) was given up here and cannot begin again", &actions)
        }
        guard chosen.contains(.twoPhaseHandover) || chosen.isDisjoint(with: [.retraction, .resumption]) else {
            return fail("the source chose to take back or to resume without the two-phase handover", &actions)
        }
        guard !chosen.contains(.verification) || chosen.isSuperset(of: [.twoPhaseHandover, .pageBatches]) else {
            return fail("the source chose digests without page batches and the two-phase handover", &actions)
        }
        let handover: FeatureSet = [.twoPhaseHandover, .retraction]
        guard !chosen.contains(.postcopy) || chosen.isSuperset(of: handover) && !chosen.contains(.verification) else {
            return fail(
                "the source chose postcopy without a handover that can be taken back, or with digests", &actions)
        }
        guard !chosen.contains(.safetyNet) || chosen.contains(.postcopy) else {
            return fail("the source chose a safety net without postcopy", &actions)
        }
        self.migration = migration
        features = chosen
        if chosen.contains(.verification) { actions.append(.verify(migration)) }
        rule = chosen.contains(.twoPhaseHandover) ? .twoPhase : .qemu
        sortChannels(&actions)
    }

    private mutating func ramSetup(_ actions: inout [DestinationAction]) {
        guard phase == .opened else { return outOfTurn("a second list of RAM blocks", &actions) }
        let agreed = rule ?? (sourceHears ? .qemu : .oneWay)
        rule = agreed
        actions.append(.agreed(agreed, features: features))
        phase = .receiving
        expectMore(&actions)
        expectChannels(&actions)
        // A channel too many has ended it already.
        guard phase == .receiving else { return }
        report(.active, &actions)
    }

    // MARK: Device state

    private mutating func take(_ head: SectionHead, _ body: [UInt8], _ actions: inout [DestinationAction]) {
        guard phase == .receiving else { return outOfTurn("device section '\(head.name)'", &actions) }
        if head.name == GlobalState.sectionName {
            guard guestState == nil else { return fail("section '\(head.name)' came twice", &actions) }
            guard let state = GlobalState(body: body) else {
                return fail("section '\(head.name)' holds no run state", &actions)
            }
            guestState = state
            return
        }
        let object = "device section '\(head.name)' instance \(head.instance)"
        guard configuration.sections.contains(where: { $0.name == head.name && $0.instance == head.instance }) else {
            return fail("\(object) does not exist on this machine", &actions)
        }
        guard !sections.contains(where: { $0.name == head.name && $0.instance == head.instance }) else {
            return fail("\(object) came twice", &actions)
        }
        stateBytes += body.count
        guard stateBytes <= Self.stateLimitBytes else {
            return fail("the device state is larger than \(Self.stateLimitBytes) bytes", &actions)
        }
        sections.append(
            DeviceSection(name: head.name, instance: head.instance, version: head.version, body: body))
    }

    /// The source says that it sent everything: only complete state is loaded, and all of it at once.
    mutating func load(_ actions: inout [DestinationAction]) {
        guard phase == .receiving else { return outOfTurn("the end of its state", &actions) }
        // What was forgotten may only be missing where it is waited for.
        let isWhole = pull == .discarding ? false : ramIsComplete
        guard isWhole || pull == .listening || features.contains(.retraction) else {
            return fail("the source ended its state before its RAM", &actions)
        }
        let missing = configuration.sections.filter { wanted in
            wanted.required && !sections.contains { $0.name == wanted.name && $0.instance == wanted.instance }
        }
        guard missing.isEmpty else {
            let names = missing.map { "'\($0.name)' instance \($0.instance)" }.joined(separator: ", ")
            return fail("the stream does not bring device section \(names)", &actions)
        }
        memoryWasTouched = true
        loadIsUnderWay = true
        actions.append(.loadState(sections))
        // Who loads may wait for a page as long as a lost source stays away.
        enter(.loading, deadline: pull == .listening ? nil : configuration.deadlines.localWork, &actions)
    }
}
