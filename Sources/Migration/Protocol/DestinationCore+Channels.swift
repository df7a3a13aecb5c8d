import MigrationStream

// Multifd: the source's further channels. Who greets as one is a visitor until the migration that it belongs to has begun.

extension DestinationCore {
    /// Whether the migration under way brings its pages over further channels.
    public var usesChannels: Bool {
        guard source != nil else { return false }
        if migration != nil { return features.contains(.multifd) }
        return rule != nil && configuration.multifdChannels != nil
    }

    /// Whether the source says how many channels it has.
    public var knowsChannels: Bool { migration != nil }

    /// How many channels there will be. A Godwit source says so in each greeting, for another one the operator did.
    var expectedChannels: Int? { migration == nil ? configuration.multifdChannels : announcedChannels }

    /// A visitor says that it is a channel.
    mutating func greeted(
        _ connection: ConnectionID, _ greeting: MultifdGreeting, _ actions: inout [DestinationAction]
    ) {
        guard let visitor = visitors[connection], visitor.wish == .unknown else { return }
        guard greeting.mark != nil || configuration.multifdChannels != nil else {
            let remedy = "set the capability multifd and multifd-channels before migrate-incoming"
            return dismiss(connection, "it is a channel of multifd, which is off here; \(remedy)", &actions)
        }
        visitors[connection]?.wish = .channel(greeting)
        if let mark = greeting.mark, mark.kind == .urgent {
            if migration != nil { admitUrgent(connection, greeting.channel, mark, &actions) }
            return
        }
        if usesChannels { admitOrDismiss(connection, greeting, &actions) }
    }

    /// The migration has begun: those that belong to it come in, the others leave.
    mutating func sortChannels(_ actions: inout [DestinationAction]) {
        for connection in visitors.keys.sorted(by: { $0.rawValue < $1.rawValue }) {
            guard case .channel(let greeting) = visitors[connection]?.wish else { continue }
            if let mark = greeting.mark, mark.kind == .urgent {
                admitUrgent(connection, greeting.channel, mark, &actions)
                continue
            }
            admitOrDismiss(connection, greeting, &actions)
        }
    }

    private mutating func admitOrDismiss(
        _ connection: ConnectionID, _ greeting: MultifdGreeting, _ actions: inout [DestinationAction]
    ) {
        if mayBelongToNextAttempt(greeting, connection) { return }
        if let reason = unwelcome(greeting, on: connection) {
            dismiss(connection, reason, &actions)
            // A QEMU, whose channels come after its main connection, gives it pages as to all others, and may not notice that nobody reads
            // them. Another machine's are a stranger's.
            if usesChannels, !knowsChannels, greeting.mark == nil, let source, connection.rawValue > source.rawValue,
                Int(greeting.channel) >= expectedChannels ?? 0, greeting.uuid == configuration.uuid ?? greeting.uuid
            {
                fail("the source has more channels than are expected here: \(reason)", &actions)
            }
            return
        }
        if let mark = greeting.mark, migration != nil { announcedChannels = mark.channels }
        guard let expected = expectedChannels else { return }
        visitors[connection] = nil
        cancelTimer(.visitor(connection), &actions)
        channels[connection] = greeting.channel
        actions.append(.admit(connection, of: expected))
        if channels.count == expected { cancelTimer(.channels, &actions) }
    }

    /// A channel for requested pages: it may come at any time, in particular for another attempt to move.
    private mutating func admitUrgent(
        _ connection: ConnectionID, _ number: UInt8, _ mark: MultifdGreeting.Mark, _ actions: inout [DestinationAction]
    ) {
        if let reason = unwelcomeForRequests(connection, number, mark) {
            return dismiss(connection, reason, &actions)
        }
        visitors[connection] = nil
        cancelTimer(.visitor(connection), &actions)
        urgent.insert(connection)
        urgentNumbers[connection] = number
        guard features.contains(.safetyNet) else {
            return actions.append(.admitUrgent(connection, number: number, of: mark.channels))
        }
        let last = mark.channels - 1
        guard Int(number) == last else {
            return actions.append(.admitUrgent(connection, number: number, of: last))
        }
        net = connection
        actions.append(.admitNet(connection))
    }

    private func unwelcomeForRequests(
        _ connection: ConnectionID, _ number: UInt8, _ mark: MultifdGreeting.Mark
    ) -> String? {
        if let reason = precedes(connection) { return reason }
        // They are made when the main connection is known.
        if let source, connection.rawValue < source.rawValue { return "it belongs to a connection that was lost" }
        guard source != nil, features.contains(.postcopy), pull < .complete, phase < .started else {
            return "it is a channel for requested pages, and the migration under way asks for none"
        }
        guard mark.migration == migration else { return "it is a channel of another migration" }
        return urgentNumbers.values.contains(number) ? "channel \(number) for requested pages is here already" : nil
    }

    /// A source that comes back may be here with its channels before we know that its old connection is lost: they wait for its RESUME.
    private func mayBelongToNextAttempt(_ greeting: MultifdGreeting, _ connection: ConnectionID) -> Bool {
        features.contains(.resumption) && precedes(connection) == nil && greeting.mark?.migration == migration
            && channels.values.contains(greeting.channel)
    }

    /// Why a channel has no business here.
    private func unwelcome(_ greeting: MultifdGreeting, on connection: ConnectionID) -> String? {
        if let reason = precedes(connection) { return reason }
        guard usesChannels else { return "it is a channel of multifd, and the migration under way has none" }
        if let migration, greeting.mark?.migration != migration { return "it is a channel of another migration" }
        // QEMU tells it in each greeting, and wants it so.
        if greeting.mark == nil, let own = configuration.uuid, greeting.uuid != own {
            return "it comes from the machine with UUID \(greeting.uuid.uuidText), this one has \(own.uuidText)"
        }
        if let expected = expectedChannels {
            if migration != nil, greeting.mark?.channels != expected { return "it counts the channels otherwise" }
            if Int(greeting.channel) >= expected {
                return "it is channel \(greeting.channel), and only \(expected) are expected; "
                    + "set multifd-channels alike on both sides"
            }
        }
        if channels.values.contains(greeting.channel) { return "channel \(greeting.channel) is here already" }
        return nil
    }

    /// RAM begins: from here on all channels must come soon.
    mutating func expectChannels(_ actions: inout [DestinationAction]) {
        if migration == nil { sortChannels(&actions) }
        guard usesChannels, phase == .receiving, channels.count != expectedChannels else { return }
        actions.append(.setTimer(timers.set(.channels), nanoseconds: configuration.deadlines.greeting))
    }

    mutating func channelsAreLate(_ actions: inout [DestinationAction]) {
        if canKeep { return keep("not all channels of the source came in time", &actions) }
        let wanted = expectedChannels.map { "\($0)" } ?? "its"
        fail("only \(channels.count) of \(wanted) channels of the source came in time", &actions)
    }

    /// A channel failed: without it pages are missing, unless all of them are here.
    mutating func channelLost(_ connection: ConnectionID, _ reason: String, _ actions: inout [DestinationAction]) {
        guard let channel = channels[connection] else { return }
        if canKeep, phase == .receiving || phase == .opened, !ramIsComplete {
            return keep("channel \(channel) of the source is lost: \(reason)", &actions)
        }
        if phase == .receiving || phase == .opened, !ramIsComplete {
            return fail("channel \(channel) of the source failed: \(reason)", &actions)
        }
        channels[connection] = nil
        actions.append(.close(connection))
        // A source that has heard that the guest runs here closes them all.
        guard phase < .started else { return }
        let sentence = "channel \(channel) of the source is lost: \(reason)"
        actions.append(.turnedAway(connection, sentence))
        if phase == .loading || phase == .ready { lostChannel = sentence }
    }

    mutating func closeChannels(_ actions: inout [DestinationAction]) {
        for connection in channels.keys.sorted(by: { $0.rawValue < $1.rawValue }) {
            actions.append(.close(connection))
            oldReaders.append(connection)
        }
        channels = [:]
        lostChannel = nil
        announcedChannels = nil
        cancelTimer(.channels, &actions)
    }
}
