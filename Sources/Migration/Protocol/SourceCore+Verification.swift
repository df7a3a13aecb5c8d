import MigrationStream

// `x-verify` at the source: a destination that cannot compare digests is refused before anything moves, and one whose record differs is
// told what it asks until it can name the pages. The guest runs on meanwhile: this migration has failed.

extension SourceCore {
    private static let needed: FeatureSet = [.verification, .twoPhaseHandover, .pageBatches]
    /// So often may be asked: enough for hundreds of TiB, and answers that nobody reads do not fill our memory.
    private static let mostQuestions = 1 << 16

    /// Why pages cannot be verified there, if they are to be.
    func unverifiable(_ rule: HandoverRule, _ features: FeatureSet) -> String? {
        guard configuration.verifies, !features.isSuperset(of: Self.needed) else { return nil }
        let reason =
            switch rule {
            case .oneWay: "nobody answers on this transport"
            case .qemu: "the destination is no Godwit"
            case .twoPhase: "the destination is a Godwit that knows no digests"
            }
        return "x-verify: \(reason), so pages cannot be verified there; turn the capability off"
    }

    /// - Returns: false where it is out of turn.
    mutating func answerDigests(_ range: DigestRange, _ actions: inout [SourceAction]) -> Bool {
        guard features.contains(.verification), [.preparing, .retracting, .narrowing].contains(phase) else {
            return false
        }
        digestQuestions += 1
        guard digestQuestions <= Self.mostQuestions else {
            retreat(.failed("x-verify: the destination asks for digests without end"), farewell: nil, &actions)
            return true
        }
        endStandstill(&actions)
        if stopWasAsked { actions.append(.resumeGuest) }
        stopWasAsked = false
        actions.append(.sendDigests(range))
        enter(.narrowing, deadline: configuration.deadlines.ready, &actions)
        return true
    }
}
