import Migration
import MigrationStream

/// A round that is being sent.
struct SimulatedRound {
    let final: Bool
    let batches: Bool
    let began: UInt64
    var pages: UInt64 = 0
    var bytes: UInt64 = 0
    var endsEarly = false
}

// The source's shell: performs the core's actions, each with a delay of its own.

extension Simulator {
    func feedSource(_ event: SourceEvent) {
        guard sourceIsAlive, violation == nil else { return }
        trace("source   <- \(event)")
        if event == .received(.verdict(.unknown)), destinationEpoch == 0 {
            violate("the destination forgot a migration that was begun there")
        }
        plantResume(event)
        if event == .proceed, source.phase == .preSwitchover { standsStillSince = now }
        for action in source.handle(event, at: now) { perform(action) }
        trace("source      \(source.phase)")
    }

    private func perform(_ action: SourceAction) {
        if case .send(let bytes) = action {
            trace("source   -> send \(bytes.count) bytes")
        } else {
            trace("source   -> \(action)")
        }
        if performMove(action) { return }
        switch action {
        case .connect: connect()
        case .send(let bytes): sourceSends(bytes)
        case .startTracking:
            perform(.source, 10 * microsecond, 5 * millisecond) { [self] in
                feedSource(.trackingStarted)
            } failure: { [self] in
                feedSource(.trackingFailed("tracking is not available"))
            }
        case .collect(let final): collect(final)
        case .sendRound(let final, let batches, _):
            round = SimulatedRound(final: final, batches: batches, began: now)
            schedule(after: microsecond, 50 * microsecond) { [self] in batch() }
        case .interruptRound:
            round?.endsEarly = true
            wakeBatch()
        case .abandon: abandon()
        case .paused: paused()
        case .rewind: rewind()
        case .bidFarewell(let bytes): bidFarewell(bytes)
        case .stopGuest:
            standsStillSince = now
            stopGuest()
        case .brokeOff: brokeOff()
        case .resumeGuest: resumeGuest()
        case .giveUpRightToRun: sourceOwnsGuest = false
        case .regainRightToRun: sourceOwnsGuest = true
        case .saveState: saveState()
        // Pages are not verified here.
        case .sendRoot, .sendDigests: break
        case .flush: flush()
        case .close: closeSource()
        case .setTimer(let timer, let nanoseconds): setSourceTimer(timer, nanoseconds)
        case .cancelTimer(let kind): sourceTimers[kind] = nil
        case .report(let status):
            checkOrder(status)
            guard status == .preSwitchover else { return }
            schedule(after: plan.proceedsAfter, plan.proceedsAfter * 2) { [self] in feedSource(.proceed) }
        case .finished(let outcome): finished(outcome)
        case .stopTracking, .synchronizeChannels, .skip, .agreed, .refused: break
        // Performed above.
        case .openUrgentChannel, .openUrgentChannels, .sendDiscards, .sendPackage, .serveRequests, .servePages,
            .takeBackPages, .prepareRecovery, .adoptBitmaps, .takeBackGuest, .releaseGuest:
            break
        }
    }

    private func setSourceTimer(_ timer: ProtocolTimer, _ nanoseconds: UInt64) {
        sourceTimers[timer.kind] = timer.generation
        if bug == .losesTimers { return }
        schedule(at: now + nanoseconds) { [self] in
            // A real timer may fire late by a hair: sometimes the shell tells one that was cancelled.
            guard sourceTimers[timer.kind] == timer.generation || generator.chance(0.1) else { return }
            feedSource(.timer(timer))
        }
    }

    // MARK: The connection

    private func connect() {
        attempts += 1
        let attempt = attempts
        schedule(after: plan.latency.lowerBound, plan.latency.upperBound * 2) { [self] in
            guard sourceIsAlive, attempt == attempts else { return }
            // The thread of the connection before is gone first.
            guard round == nil else { return connect() }
            let isFirst = connections.allSatisfy(\.isStranger)
            if source.phase == .reopening, generator.chance(plan.mistakes) { return connectToStranger() }
            guard findsDestination() else { return }
            if isFirst, plan.faults.contains(where: { if case .refusal = $0 { true } else { false } }) {
                return feedSource(.connectFailed("connection refused"))
            }
            guard destinationIsAlive, now >= networkIsSilentUntil else {
                return feedSource(.connectFailed("no route to the destination"))
            }
            let connection = SimulatedConnection(ConnectionID(UInt64(connections.count + 1)))
            if isFirst {
                prepareCuts(of: connection)
            } else if source.phase == .reopening, resumptions <= plan.furtherCuts.count {
                let cut = plan.furtherCuts[resumptions - 1]
                if cut.side == .destination {
                    connection.towardsDestination.bytesUntilCut = cut.bytes
                } else {
                    connection.towardsSource.bytesUntilCut = cut.bytes
                }
            }
            if source.phase == .recoverConnecting { prepareRecoveryCut(of: connection) }
            connections.append(connection)
            sourceConnection = connection
            sourceMessages = ReturnPathDecoder(postcopyOf: plan.postcopy == nil ? [] : map.blocks)
            sourceInput = ReceiveBuffer()
            destinationAccepts(connection)
            feedSource(.connected(plan.rule == .oneWay ? .oneWay : .bothWays))
        }
    }

    private func sourceSends(_ bytes: [UInt8]) {
        guard let connection = sourceConnection else { return }
        if source.phase >= .savingState { startTail(of: connection) }
        // A job that serves requests ends when there is another.
        if move.service == .requests { move.service = .nothing }
        send(bytes, on: connection, towards: .destination)
    }

    /// What a job of the sender writes.
    @discardableResult
    func sourceSendsOnMain(_ bytes: [UInt8]) -> Bool {
        guard let connection = sourceConnection else { return false }
        return send(bytes, on: connection, towards: .destination)
    }

    func sourceReads(_ bytes: [UInt8], on connection: SimulatedConnection) {
        if sourceIsAlive, urgentSourceReads(bytes, on: connection) { return }
        guard sourceIsAlive, connection === sourceConnection else { return }
        sourceInput.append(bytes)
        do {
            while connection === sourceConnection {
                if sourceMessages.payloadBytes > 0 {
                    guard takeBitmap() else { return }
                    continue
                }
                guard let message = try sourceMessages.next(from: &sourceInput) else { return }
                if tookBitmapHead(message) { continue }
                if case .pong(let value) = message, let mark = ResumptionMark(pong: value) {
                    acknowledged(mark)
                    continue
                }
                if tookRequest(message) { continue }
                feedSource(.received(message))
            }
        } catch {
            closeSource()
            feedSource(.disconnected("\(error)"))
        }
    }

    func sourceLoses(_ connection: SimulatedConnection, _ reason: String) {
        if sourceIsAlive, urgentSourceLoses(connection, reason) { return }
        guard sourceIsAlive, connection === sourceConnection else { return }
        sourceConnection = nil
        if plan.rule == .oneWay, source.phase == .closing { return }
        feedSource(.disconnected(reason))
    }

    private func closeSource() {
        closeUrgent()
        guard let connection = sourceConnection else { return }
        sourceConnection = nil
        close(connection, by: .source)
        // What a one-way transport's reader says at its end.
        guard plan.rule == .oneWay else { return }
        schedule(after: microsecond, millisecond) { [self] in
            let failed = plan.faults.contains { if case .cutTail = $0 { true } else { false } }
            feedSource(.closed(error: failed ? "exit status 1" : nil))
        }
    }

    private func flush() {
        schedule(after: 10 * microsecond, millisecond) { [self] in
            guard let connection = sourceConnection, !connection.isSilent else { return }
            feedSource(.flushed)
        }
    }

    // MARK: RAM

    private func collect(_ final: Bool) {
        perform(.source, 5 * microsecond, 2 * millisecond) { [self] in
            sourceGuest.collect(into: &pending, at: now)
            feedSource(.collected(remainingPages: UInt64(pending.count { $0 })))
        } failure: { [self] in
            feedSource(.trackingFailed("the dirty log cannot be read"))
        }
    }

    func batch() {
        guard sourceIsAlive, var current = round else { return }
        batchWaits = false
        // A peer that takes nothing: the write blocks after what the socket holds.
        if let connection = sourceConnection, connection.isSilent { return }
        if let connection = sourceConnection, now < connection.isHeldUntil,
            connection.towardsDestination.pending > Self.socketBytes
        {
            return schedule(at: connection.isHeldUntil) { [self] in batch() }
        }
        sourceGuest.advance(to: now)
        let dirty = pending.indices.filter { pending[$0] }.prefix(24)
        let isEarly = current.endsEarly || (!current.final && generator.chance(0.02))
        let isLost = bug == .losesFinalRound && current.final
        if dirty.isEmpty || isEarly || sourceConnection == nil || isLost {
            round = nil
            let report = RoundReport(
                pages: current.pages, bytes: current.bytes, nanoseconds: now - current.began,
                interrupted: !dirty.isEmpty && !isLost)
            return feedSource(.roundSent(report))
        }
        if mustWaitForMark() { return }
        let bytes = current.batches && generator.chance(0.8) ? batched(dirty) : single(dirty)
        stretch += dirty
        for page in dirty {
            pending[page] = false
            if bug == .clearsDirtyMarkLate { sourceGuest.forgetDirty(page) }
        }
        current.pages += UInt64(dirty.count)
        current.bytes += UInt64(bytes.count)
        round = current
        sourceSends(bytes + mark())
        let duration = max(UInt64(bytes.count) * second / plan.bytesPerSecond, microsecond)
        schedule(at: now + duration) { [self] in
            if bug == .clearsDirtyMarkLate {
                sourceGuest.advance(to: now)
                for page in dirty { sourceGuest.forgetDirty(page) }
            }
            batch()
        }
    }

    private func single(_ pages: ArraySlice<Int>) -> [UInt8] {
        var bytes: [UInt8] = []
        for page in pages {
            let (block, offset) = map.location(of: page)
            if sourceGuest.pages[page] == 0 {
                records.zeroPage(block: block, offset: offset, into: &bytes)
            } else {
                records.page(block: block, offset: offset, into: &bytes)
                bytes += SimulatedMemoryMap.contents(sourceGuest.pages[page])
            }
        }
        return bytes
    }

    private func batched(_ pages: ArraySlice<Int>) -> [UInt8] {
        var bytes: [UInt8] = []
        for block in map.blocks.indices {
            var runs: [PageRun] = []
            var contents: [UInt8] = []
            for page in pages where map.location(of: page).block == block {
                let offset = map.location(of: page).offset
                let kind: PageRunKind = sourceGuest.pages[page] == 0 ? .zero : .data
                if kind == .data { contents += SimulatedMemoryMap.contents(sourceGuest.pages[page]) }
                if let last = runs.last, last.kind == kind, last.offset + last.length == offset {
                    runs[runs.count - 1] = PageRun(kind: kind, offset: last.offset, pages: last.pages + 1)
                } else {
                    runs.append(PageRun(kind: kind, offset: offset, pages: 1))
                }
            }
            guard !runs.isEmpty else { continue }
            records.batch(block: block, runs: runs, into: &bytes)
            bytes += contents
        }
        return bytes
    }

    /// What a socket holds before a write blocks.
    private static let socketBytes = 20_000

    // MARK: The guest

    private func stopGuest() {
        stopIsUnderWay = true
        guestRanBeforeStop = sourceGuest.runs
        perform(.source, 10 * microsecond, 3 * millisecond) { [self] in
            guard stopIsUnderWay else { return feedSource(.guestStopped(wasRunning: guestRanBeforeStop)) }
            sourceGuest.stop(at: now)
            feedSource(.guestStopped(wasRunning: guestRanBeforeStop))
        } failure: { [self] in
            feedSource(.stopFailed("vCPU 0 does not stop"))
        }
    }

    func resumeGuest() {
        stopIsUnderWay = false
        if guestRanBeforeStop, !sourceGuest.runs { sourceGuest.run(at: now) }
    }

    /// A switchover was taken back: the guest must run on, and the migration with it.
    private func brokeOff() {
        brokenSwitchovers += 1
        lastReport = .setup
        if guestRanBeforeStop, !sourceGuest.runs { violate("a switchover was broken off, and the guest stands still") }
        if !source.mayRun { violate("a switchover was broken off without the right to run") }
    }

    private func saveState() {
        perform(.source, 10 * microsecond, 5 * millisecond) { [self] in
            sourceGuest.deviceState = now
            let clock = (0..<8).map { UInt8(truncatingIfNeeded: now >> (8 * UInt64($0))) }
            feedSource(
                .stateSaved([
                    DeviceSection(name: "cpu", version: 3, body: clock + clock),
                    DeviceSection(name: "clock", version: 1, body: clock),
                ]))
        } failure: { [self] in
            feedSource(.stateFailed("vCPU 0 does not give its state"))
        }
    }

    // MARK: The operator

    private func finished(_ outcome: SourceOutcome) {
        sourceOutcomes.append(outcome)
        guard case .unsettled = outcome else { return }
        doubts += 1
        schedule(after: millisecond, 60 * second) { [self] in
            guard source.phase == .unsettled else { return }
            guard doubts <= 4, source.rule == .twoPhase else { return operatorLooks() }
            feedSource(.settle(.askDestination))
            // An impatient one does not wait for the answer.
            schedule(after: millisecond, 2 * second) { [self] in operatorLooks() }
        }
    }

    /// The operator goes and looks at the destination, as often as it takes.
    private func operatorLooks() {
        guard sourceIsAlive, source.status == .unsettled else { return }
        if destinationIsAlive, destination.phase >= .pulling, destination.phase < .failed {
            return feedSource(.settle(.startedThere))
        }
        // Without two phases the destination may wait on a silent connection for good: it is ended by hand.
        if plan.rule != .twoPhase { feedDestination(.giveUp) }
        if !destinationIsAlive || destination.phase == .failed || destinationEpoch > 0 {
            return feedSource(.settle(.resumeHere))
        }
        // A start that never answers leaves nothing to find out.
        if destination.phase == .starting, startHangs { return }
        schedule(at: now + 10 * second) { [self] in operatorLooks() }
    }

    private func plantResume(_ event: SourceEvent) {
        guard bug == .resumesAfterAcknowledgement, case .disconnected = event else { return }
        guard source.phase == .committed || source.phase == .acknowledged else { return }
        resumeGuest()
    }
}
