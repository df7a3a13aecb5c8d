import Migration
import MigrationStream

/// What the destination's shell keeps for one connection: the decoder and the payload it is about to place.
struct SimulatedReader {
    let connection: SimulatedConnection
    var decoder: StreamDecoder
    var input = ReceiveBuffer()
    /// Pages whose contents are still to be read, in order.
    var awaited: [Int] = []
    var payload: [UInt8] = []
}

// The destination's shell.

extension Simulator {
    func feedDestination(_ event: DestinationEvent) {
        guard destinationIsAlive, violation == nil else { return }
        trace("  destination <- \(event)")
        for action in destination.handle(event, at: destinationClock) { perform(action) }
        trace("  destination    \(destination.phase)")
    }

    private var destinationClock: UInt64 { bug == .stopsTheClock ? 0 : now }

    private func perform(_ action: DestinationAction) {
        trace("  destination -> \(action)")
        switch action {
        case .send(let id, let bytes):
            guard let reader = readers[id] else { return }
            send(bytes, on: reader.connection, towards: .source)
        case .close(let id):
            guard let reader = readers.removeValue(forKey: id) else { return }
            close(reader.connection, by: .destination)
        case .loadState(let sections): loadState(sections)
        // Pages are not verified here.
        case .verify, .compareRoot, .compareDigests: break
        case .startGuest(let running, let moment):
            destinationOwnsGuest = true
            let longest = bug == .startsLate ? second : 5 * millisecond
            perform(.destination, bug == .startsLate ? 5 * millisecond : 10 * microsecond, longest) { [self] in
                if let moment, destinationClock > moment, bug != .startsLate {
                    destinationOwnsGuest = false
                    return feedDestination(.startedTooLate)
                }
                checkContract()
                destinationRuns(running)
            } failure: { [self] in
                destinationOwnsGuest = false
                feedDestination(.startFailed("KVM_RUN fails"))
            }
        case .setTimer(let timer, let nanoseconds):
            destinationTimers[timer.kind] = timer.generation
            let epoch = destinationEpoch
            schedule(at: now + nanoseconds) { [self] in
                guard epoch == destinationEpoch else { return }
                guard destinationTimers[timer.kind] == timer.generation || generator.chance(0.1) else { return }
                feedDestination(.timer(timer))
            }
        case .cancelTimer(let kind): destinationTimers[kind] = nil
        case .finished(let outcome): destinationOutcomes.append(outcome)
        case .awaitReaders(let ids):
            let epoch = destinationEpoch
            schedule(after: microsecond, 10 * millisecond) { [self] in
                if epoch == destinationEpoch { feedDestination(.readersEnded(ids)) }
            }
        case .keeps: kept()
        // No source switches to postcopy here.
        case .preparePostcopy, .discardPages, .listen, .finishPull, .endPostcopy, .unlisten, .pullPaused, .drop: break
        case .report, .agreed, .admit, .turnedAway: break
        }
    }

    private func loadState(_ sections: [DeviceSection]) {
        if bug == .startsBeforeStateIsComplete {
            destinationOwnsGuest = true
            destinationRuns(true)
        }
        perform(.destination, 10 * microsecond, 10 * millisecond) { [self] in
            guard destination.phase == .loading else { return }
            loads += 1
            if bug == .keepsOldState, loads > 1 { return feedDestination(.stateLoaded(nanoseconds: 1000)) }
            let clock = sections.first { $0.name == "clock" }?.body ?? []
            destinationGuest.deviceState = clock.reversed().reduce(0) { $0 << 8 | UInt64($1) }
            feedDestination(.stateLoaded(nanoseconds: 1000))
        } failure: { [self] in
            feedDestination(.loadFailed("device 'cpu' refuses its state"))
        }
    }

    /// The guest starts: the limit must not have passed, whatever the network did.
    private func checkContract() {
        guard source.features.contains(.retraction), guestRanBeforeStop, let since = standsStillSince else { return }
        let limit = source.configuration.switchover.downtimeLimitNanoseconds
        guard limit > 0, now - since > limit else { return }
        violate("the guest starts after a standstill of \((now - since) / 1000) us, \(limit / 1000) us are allowed")
    }

    /// The switch: everything must be here now.
    private func destinationRuns(_ running: Bool) {
        guard destinationIsAlive else { return }
        destinationStarts += 1
        if destinationStarts > 1 { violate("the destination started the guest twice") }
        // By QEMU's rule a source that lost the connection has gone on meanwhile: what arrives late is what it was before.
        let isOutdated = plan.rule == .qemu && sourceOwnsGuest
        if destinationGuest.pages != sourceGuest.pages, !isOutdated {
            let wrong = destinationGuest.pages.indices.filter { destinationGuest.pages[$0] != sourceGuest.pages[$0] }
            violate("\(wrong.count) pages differ at the switch, the first is page \(wrong.first ?? 0)")
        }
        if destinationGuest.deviceState != sourceGuest.deviceState { violate("device state differs at the switch") }
        if running != guestRanBeforeStop { violate("the guest is \(running ? "running" : "paused") unlike before") }
        if running { destinationGuest.run(at: now) }
        checkInvariants()
        feedDestination(.guestStarted(nanoseconds: 500))
    }

    // MARK: Reading

    func destinationAccepts(_ connection: SimulatedConnection) {
        guard destinationIsAlive else { return }
        let decoder = StreamDecoder(.load(blocks: map.blocks, catalogue: Self.catalogue))
        readers[connection.id] = SimulatedReader(connection: connection, decoder: decoder)
        feedDestination(.accepted(connection.id, answers: connection.isStranger || plan.rule != .oneWay))
    }

    func destinationReads(_ bytes: [UInt8], on connection: SimulatedConnection) {
        let id = connection.id
        guard destinationIsAlive else { return }
        readers[id]?.input.append(bytes)
        do {
            while violation == nil, var reader = readers.removeValue(forKey: id) {
                // Taken out and put back, so that its buffer is never copied.
                let item = try next(&reader)
                readers[id] = reader
                guard let item else { return }
                if isPlaced(item, from: id) { continue }
                feedDestination(.item(id, item))
            }
        } catch {
            readers[id] = SimulatedReader(connection: connection, decoder: StreamDecoder(.describe(catalogue: .init())))
            feedDestination(.rejected(id, "\(error)"))
        }
    }

    func destinationLoses(_ connection: SimulatedConnection, _ reason: String) {
        guard destinationIsAlive, readers[connection.id] != nil else { return }
        feedDestination(.disconnected(connection.id, reason))
    }

    private func next(_ reader: inout SimulatedReader) throws(StreamError) -> StreamItem? {
        if reader.decoder.payloadBytes > 0 {
            let count = min(reader.decoder.payloadBytes, reader.input.count)
            var piece = [UInt8](repeating: 0, count: count)
            let moved = unsafe piece.withUnsafeMutableBytes { unsafe reader.input.move(to: $0) }
            reader.decoder.payloadConsumed(moved)
            place(piece, &reader)
            if reader.decoder.payloadBytes > 0 { return nil }
        }
        return try reader.decoder.next(from: &reader.input)
    }

    private func place(_ piece: [UInt8], _ reader: inout SimulatedReader) {
        guard !reader.awaited.isEmpty else { return }
        reader.payload += piece
        var start = 0
        while reader.payload.count - start >= 4096, let page = reader.awaited.first {
            reader.awaited.removeFirst()
            if let value = SimulatedMemoryMap.value(reader.payload[start..<(start + 4096)]) {
                destinationGuest.place(value, at: page)
            } else {
                violate("page \(page) arrived with contents that are not a page's")
            }
            start += 4096
        }
        reader.payload.removeFirst(start)
    }

    /// Pages go around the core.
    private func isPlaced(_ item: StreamItem, from id: ConnectionID) -> Bool {
        guard destination.takesPages(on: id) else { return false }
        switch item {
        case .page(let block, let offset):
            readers[id]?.awaited = [map.page(block: block, offset: offset)]
        case .zeroPage(let block, let offset):
            destinationGuest.place(0, at: map.page(block: block, offset: offset))
        case .pageBatch(let block, let runs):
            for run in runs {
                for index in 0..<Int(run.pages) {
                    let page = map.page(block: block, offset: run.offset) + index
                    if run.kind == .zero {
                        destinationGuest.place(0, at: page)
                    } else {
                        readers[id]?.awaited.append(page)
                    }
                }
            }
        default: return false
        }
        return true
    }
}
