import Migration
import MigrationStream

// What tests of the protocol's cores share: a core with all that it answered so far.

protocol SourceDriver {
    var core: SourceCore { get set }
    var actions: [SourceAction] { get set }
}

extension SourceDriver {
    /// - Returns: what it answers to these.
    @discardableResult
    mutating func feed(_ events: SourceEvent..., at now: UInt64 = 0) -> [SourceAction] {
        var all: [SourceAction] = []
        for event in events { all += core.handle(event, at: now) }
        actions += all
        return all
    }

    var outcome: SourceOutcome? {
        actions.compactMap { if case .finished(let outcome) = $0 { outcome } else { nil } }.last
    }
    var reported: [MigrationStatus] { actions.compactMap { if case .report(let status) = $0 { status } else { nil } } }
}

protocol DestinationDriver {
    var core: DestinationCore { get set }
    var actions: [DestinationAction] { get set }
    /// On the core's clock.
    var now: UInt64 { get }
}

extension DestinationDriver {
    var now: UInt64 { 0 }

    /// - Returns: what it answers to these.
    @discardableResult
    mutating func feed(_ events: DestinationEvent..., at moment: UInt64? = nil) -> [DestinationAction] {
        var all: [DestinationAction] = []
        for event in events { all += core.handle(event, at: moment ?? now) }
        actions += all
        return all
    }

    /// What the source says, which has connection 1, or somebody else.
    @discardableResult
    mutating func items(_ items: StreamItem..., from id: ConnectionID = ConnectionID(1)) -> [DestinationAction] {
        var all: [DestinationAction] = []
        for item in items { all += feed(.item(id, item)) }
        return all
    }

    /// What was said on a connection.
    func said(on id: ConnectionID) -> [ReturnPathMessage] { Self.messages(on: id, in: actions) }

    /// What is said on a connection in these actions.
    static func messages(on id: ConnectionID = ConnectionID(1), in actions: [DestinationAction]) -> [ReturnPathMessage]
    {
        var decoder = ReturnPathDecoder(postcopyOf: [RAMBlockDescription(name: "ram", length: 1 << 20)])
        var buffer = ReceiveBuffer()
        for case .send(id, let bytes) in actions { buffer.append(bytes) }
        var messages: [ReturnPathMessage] = []
        while let message = try? decoder.next(from: &buffer) { messages.append(message) }
        return messages
    }

    var outcome: DestinationOutcome? {
        actions.compactMap { if case .finished(let outcome) = $0 { outcome } else { nil } }.last
    }
    var reported: [MigrationStatus] { actions.compactMap { if case .report(let status) = $0 { status } else { nil } } }
}

extension SourceConfiguration {
    /// A machine with one device, and postcopy.
    static func withPostcopy(
        blocks: [String] = ["ram"], switchover: SwitchoverPolicy = SwitchoverPolicy(), features: FeatureSet = .all,
        _ terms: PostcopyTerms
    ) -> SourceConfiguration {
        var catalogue = SectionCatalogue()
        catalogue.add("cpu", version: 1)
        var configuration = SourceConfiguration(
            migration: MigrationIdentifier(high: 1, low: 2), machineName: "m",
            blocks: blocks.map { RAMBlockDescription(name: $0, length: 1 << 20) }, catalogue: catalogue,
            switchover: switchover, features: features)
        configuration.postcopy = terms
        return configuration
    }
}

extension DestinationConfiguration {
    /// A machine with one device.
    static func withPostcopy(_ isAllowed: Bool = true, features: FeatureSet = .all) -> DestinationConfiguration {
        var configuration = DestinationConfiguration(
            instance: MigrationIdentifier(high: 5, low: 6), machineName: "m", sections: [ExpectedSection(name: "cpu")],
            features: features)
        configuration.allowsPostcopy = isAllowed
        return configuration
    }
}
