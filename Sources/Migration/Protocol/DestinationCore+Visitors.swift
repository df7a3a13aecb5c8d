import MigrationStream

// Connections that are not (yet) the source's: who becomes the source, and who comes to ask what became of a migration.

extension DestinationCore {
    mutating func accepted(_ connection: ConnectionID, _ answers: Bool, _ actions: inout [DestinationAction]) {
        if visitors.count >= Self.visitorLimit {
            // Who says nothing must not keep out the source, which says at once who it is; nor must channels without a migration.
            let silent = oldest { $0 == .unknown }
            let channel = oldest { if case .channel = $0 { true } else { false } }
            guard let leaving = silent ?? channel ?? oldest({ $0 == .candidate }) else {
                actions.append(.close(connection))
                actions.append(.turnedAway(connection, "too many connections wait already"))
                return
            }
            let fault =
                silent != nil
                ? "has said nothing"
                : channel != nil ? "is a channel whose migration has not begun" : "has not said RESUME"
            dismiss(leaving, "too many connections wait, and it \(fault) for the longest time", &actions)
        }
        visitors[connection] = Visitor(answers: answers)
        let timer = timers.set(.visitor(connection))
        actions.append(.setTimer(timer, nanoseconds: configuration.deadlines.greeting))
    }

    private func oldest(_ isWanted: (Visitor.Wish) -> Bool) -> ConnectionID? {
        visitors.filter { isWanted($0.value.wish) }.keys.min { $0.rawValue < $1.rawValue }
    }

    mutating func visit(_ connection: ConnectionID, _ item: StreamItem, _ actions: inout [DestinationAction]) {
        guard let visitor = visitors[connection] else { return }
        if visitor.wish == .candidate { return hear(connection, item, &actions) }
        guard visitor.wish == .unknown else { return }
        switch item {
        case .header: break
        case .configuration(let machine): open(connection, visitor, machine, &actions)
        case .command(.settle(let asked)) where visitor.answers: settle(asked, for: connection, &actions)
        default: dismiss(connection, "it neither names a machine nor asks for a verdict", &actions)
        }
    }

    mutating func dismiss(_ connection: ConnectionID, _ reason: String, _ actions: inout [DestinationAction]) {
        guard let visitor = visitors.removeValue(forKey: connection) else { return }
        cancelTimer(.visitor(connection), &actions)
        actions.append(.close(connection))
        switch visitor.wish {
        case .unknown, .channel, .candidate: break
        case .verdict, .answered: return
        }
        actions.append(.turnedAway(connection, reason))
        lastDismissal = reason
        failIfForsaken(&actions)
    }

    mutating func noFurtherConnection(_ actions: inout [DestinationAction]) {
        isLastChance = true
        failIfForsaken(&actions)
    }

    /// Nobody is left who could become the source, and nobody can come.
    private mutating func failIfForsaken(_ actions: inout [DestinationAction]) {
        guard isLastChance, phase == .waiting, visitors.isEmpty else { return }
        fail(lastDismissal ?? "no source can come any more", &actions)
    }

    /// A visitor names its machine: it wants to be the source.
    private mutating func open(
        _ connection: ConnectionID, _ visitor: Visitor, _ machine: String, _ actions: inout [DestinationAction]
    ) {
        let mayRejoin = features.contains(.resumption) && phase != .waiting && phase < .starting || mayRejoinPull
        if mayRejoin, visitor.answers, machine == configuration.machineName {
            visitors[connection]?.wish = .candidate
            return
        }
        guard phase == .waiting else {
            let reason = phase == .failed ? "an earlier migration failed here" : "another migration is here already"
            return refuse(connection, visitor, reason, &actions)
        }
        guard machine == configuration.machineName else {
            let reason = "the source is a '\(machine)' machine, this one is '\(configuration.machineName)'"
            return refuse(connection, visitor, reason, &actions)
        }
        visitors[connection] = nil
        cancelTimer(.visitor(connection), &actions)
        source = connection
        sourceHears = visitor.answers
        report(.setup, &actions)
        enter(.opened, deadline: configuration.deadlines.idle, &actions)
    }

    /// A Godwit source understands why; a QEMU source only that it is not welcome.
    mutating func refuse(
        _ connection: ConnectionID, _ visitor: Visitor, _ reason: String, _ actions: inout [DestinationAction]
    ) {
        if visitor.answers { send(.failure(reason: reason), to: connection, &actions) }
        dismiss(connection, reason, &actions)
    }

    // MARK: SETTLE

    private mutating func settle(
        _ asked: MigrationIdentifier, for connection: ConnectionID, _ actions: inout [DestinationAction]
    ) {
        if asked == migration, phase < .starting {
            // The source gave up the connection we still wait on: whatever arrives there now comes too late.
            fail("the source asks on a new connection what became of this one", tellsSource: false, &actions)
        }
        if asked == migration, phase == .starting {
            visitors[connection]?.wish = .verdict
            cancelTimer(.visitor(connection), &actions)
            return
        }
        answer(connection, verdict(on: asked), &actions)
    }

    private func verdict(on asked: MigrationIdentifier) -> Verdict {
        if asked == migration, phase >= .pulling, phase < .failed { return .started }
        return history.contains(asked) ? .neverStarted : .unknown
    }

    /// The visitor closes when it has read the answer, or its timer does.
    private mutating func answer(
        _ connection: ConnectionID, _ verdict: Verdict, _ actions: inout [DestinationAction]
    ) {
        visitors[connection]?.wish = .answered
        send(.verdict(verdict), to: connection, &actions)
        let timer = timers.set(.visitor(connection))
        actions.append(.setTimer(timer, nanoseconds: configuration.deadlines.greeting))
    }

    /// The start that visitors waited for has ended. Only the migration of that start can be asked for here.
    mutating func answerVisitors(_ actions: inout [DestinationAction]) {
        let verdict: Verdict = phase >= .pulling && phase < .failed ? .started : .neverStarted
        for connection in visitors.keys.sorted(by: { $0.rawValue < $1.rawValue })
        where visitors[connection]?.wish == .verdict {
            answer(connection, verdict, &actions)
        }
    }
}
