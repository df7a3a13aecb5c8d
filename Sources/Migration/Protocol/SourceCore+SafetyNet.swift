import MigrationStream

// A guest that moved before its memory, and can be taken back (`x-postcopy-safety-net`).
//
// The destination returns what its guest changes, epoch by epoch, and lets nobody hear what the guest says in an epoch before that is
// whole here. So as long as it was not released, what the world knows of the guest is here, whatever becomes of the destination: the operator
// may have it go on here at any moment, and nobody has to know whether the destination lives. From the moment it is released it
// never runs here again. Both are decided here, so there is never a doubt which came first.

extension SourceCore {
    /// Whether the guest moved, and can be taken back.
    var hasNet: Bool { isPostcopy && features.contains(.safetyNet) && !guestIsReleased }

    /// Why the guest could not be taken back, if it is to be.
    func unreturnable(_ rule: HandoverRule, _ features: FeatureSet) -> String? {
        guard configuration.postcopy?.hasNet == true else { return nil }
        switch rule {
        case .twoPhase where features.isSuperset(of: [.postcopy, .safetyNet]): return nil
        case .twoPhase:
            return
                "x-postcopy-safety-net: the destination is a Godwit where it is not set; set the capability there, before it listens, or "
                + "turn it off here"
        case .qemu: return "x-postcopy-safety-net: the destination is not a Godwit; turn the capability off"
        case .oneWay: return "x-postcopy-safety-net: nobody answers on this transport; turn the capability off"
        }
    }

    /// All memory is there, or the operator there said that the guest stays. The one place where it is released.
    mutating func guestStays(_ actions: inout [SourceAction]) {
        guard isPostcopy, features.contains(.safetyNet), isConnected, !takesBack, phase >= .committed else { return }
        // An answer that was lost is given again.
        guestIsReleased = true
        actions.append(.releaseGuest)
    }

    /// The operator gives the destination up: the guest goes on here, as it was at the end of the last epoch that is whole.
    mutating func takeBackGuest(_ actions: inout [SourceAction]) {
        guard isPostcopy, features.contains(.safetyNet), phase != .finished || status == .unsettled else {
            return actions.append(.refused("x-postcopy-take-back: no guest moved from here with x-postcopy-safety-net"))
        }
        guard !guestIsReleased else {
            let reason = "the destination has all of the guest, which was released to it and may run there"
            return actions.append(.refused("x-postcopy-take-back: \(reason)"))
        }
        guard phase == .postcopyPaused || status == .unsettled else {
            let remedy = "its status is \(status.rawValue); pause it first (migrate-pause)"
            return actions.append(.refused("x-postcopy-take-back: the destination is connected, \(remedy)"))
        }
        guard !takesBack else { return }
        // Nobody is asked any more.
        if phase == .asking || phase == .reconnecting { doubt("the operator takes the guest back", &actions) }
        takesBack = true
        actions.append(.takeBackGuest)
    }

    mutating func guestTakenBack(_ actions: inout [SourceAction]) {
        guard takesBack else { return }
        mayRun = true
        actions.append(.regainRightToRun)
        actions.append(.resumeGuest)
        stopWasAsked = false
        wind(up: &actions)
        report(.cancelled, &actions)
        actions.append(.finished(.cancelled))
    }

    /// Its state could not be loaded: nothing has changed.
    mutating func takeBackFailed(_ reason: String, _ actions: inout [SourceAction]) {
        guard takesBack else { return }
        takesBack = false
        actions.append(.refused("x-postcopy-take-back: \(reason)"))
    }

    /// What an operator can do about a guest that moved.
    var remedyForMoved: String {
        let goOn = "go on with migrate-recover there and migrate with 'resume' here"
        return hasNet ? "\(goOn), or have the guest go on here (x-postcopy-take-back)" : goOn
    }
}
