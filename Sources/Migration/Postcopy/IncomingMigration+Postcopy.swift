import Host
import Machine
import MigrationStream
import Synchronization
import Transport

// Postcopy in the destination's shell. The core's lock is never held by anybody who waits for guest memory: state is loaded, and the
// guest started, on a thread of their own.

extension IncomingMigration {
    /// Whether pages of a guest that runs here are missing.
    var isPulling: Bool { [.postcopyActive, .postcopyPaused, .postcopyRecover].contains(info().status) }

    var postcopy: IncomingPostcopy? { postcopies.withLock { $0 } }

    /// From LISTEN on. - Returns: as `perform` does.
    func performPulling(_ action: DestinationAction) -> DestinationEvent? {
        switch action {
        case .loadState(let sections):
            return aside("migration-load", or: { .loadFailed($0) }) { [self] in
                _ = HostThread.runBeforeOthers()
                return load(sections)
            }
        case .startGuest(let running, let moment):
            return aside("migration-start", or: { .startFailed($0) }) { [self] in start(running, by: moment) }
        default: return perform(action)
        }
    }

    func performPostcopy(_ action: DestinationAction) -> DestinationEvent? {
        do throws(SystemError) {
            switch action {
            case .preparePostcopy: try prepare()
            case .discardPages(let discard): try postcopy?.discard(discard)
            case .listen: try postcopy?.listen(asksWholePages: statistics.info().rule == .qemu)
            case .finishPull(let waits):
                // At the end of the process nothing is missed.
                return aside("migration-end", or: { _ in .pullEnded(missing: 1) }) { [self] in
                    .pullEnded(missing: postcopy?.finish(waits: waits) ?? 0)
                }
            case .endPostcopy:
                guard let ended = postcopies.withLock({ $0.take() }) else { return nil }
                return aside("migration-end", or: { _ in nil }) { [machine] in
                    ended.forsake { machine.retire() }
                    return nil
                }
            case .unlisten(let closed):
                return aside("migration-end", or: { .pagesFailed("postcopy: \($0)") }) { [self] in unlisten(closed) }
            case .pullPaused(let sentence):
                statistics.end(error: sentence)
                report(.notice(sentence))
            default: break
            }
            return nil
        } catch { return .pagesFailed("postcopy: \(error.description)") }
    }

    private func prepare() throws(SystemError) {
        let postcopy = try IncomingPostcopy(
            machine.memory, machine.accelerator,
            blockTime: measuresBlockTime ? BlockTime(threads: machine.cpuThreadIDs) : nil,
            guestThreads: pageLatencyTargetMicroseconds > 0 ? machine.cpuThreadIDs : nil,
            quiet: { [populating] in populating.close() },
            request: { [weak self] in self?.ask(for: $0) }, hugeShare: { [statistics] in statistics.isHuge($0) },
            failed: { [weak self] in self?.post(.pagesFailed($0)) })
        postcopies.withLock { $0 = postcopy }
        statistics.watch(postcopy.pending)
    }

    /// The guest does not start yet: what was discarded comes again, as in precopy.
    private func unlisten(_ closed: [ConnectionID]) -> DestinationEvent {
        if let postcopy {
            do throws(SystemError) { try postcopy.abandon() } catch {
                return .pagesFailed(
                    "postcopy was taken back, and memory cannot be made huge again, which leaves holes in it: "
                        + error.description)
            }
            // A page of zeroes must clear what came meanwhile.
            postcopy.pending.forEachExpected { received.mark($0, of: $1) }
        }
        // The guest did not run: there is nothing to be given back.
        let recorder = recorders.withLock { $0.take() }
        recorder?.end()
        waitForReaders(of: closed)
        do throws(SystemError) {
            try prepare()
            if recorder != nil, let failure = prepareEpochs() { return failure }
            return .unlistened
        } catch { return .pagesFailed("postcopy: \(error.description)") }
    }

    /// Does something that may take long on a thread of its own.
    private func aside(
        _ name: String, or failed: (String) -> DestinationEvent?, _ body: @escaping @Sendable () -> DestinationEvent?
    ) -> DestinationEvent? {
        do throws(SystemError) {
            _ = try HostThread.detached(name: name) { [self] in
                if let event = body() { post(event) }
            }
            return nil
        } catch { return failed(error.description) }
    }

    // MARK: Requests

    /// On the thread that serves faults: under no lock but that of the words.
    private func ask(for requests: [PageRequest]) {
        statistics.asked(for: UInt64(requests.count))
        // Without a source the pages stay asked for: there is nobody who could be told. Nor is there while a new one does not go on yet.
        guard let main = postcopySource.withLock({ $0 }), isOpen(main) else { return }
        for (id, requests) in urgents.route(requests) ?? [(main, requests)] {
            var writer = StreamWriter()
            for request in requests { writer.message(.postcopy(.requestPages(request))) }
            if let reason = say(writer.bytes, on: id) { post(.disconnected(id, reason)) }
        }
    }

    // MARK: Reading

    /// The core has heard of the command. - Returns: false: the connection goes no further.
    func read(
        _ command: PostcopyCommand, _ channel: Channel, _ id: ConnectionID, _ receiver: inout PageReceiver
    ) throws -> Bool {
        switch command {
        case .packaged: return try isOpen(id) && readPackage(id, with: &receiver)
        case .receiveBitmap(let block): if isRecovering(id) { try tellReceived(block, on: channel) }
        case .resume: if isOpen(id), !isRecovering(id) { try goOn(id, &receiver) }
        default: break
        }
        return true
    }

    /// The package of a source that switches: all of it is here before any of it counts. - Returns: false: it goes no further.
    func readPackage(_ id: ConnectionID, with receiver: inout PageReceiver) throws -> Bool {
        for item in try receiver.package() {
            if item == .command(.postcopy(.listen)) {
                postcopySource.withLock { $0 = id }
                recoveryDecoder.withLock { $0 = receiver.decoderForRecovery }
            }
            post(.item(id, item))
            guard isOpen(id) else { return false }
            if item == .command(.postcopy(.listen)) {
                receiver.placer = try postcopy?.placer(inOrder: true)
            }
        }
        return true
    }

    /// A Godwit's channel, behind its greeting.
    func readUrgentChannel(
        _ channel: Channel, _ id: ConnectionID, _ greeting: MultifdGreeting, behind first: ReceiveBuffer
    ) {
        urgents.greeted(id)
        post(.greeted(id, greeting))
        recognized(id)
        guard urgents.waitForAdmission(id) else { return }
        if urgents.isNet(id) { return readNet(channel, id, behind: first) }
        // Nothing was asked for yet.
        guard first.isEmpty else { return post(.rejected(id, "it sends pages that nobody waits for")) }
        HostThread.renameCurrent("postcopy-recv-\(greeting.channel + 1)")
        if pageLatencyTargetMicroseconds > 0 { HostThread.runUrgently(among: machine.cpuThreadIDs.count) }
        readRequestedPages(channel, id, behind: [], isAdmitted: true, lastWordsNanoseconds: Self.lastWordsNanoseconds)
    }

    /// A channel for requested pages: records from the first byte on.
    /// - Parameter lastWordsNanoseconds: so long what the main connection says goes before the end of this one.
    func readRequestedPages(
        _ channel: Channel, _ id: ConnectionID, behind first: [UInt8], isAdmitted: Bool = false,
        lastWordsNanoseconds: UInt64 = 0
    ) {
        recognized(id)
        var isAdmitted = isAdmitted
        do {
            var receiver = PageReceiver(
                channel, behind: first, memory: machine.memory, decoder: .requestedPages(of: blocks),
                received: received,
                statistics: statistics)
            receiver.isCounted = true
            var progress = ProgressTeller()
            while let item = try receiver.next() {
                // Not before its first record makes sense: there is no greeting, and a stranger's noise must not cost the migration.
                if !isAdmitted {
                    post(.cameForUrgentPages(id))
                    guard isOpen(id) else { return }
                    HostThread.renameCurrent("postcopy-recv-1")
                    if pageLatencyTargetMicroseconds > 0 { HostThread.runUrgently(among: machine.cpuThreadIDs.count) }
                    isAdmitted = true
                }
                if item == .ramRecordsEnded { return post(.urgentEnded(id)) }
                if receiver.placer == nil {
                    guard acceptsPages(on: id), let postcopy else {
                        return post(.rejected(id, "it sends pages that nobody waits for"))
                    }
                    receiver.placer = try postcopy.placer(inOrder: false)
                }
                try receiver.place(item)
                if progress.isDue() { post(.progressed(id)) }
                guard isOpen(id) else { return }
            }
            if receiver.failure == nil, urgents.waitUntilClosed(id, nanoseconds: lastWordsNanoseconds) { return }
            post(
                receiver.failure.map { .rejected(id, $0.description) }
                    ?? .disconnected(id, "the source closed the connection"))
        } catch {
            if urgents.waitUntilClosed(id, nanoseconds: lastWordsNanoseconds) { return }
            post(.disconnected(id, "\(error)"))
        }
    }

    private static let lastWordsNanoseconds: UInt64 = 200_000_000
}
