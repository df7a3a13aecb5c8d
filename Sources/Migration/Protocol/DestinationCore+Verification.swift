import MigrationStream

// `x-verify` at the destination: state is loaded only after the source's root was found to be ours. If it is not, the source is asked for
// digests, one range after the other, until the pages that differ are known; then the migration has failed.

extension DestinationCore {
    mutating func compare(root: UInt64, _ actions: inout [DestinationAction]) {
        guard features.contains(.verification), phase == .receiving, !isNarrowing else {
            return outOfTurn("ROOT", &actions)
        }
        actions.append(.compareRoot(root))
    }

    mutating func compare(_ range: DigestRange, _ values: [UInt64], _ actions: inout [DestinationAction]) {
        guard isNarrowing, phase == .receiving else { return outOfTurn("DIGESTS", &actions) }
        actions.append(.compareDigests(range, values))
    }

    mutating func compared(_ verdict: RootVerdict, _ actions: inout [DestinationAction]) {
        guard let source, phase == .receiving else { return }
        switch verdict {
        case .same: rootIsSame = true
        case .corrupt(let reason): fail(reason, &actions)
        case .ask(let range):
            isNarrowing = true
            send(.digestsWanted(range), to: source, &actions)
        }
    }

    /// PREPARE: whether all pages are known to be as they were sent.
    mutating func mayLoad(_ actions: inout [DestinationAction]) -> Bool {
        guard features.contains(.verification), !rootIsSame else { return true }
        // It was said before the source heard the question.
        if !isNarrowing { outOfTurn("PREPARE without ROOT", &actions) }
        return false
    }
}
