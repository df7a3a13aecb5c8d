import MigrationStream

// A guest that runs here and can be taken back by its source (`x-postcopy-safety-net`).
//
// Nothing it says is heard before the source has the epoch in which it was said. It runs only as long as epochs reach the source: when that
// is lost it stands still. All of its memory being here changes nothing of that; the source's word does (RELEASED), or the operator's, who
// knows that the source will never take it back.

extension DestinationCore {
    /// Whether the source can take the guest back.
    var hasNet: Bool { features.contains(.safetyNet) && !netIsOver }

    static let standsStill =
        "the guest stands still, as its source may take it back (x-postcopy-keep has it stay here once the source is gone)"

    /// The guest runs, or stands still with a lost source.
    mutating func beginEpochs(_ actions: inout [DestinationAction]) {
        guard hasNet else { return }
        actions.append(phase == .pulling ? .goOnWithEpochs : .holdEpochs)
        if phase == .pulling, memoryIsWhole { askForRelease(&actions) }
    }

    /// Another connection goes on where one was lost.
    mutating func goOnWithEpochs(_ actions: inout [DestinationAction]) {
        guard features.contains(.safetyNet), phase == .pulling else { return }
        // It may not know yet that there is nothing to take back.
        actions.append(netIsOver ? .sayStays : .goOnWithEpochs)
    }

    /// No page is missing. - Returns: whether that is all there is to wait for.
    mutating func isWhole(_ actions: inout [DestinationAction]) -> Bool {
        guard hasNet else { return true }
        memoryIsWhole = true
        askForRelease(&actions)
        return false
    }

    private mutating func askForRelease(_ actions: inout [DestinationAction]) {
        guard source != nil, ramIsComplete, phase == .pulling else { return }
        actions.append(.sayStays)
        enter(.pulling, deadline: configuration.deadlines.acknowledgement, &actions)
    }

    /// The source will never take the guest back.
    mutating func guestReleased(_ connection: ConnectionID, _ actions: inout [DestinationAction]) {
        guard hasNet, connection == net, urgent.contains(connection), phase >= .starting else { return }
        endNet(&actions)
        if memoryIsWhole { pullIsComplete(&actions) }
    }

    /// The operator knows that the source is gone, or will not take the guest back.
    mutating func keepGuest(_ actions: inout [DestinationAction]) {
        guard hasNet, phase == .pullPaused, source == nil else { return }
        endNet(&actions)
        if memoryIsWhole { return pullIsComplete(&actions) }
        actions.append(
            .pullPaused(
                "the guest stays here, and its source is lost; it runs on as far as its memory is here; go on with migrate-recover here "
                    + "and migrate with 'resume' there"))
    }

    private mutating func endNet(_ actions: inout [DestinationAction]) {
        netIsOver = true
        actions.append(.endEpochs)
    }

    mutating func forgetNet(_ actions: inout [DestinationAction]) {
        if features.contains(.safetyNet), pull > .none { actions.append(.endEpochs) }
        netIsOver = false
        memoryIsWhole = false
    }
}
