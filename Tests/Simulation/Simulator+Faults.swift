import Migration
import MigrationStream

// What goes wrong, and what must hold all the same.

extension Simulator {
    // MARK: Faults

    func arrangeFaults() {
        for case .strangers(let count) in plan.faults {
            for _ in 0..<count { schedule(after: microsecond, second) { [self] in strangerConnects() } }
        }
    }

    func strangerConnects() {
        guard destinationIsAlive else { return }
        let connection = SimulatedConnection(ConnectionID(UInt64(connections.count + 1)), isStranger: true)
        connections.append(connection)
        destinationAccepts(connection)
        var writer = StreamWriter()
        switch Int.random(in: 0..<(plan.postcopy == nil ? 6 : 7), using: &generator) {
        case 6:
            // RECV_BITMAP, as a QEMU begins that takes up its postcopy.
            schedule(after: microsecond, 10 * millisecond) { [self] in
                feedDestination(.cameToRecover(connection.id))
                guard plan.rule == .twoPhase else { return }
                if destination.isRecovering(connection.id) { violate("a stranger takes up the guest without a name") }
            }
        case 4, 5: send(imposture(), on: connection, towards: .destination)
        case 0: send(Array("GET / HTTP/1.1\r\n\r\n".utf8), on: connection, towards: .destination)
        case 1:
            writer.header()
            writer.command(.settle(MigrationIdentifier(high: 99, low: 99)))
            send(writer.bytes, on: connection, towards: .destination)
        case 2:
            writer.header()
            writer.configuration(machine: "another")
            send(writer.bytes, on: connection, towards: .destination)
        default: break
        }
        if generator.chance(0.5) { schedule(after: millisecond, second) { [self] in close(connection, by: .source) } }
    }

    /// The words of one who would like to be the source of a migration, of its own or of ours.
    private func imposture() -> [UInt8] {
        var writer = StreamWriter()
        writer.header()
        writer.configuration(machine: Self.machineName)
        if generator.chance(0.9) { writer.command(.openReturnPath) }
        for _ in 0..<Int.random(in: 0...3, using: &generator) { writer.command(.ping(Wire.godwitPing)) }
        let (ours, other) = (source.configuration.migration, MigrationIdentifier(high: 99, low: 99))
        switch Int.random(in: 0..<5, using: &generator) {
        case 0: writer.command(.begin(other, source.features))
        case 1: writer.command(.resume(other, source.features))
        case 2: writer.command(.resume(ours, source.features.subtracting(.retraction)))
        // One who knows the name, as only the source should: it gets hold of the destination, and of nothing else.
        case 3: writer.command(.resume(ours, source.features))
        default: writer.command(.prepare)
        }
        return writer.bytes
    }

    func sourceDies() {
        trace("source dies")
        sourceIsAlive = false
        sourceGuest.stop(at: now)
        for connection in connections where !connection.isStranger { close(connection, by: .source) }
    }

    func destinationDies() {
        trace("destination dies")
        destinationIsAlive = false
        destinationGuest.stop(at: now)
        for connection in connections { close(connection, by: .destination) }
    }

    /// Another process takes the address of one that died: it knows nothing.
    private func destinationReturns() {
        trace("another destination begins")
        destinationEpoch += 1
        destinationIsAlive = true
        destination = Self.destination(plan, instance: MigrationIdentifier(high: destinationEpoch, low: 3))
        destinationGuest = SimulatedGuest(emptyPages: plan.pages)
        (readers, destinationTimers) = ([:], [:])
        pull = SimulatedPull(pages: plan.pages, number: pull.number + 1)
        net.forgetDestination()
    }

    func prepareCuts(of connection: SimulatedConnection) {
        for case .cut(let side, let count) in plan.faults {
            if side == .destination {
                connection.towardsDestination.bytesUntilCut = count
            } else {
                connection.towardsSource.bytesUntilCut = count
            }
        }
    }

    func startTail(of connection: SimulatedConnection) {
        guard connection === connections.first(where: { !$0.isStranger }) else { return }
        for case .cutTail(let count) in plan.faults where connection.towardsDestination.bytesUntilCut == nil {
            connection.towardsDestination.bytesUntilCut = count
        }
    }

    func strikeFaults() {
        strikePostcopy()
        if plan.cutSteps.contains(steps), let connection = sourceConnection { cut(connection) }
        if phaseSteps[source.phase] == nil { phaseSteps[source.phase] = steps }
        for fault in plan.faults {
            switch fault {
            case .silence(let trigger, let healsAfter) where strikes(trigger):
                trace("network: silence")
                for connection in connections { connection.isSilent = true }
                networkIsSilentUntil = now + healsAfter
                // An operator who sees no progress does not wait for our deadlines.
                guard generator.chance(0.5) else { continue }
                schedule(after: 100 * millisecond, 20 * second) { [self] in feedSource(.cancel) }
            case .cutAt(let trigger) where strikes(trigger):
                if let connection = sourceConnection { cut(connection) }
            case .halfCut(let trigger, let heldFor) where strikes(trigger):
                if let connection = sourceConnection { resetSource(connection, heldFor: heldFor) }
            case .stall(let trigger, let side, let nanoseconds) where strikes(trigger):
                if let connection = sourceConnection { stall(connection, towards: side, for: nanoseconds) }
            case .death(.source, let trigger) where strikes(trigger): sourceDies()
            case .death(.destination, let trigger) where strikes(trigger): destinationDies()
            case .restart(let trigger, let pause) where strikes(trigger) && destinationIsAlive:
                let hadGuest = destinationOwnsGuest
                destinationDies()
                if !hadGuest { schedule(at: now + pause) { [self] in destinationReturns() } }
            default: break
            }
        }
    }

    func strikes(_ trigger: SimulationPlan.Trigger) -> Bool {
        switch trigger {
        case .step(let step): step == steps
        case .phase(let phase, let plus): phaseSteps[phase].map { $0 + plus == steps } ?? false
        }
    }

    // MARK: Invariants

    /// QEMU's rule allows two owners when the acknowledgement is lost: that is why there are two phases.
    private var rightIsExclusive: Bool { plan.rule != .qemu || plan.isUndisturbed || move.packageWasSent }

    /// QEMU's order of states; the ways out are open from everywhere.
    func checkOrder(_ status: MigrationStatus) {
        if checkRecoveryOrder(status) { return }
        let order: [MigrationStatus] = [
            .none, .paused, .setup, .active, .preSwitchover, .device, .postcopyDevice, .postcopyActive, .unsettled,
            .postcopyPaused, .completed,
        ]
        if let old = order.firstIndex(of: lastReport), let new = order.firstIndex(of: status), new <= old {
            violate("the status goes from \(lastReport.rawValue) to \(status.rawValue)")
        }
        lastReport = status
    }

    func checkInvariants() {
        if plan.postcopy != nil { checkMoved() }
        guard rightIsExclusive else { return }
        let sourceRuns = sourceIsAlive && sourceGuest.runs
        let destinationRuns = destinationIsAlive && destinationGuest.runs
        if sourceRuns && destinationRuns, !net.isTakenBack { violate("both sides run the guest") }
        if sourceIsAlive, destinationIsAlive, sourceOwnsGuest, destinationOwnsGuest, !net.isTakenBack {
            violate("both sides have the right to run the guest")
        }
        if sourceIsAlive, source.mayRun != sourceOwnsGuest { violate("the source's shell and core disagree") }
        if sourceIsAlive, sourceRuns, !sourceOwnsGuest { violate("the source runs the guest without the right to") }
        if sourceIsAlive, sourceOwnsGuest, source.phase == .finished, plan.guestRuns, !sourceRuns {
            violate("the source has the guest and does not run it")
        }
    }

    /// Nothing is left to happen: nobody may be waiting.
    func checkEnd() {
        let pulls: [SourcePhase] = isSilenced ? [.postcopyPaused, .pulled] : [.postcopyPaused]
        checkPullEnd()
        checkWhole()
        if sourceIsAlive, ![.finished, .unsettled].contains(source.phase), !pulls.contains(source.phase) {
            violate("the source waits for ever in phase \(source.phase)")
        }
        if sourceIsAlive, sourceConnection != nil, source.phase != .pulled {
            violate("the source leaves its connection open")
        }
        if sourceIsAlive, source.phase == .unsettled, !startHangs {
            violate("the source stays unsettled although it could be found out")
        }
        let terminal: [DestinationPhase] = [.waiting, .started, .failed, .pullPaused] + (isSilenced ? [.pulling] : [])
        // With a QEMU source the destination may wait as long as that source's connection stands.
        let isPatient = plan.rule != .twoPhase && destination.phase == .receiving
        // By QEMU's rule loading state waits for a page as long as a guest does.
        let waitsForPage =
            plan.rule == .qemu && destination.phase == .loading && !pull.waiting.isEmpty && !canBecomeWhole
        if destinationIsAlive, !terminal.contains(destination.phase), !isPatient, destination.phase != .starting,
            !waitsForPage
        {
            violate("the destination waits for ever in phase \(destination.phase)")
        }
        if destinationIsAlive, destination.phase == .starting, !startHangs {
            violate("the destination waits for ever in phase \(destination.phase)")
        }
        if plan.isUndisturbed, ending != .completed {
            violate("nothing disturbed the migration, yet it \(ending.rawValue)")
        }
        if plan.isUndisturbed, recoveries > 0 {
            violate("nothing disturbed the migration, yet it was taken up \(recoveries) times")
        }
        if ending == .completed, destinationIsAlive, !destinationOwnsGuest, plan.rule != .oneWay {
            violate("the source says completed, but the destination does not have the guest")
        }
        let guestLives = (sourceIsAlive && sourceOwnsGuest) || (destinationIsAlive && destinationOwnsGuest)
        if sourceIsAlive, destinationIsAlive, !guestLives, ending != .stillUnsettled, plan.rule == .twoPhase {
            violate("nobody has the guest any more")
        }
    }

    /// The kernel never answers the start: no protocol helps.
    var startHangs: Bool {
        plan.faults.contains { if case .localFailure(.destination, _, true) = $0 { true } else { false } }
    }

    var ending: RunEnding {
        guard sourceIsAlive else { return .sourceDied }
        if [.postcopyPaused, .pulled].contains(source.phase) { return .pausedInPostcopy }
        let wasUnsettled = sourceOutcomes.contains { if case .unsettled = $0 { true } else { false } }
        switch sourceOutcomes.last {
        case .completed: return wasUnsettled ? .settledThere : .completed
        case .cancelled: return .cancelled
        case .failed: return wasUnsettled ? .settledHere : .failed
        case .unsettled, .none: return .stillUnsettled
        }
    }
}
