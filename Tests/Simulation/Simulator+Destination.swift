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
    /// A channel for requested pages that has not said what it is.
    var isGreeting = false
    /// What it is shows in its first bytes.
    var isRecognized = true
    /// It waits for something before it reads on.
    var isBlocked = false
    /// The package that is being read.
    var package: (decoder: StreamDecoder, bytes: [UInt8])?
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
        if performPull(action) { return }
        switch action {
        case .send(let id, let bytes):
            guard let reader = readers[id] else { return }
            send(bytes, on: reader.connection, towards: .source)
        case .close(let id):
            guard let reader = readers.removeValue(forKey: id) else { return }
            netCloses(id)
            if let number = pull.channels.firstIndex(of: id) { pull.channels[number] = nil }
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
                if plan.postcopy == nil || moment != nil { checkContract() }
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
        // Performed above.
        case .preparePostcopy, .discardPages, .listen, .finishPull, .endPostcopy, .unlisten, .pullPaused, .drop,
            .admitNet, .prepareEpochs, .armEpochs, .goOnWithEpochs, .holdEpochs, .sayStays, .endEpochs:
            break
        case .report, .agreed, .admit, .admitUrgent, .turnedAway: break
        }
    }

    private func loadState(_ sections: [DeviceSection]) {
        if bug == .startsBeforeStateIsComplete {
            destinationOwnsGuest = true
            destinationRuns(true)
        }
        perform(.destination, 10 * microsecond, 10 * millisecond) { [self] in
            // Nobody wants it any more, and hears that it is over.
            guard destination.phase == .loading else { return feedDestination(.stateLoaded(nanoseconds: 1000)) }
            loads += 1
            if bug == .keepsOldState, loads > 1 { return feedDestination(.stateLoaded(nanoseconds: 1000)) }
            let clock = sections.first { $0.name == "clock" }?.body ?? []
            destinationGuest.deviceState = clock.reversed().reduce(0) { $0 << 8 | UInt64($1) }
            afterTouches { [self] in feedDestination(.stateLoaded(nanoseconds: 1000)) }
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
        let wrong = destinationGuest.pages.indices.filter {
            destinationGuest.pages[$0] != sourceGuest.pages[$0] && !pull.isMissing($0)
        }
        if !wrong.isEmpty, !isOutdated {
            violate("\(wrong.count) pages differ at the switch, the first is page \(wrong.first ?? 0)")
        }
        if destinationGuest.deviceState != sourceGuest.deviceState { violate("device state differs at the switch") }
        if running != guestRanBeforeStop { violate("the guest is \(running ? "running" : "paused") unlike before") }
        if running { destinationGuest.run(at: now) }
        checkInvariants()
        if pull.isListening { runPulledGuest() }
        feedDestination(.guestStarted(nanoseconds: 500))
    }

    // MARK: Reading

    func destinationAccepts(_ connection: SimulatedConnection, isUrgent: Bool = false) {
        guard destinationIsAlive else { return }
        var decoder = StreamDecoder(.load(blocks: map.blocks, catalogue: Self.catalogue))
        decoder.allowsPostcopy = true
        readers[connection.id] = SimulatedReader(
            connection: connection, decoder: isUrgent ? .requestedPages(of: map.blocks) : decoder, isGreeting: isUrgent,
            isRecognized: plan.rule != .qemu || connection.isStranger)
        feedDestination(.accepted(connection.id, answers: connection.isStranger || plan.rule != .oneWay))
    }

    func destinationReads(_ bytes: [UInt8], on connection: SimulatedConnection) {
        let id = connection.id
        guard destinationIsAlive else { return }
        readers[id]?.input.append(bytes)
        do {
            guard try greets(id), isRecognized(id), try !netDestinationReads(id) else { return }
            while violation == nil, readers[id]?.isBlocked == false, var reader = readers.removeValue(forKey: id) {
                // Taken out and put back, so that its buffer is never copied.
                let item = try next(&reader)
                readers[id] = reader
                for item in packaged.removeValue(forKey: id) ?? [] {
                    feedDestination(.item(id, item))
                    guard item == .command(.postcopy(.listen)) else { continue }
                    recoveryDecoder = reader.decoder
                    recoveryDecoder?.connectionReplaced()
                }
                guard let item else { return }
                if isPlaced(item, from: id) { continue }
                if case .command(.postcopy(.packaged)) = item {
                    readers[id]?.package = (reader.decoder.packageDecoder(), [])
                    pull.main = id
                }
                feedDestination(.item(id, item))
                if case .command(.postcopy(let command)) = item { recover(command, on: id) }
                if case .command(.resume) = item { awaitClaims(id) }
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

    /// - Returns: whether there is more to be read than a greeting.
    private func greets(_ id: ConnectionID) throws(StreamError) -> Bool {
        guard var reader = readers.removeValue(forKey: id) else { return false }
        guard reader.isGreeting else {
            readers[id] = reader
            return true
        }
        let greeting = try MultifdGreeting(from: &reader.input)
        reader.isGreeting = greeting == nil
        readers[id] = reader
        guard let greeting else { return false }
        feedDestination(.greeted(id, greeting))
        // What a safety net brings waits until it is known to be one.
        if plan.postcopy?.hasNet == true, net.link != id, let mark = greeting.mark,
            Int(greeting.channel) == mark.channels - 1
        {
            readers[id]?.isBlocked = true
        }
        return true
    }

    /// A package is looked at when all of it is here.
    private func take(
        _ piece: [UInt8], of package: (decoder: StreamDecoder, bytes: [UInt8]), _ reader: inout SimulatedReader
    ) {
        var package = package
        package.bytes += piece
        guard reader.decoder.payloadBytes == 0 else { return reader.package = package }
        reader.package = nil
        var buffer = ReceiveBuffer()
        buffer.append(package.bytes)
        let id = reader.connection.id
        do {
            var items: [StreamItem] = []
            while let item = try package.decoder.next(from: &buffer) { items.append(item) }
            packaged[id] = items
        } catch { violate("the package is not understood: \(error)") }
    }

    private func next(_ reader: inout SimulatedReader) throws(StreamError) -> StreamItem? {
        if reader.decoder.payloadBytes > 0 {
            let count = min(reader.decoder.payloadBytes, reader.input.count)
            var piece = [UInt8](repeating: 0, count: count)
            let moved = unsafe piece.withUnsafeMutableBytes { unsafe reader.input.move(to: $0) }
            reader.decoder.payloadConsumed(moved)
            if let package = reader.package { take(piece, of: package, &reader) } else { place(piece, &reader) }
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
                if !pulled(value, page) { destinationGuest.place(value, at: page) }
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
            let page = map.page(block: block, offset: offset)
            if !pulled(0, page) { destinationGuest.place(0, at: page) }
        case .pageBatch(let block, let runs):
            for run in runs {
                for index in 0..<Int(run.pages) {
                    let page = map.page(block: block, offset: run.offset) + index
                    if run.kind == .zero {
                        if !pulled(0, page) { destinationGuest.place(0, at: page) }
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
