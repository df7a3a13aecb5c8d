import GuestMemory
import Host
import Machine
import MigrationStream
import Synchronization
import Transport

/// The shell around `DestinationCore`: one thread that accepts, one per connection that reads, one for timers.
///
/// The core is behind a lock: whoever has an event hands it in and performs the answer before the next event. So a reader knows, when
/// it goes on, what became of what it read. Pages do not pass through here: `PageReceiver` puts them into guest memory.
final class IncomingMigration: Sendable {
    let machine: VirtualMachine
    /// Another one after `migrate-recover`.
    private let listening: Mutex<Listener>
    private var listener: Listener { listening.withLock { $0 } }
    let mapped: MappedRAMReader.Plan
    let measuresBlockTime: Bool
    let pageLatencyTargetMicroseconds: UInt64
    let postcopyEpochMilliseconds: UInt64
    let report: @Sendable (MigrationEvent) -> Void
    let statistics: IncomingStatistics
    let blocks: [RAMBlockDescription]
    let received: ReceivedPages
    let populating: PopulateAhead
    /// Where the channels of multifd and the main one wait for each other.
    let barrier: IncomingChannels
    /// Of the migration under way, from ADVISE on.
    let postcopies = Mutex<IncomingPostcopy?>(nil)
    /// Gives the guest back to its source, if that is to be able to take it.
    let recorders = Monitor<EpochRecorder?>(nil)
    /// The connection on which pages are asked for.
    let postcopySource = Mutex<ConnectionID?>(nil)
    /// A Godwit source's channels for requested pages.
    let urgents = UrgentConnections()
    /// How the words of another connection are read that goes on with postcopy.
    let recoveryDecoder = Mutex<StreamDecoder?>(nil)
    private let verifications = Mutex<IncomingVerification?>(nil)
    private let handshakes = HandshakeQueue()
    private let answers = AnswerQueue()
    /// How the connections of this migration are secured, as far as it was told.
    private let toldSecurity = Mutex<Set<String>>([])

    private struct State {
        var core: DestinationCore
        var connectionCount: UInt64 = 0
        var isOver = false
        /// The thread that reads the source has been given priority: the guest stands still.
        var isUrgent = false
    }
    private let state: Mutex<State>
    /// Connections that a thread reads.
    private let readers = Monitor<Set<ConnectionID>>([])
    /// Connections that have not said yet what they are.
    private let strangers = Monitor<Set<ConnectionID>>([])
    /// Under a lock of their own: they can be cancelled while the core is busy sending to one of them.
    private let channels = Mutex<[ConnectionID: Channel]>([:])
    /// How long a peer may keep the end of the process waiting, by not taking what it is told.
    private static let farewellNanoseconds: UInt64 = 1_000_000_000
    /// Until a listener that lacks descriptors or memory tries again.
    private static let acceptPauseNanoseconds: UInt64 = 100_000_000
    /// How long a connection that says nothing may hold up a source that is no Godwit, once.
    private static let hearingNanoseconds: UInt64 = 3_000_000_000
    /// How long an arrived guest's process answers where the migration came in.
    private static let answeringNanoseconds: UInt64 = 60_000_000_000
    /// So long lost connections' threads may take to notice.
    private static let quietSeconds: UInt64 = 20
    /// So long the vCPUs of a guest that has arrived are in a hurry: what they touch first is slow, and others may be many.
    private static let hasteNanoseconds: UInt64 = 50_000_000
    private let timers = Monitor<[ProtocolTimer.Kind: (timer: ProtocolTimer, deadline: Deadline)]>([:])

    init(
        _ machine: VirtualMachine, on address: MigrationAddress, startsGuest: Bool,
        capabilities: Set<MigrationCapability>, parameters: MigrationParameters, multifdChannels: Int?,
        tls: TLSSettings?, allowsPlaintext: Bool, descriptors: @escaping DescriptorResolver,
        mapped: MappedRAMReader.Plan,
        report: @escaping @Sendable (MigrationEvent) -> Void
    ) throws(MigrationError) {
        self.machine = machine
        self.report = report
        self.mapped = mapped
        pageLatencyTargetMicroseconds = parameters.pageLatencyTargetMicroseconds
        postcopyEpochMilliseconds = parameters.postcopyEpochMilliseconds
        measuresBlockTime = capabilities.contains(.postcopyBlocktime)
        let listener: Listener
        do throws(ChannelError) {
            listener = try Listener(
                on: address, tls: tls, allowsPlaintext: allowsPlaintext, descriptors: descriptors)
        } catch { throw MigrationError(error.description) }
        listening = Mutex(listener)
        do throws(SystemError) { received = try ReceivedPages(machine.memory) } catch {
            throw MigrationError(error.description)
        }
        populating = PopulateAhead(machine.memory, received: received)
        blocks = machine.memory.blocks.map {
            RAMBlockDescription(name: $0.name, length: $0.byteCount, pageSize: $0.pageBytes)
        }
        statistics = IncomingStatistics(
            totalBytes: machine.memory.byteCount, listening: listener.addresses.map(ListeningAddress.init))
        var configuration = DestinationConfiguration(
            instance: .random(), machineName: machine.configuration.streamName,
            sections: machine.sections.map {
                ExpectedSection(name: $0.name, instance: $0.instance, required: $0.isRequired)
            },
            startsGuest: startsGuest)
        configuration.acknowledgesSwitchover = capabilities.contains(.switchoverAck)
        configuration.multifdChannels = multifdChannels
        configuration.uuid = machine.configuration.uuid.map(MigrationIdentifier.init)
        configuration.features.insert(.verification)
        if case .file = address { configuration.readsMappedRAM = true }
        configuration.allowsPostcopy = capabilities.contains(.postcopyRAM)
        configuration.blockPageSizes = machine.memory.blocks.reduce(0) { $0 | $1.pageBytes }
        if configuration.allowsPostcopy { configuration.features.insert(.postcopy) }
        if capabilities.contains(.postcopySafetyNet) { configuration.features.insert(.safetyNet) }
        barrier = IncomingChannels(stallNanoseconds: configuration.deadlines.stall)
        state = Mutex(State(core: DestinationCore(configuration)))
    }

    func start() throws(MigrationError) {
        do throws(SystemError) {
            try acceptConnections(on: listener)
            _ = try HostThread(name: "migration-time") { [self] in serveTimers() }
        } catch { throw MigrationError(error.description) }
    }

    private func acceptConnections(on listener: Listener) throws(SystemError) {
        _ = try HostThread(name: "migration-list") { [self] in
            while let channel = nextChannel(of: listener) { take(channel, from: listener) }
        }
    }

    /// From now on the source may come there, and where it could come before no more (`migrate-recover`).
    func listen(_ make: () throws(ChannelError) -> Listener) throws(MigrationError) {
        // The address may be the same.
        listener.close()
        do {
            let next = try make()
            listening.withLock { $0 = next }
            statistics.listens(at: next.addresses.map(ListeningAddress.init))
            post(.awaitRecovery)
            try acceptConnections(on: next)
        } catch { throw MigrationError("migrate-recover: \(error)") }
    }

    func info() -> MigrationInfo {
        var info = statistics.info()
        info.safetyNet = recorder?.figures
        return info
    }

    /// The process ends: the guest will never start here.
    func giveUp() {
        recorder?.forsake()
        _ = try? HostThread.detached(name: "migration-bye") { [self] in
            Clock.sleep(nanoseconds: Self.farewellNanoseconds)
            for channel in channels.withLock({ Array($0.values) }) { channel.cancel() }
            // Whoever sleeps for a page that does not come any more would keep the process from ending.
            postcopy?.forsake { machine.retire() }
        }
        post(.giveUp)
        listener.close()
    }

    /// What is kept of a migration whose source was lost is given up; without such, nothing happens.
    func discard() { post(.discard) }

    // MARK: Threads

    private func take(_ channel: Channel, from listener: Listener) {
        let id = state.withLock { state in
            state.connectionCount += 1
            return ConnectionID(state.connectionCount)
        }
        channels.withLock { $0[id] = channel }
        barrier.opened(id)
        // Nobody is a visitor before the handshake; but who alone can come is one at once, or nobody would be waited for.
        readers.withLock { _ = $0.insert(id) }
        strangers.withLock { _ = $0.insert(id) }
        let isVisitor = !channel.awaitsHandshake || listener.bringsOneChannel
        if isVisitor { post(.accepted(id, answers: channel.kind == .socket)) }
        // Here, and not when its thread comes to it: whoever has waited longest goes before another thread is there.
        if channel.awaitsHandshake { handshakes.enter(id, channel) }
        do throws(SystemError) {
            _ = try HostThread(name: "migration-recv") { [self] in
                defer {
                    recognized(id)
                    readers.withLock { _ = $0.remove(id) }
                }
                guard shakeHands(channel, id, isVisitor: isVisitor) else { return }
                recognize(channel, id)
            }
        } catch {
            readers.withLock { _ = $0.remove(id) }
            recognized(id)
            handshakes.leave(id)
            forget(id)
            post(.disconnected(id, error.description))
            channel.cancel()
        }
    }

    func recognized(_ id: ConnectionID) { strangers.withLock { _ = $0.remove(id) } }

    /// A QEMU does not say how many channels it has, but it has connected and greeted on all of them before its first pages are complete:
    /// whoever is there by then is heard before it goes on, so that one channel too many is noticed and its pages are not missed.
    func hearStrangers() {
        guard state.withLock({ !$0.core.knowsChannels }) else { return }
        let end = Deadline.after(nanoseconds: Self.hearingNanoseconds)
        while listener.hasConnectionWaiting, !end.hasPassed { Clock.sleep(nanoseconds: 1_000_000) }
        strangers.wait(deadline: end) { $0.isEmpty ? () : nil }
    }

    /// `nil` when no further one can come. A process short of descriptors or memory goes on when it has some again.
    private func nextChannel(of listener: Listener) -> Channel? {
        var isShort = false
        while true {
            do throws(ChannelError) { return try listener.accept() } catch {
                if case .unusable = error { post(.noFurtherConnection) }
                guard case .system(let cause) = error else { return nil }
                if !isShort { report(.notice("\(cause.description); trying again")) }
                isShort = true
                Clock.sleep(nanoseconds: Self.acceptPauseNanoseconds)
            }
        }
    }

    /// - Returns: the channel, if it was not forgotten already.
    @discardableResult
    func forget(_ id: ConnectionID) -> Channel? {
        let channel = channels.withLock { $0.removeValue(forKey: id) }
        barrier.closed(id)
        urgents.closed(id)
        return channel
    }

    /// The TLS handshake, if there is one. - Returns: whether the connection is a visitor's now.
    private func shakeHands(_ channel: Channel, _ id: ConnectionID, isVisitor: Bool) -> Bool {
        guard channel.awaitsHandshake else { return true }
        defer { handshakes.leave(id) }
        do throws(ChannelError) { try channel.handshake() } catch {
            forget(id)
            channel.cancel()
            let reason = error == .cancelled ? "\(channel.peer): its TLS handshake was given up" : error.description
            if isVisitor { post(.disconnected(id, reason)) } else { report(.notice(reason)) }
            return false
        }
        if let words = channel.securityNotice, isNews(words.dropFirst(channel.peer.count)) { report(.notice(words)) }
        if !isVisitor { post(.accepted(id, answers: true)) }
        return true
    }

    /// The channels of one migration are secured alike: that is told once.
    private func isNews(_ security: Substring) -> Bool {
        toldSecurity.withLock { told in
            if told.count >= HandshakeQueue.limit { told.removeAll() }
            return told.insert(String(security)).inserted
        }
    }

    /// Whether the core has not closed that connection.
    func isOpen(_ id: ConnectionID) -> Bool { channels.withLock { $0[id] != nil } }

    func acceptsPages(on id: ConnectionID) -> Bool { state.withLock { $0.core.acceptsPages(on: id) } }
    func takesPages(on id: ConnectionID) -> Bool { state.withLock { $0.core.takesPages(on: id) } }
    var isResumable: Bool { state.withLock { $0.core.isResumable } }
    func acceptsSource(_ id: ConnectionID) -> Bool { state.withLock { $0.core.source == id } }
    /// Of the migration under way, if its pages bring digests.
    var verification: IncomingVerification? { verifications.withLock { $0 } }
    func isRecovering(_ id: ConnectionID) -> Bool { state.withLock { $0.core.isRecovering(id) } }
    var expectsUrgentChannel: Bool { state.withLock { $0.core.expectsUrgentChannel } }
    /// Whether pages go where they are missing, and nowhere else.
    var watchesMemory: Bool { state.withLock { $0.core.isPulling } }
    var usesChannels: Bool { state.withLock { $0.core.usesChannels } }

    private func serveTimers() {
        while true {
            let next = timers.withLock { $0.values.map(\.deadline).min() } ?? .never
            let due = timers.wait(deadline: next) { timers -> ProtocolTimer?? in
                guard let due = timers.values.first(where: { $0.deadline.hasPassed }) else {
                    // Another deadline may have come nearer: then this wait ends without a timer, and the next one is shorter.
                    return (timers.values.map(\.deadline).min() ?? .never) < next ? .some(nil) : nil
                }
                timers[due.timer.kind] = nil
                return .some(due.timer)
            }
            if case .some(.some(let timer)) = due { post(.timer(timer)) }
        }
    }

    // MARK: The core

    func post(_ event: DestinationEvent) {
        state.withLock { state in
            var events = [event]
            while !events.isEmpty {
                let actions = state.core.handle(events.removeFirst(), at: Clock.monotonicNanoseconds)
                // Whoever sees the last status sees the reason, too.
                for case .finished(let outcome) in actions { statistics.end(error: outcome.reason) }
                for action in actions {
                    if case .loadState = action, !state.core.isPulling {
                        state.isUrgent = HostThread.runBeforeOthers()
                    }
                    // The guest runs and the source was told: from here on the vCPUs want the processors more.
                    if case .report(.completed) = action { runAmongOthers(&state) }
                    let answer = state.core.isPulling ? performPulling(action) : perform(action)
                    if let answer { events.append(answer) }
                }
            }
            // RAM again, which is work for long.
            if state.core.phase == .receiving { runAmongOthers(&state) }
        }
    }

    private func runAmongOthers(_ state: inout State) {
        guard state.isUrgent else { return }
        state.isUrgent = false
        HostThread.runAmongOthers()
    }

    /// - Returns: the event that answers the action, if it is known at once.
    func perform(_ action: DestinationAction) -> DestinationEvent? {
        switch action {
        case .send(let id, let bytes):
            if let reason = say(bytes, on: id) { return .disconnected(id, reason) }
        case .close(let id):
            guard let channel = forget(id) else { return nil }
            answers.close(channel, id)
        case .drop(let id): forget(id)?.cancel()
        case .admit(let id, let count): barrier.admit(id, of: count)
        case .admitUrgent(let id, let number, let count): urgents.admit(id, as: number, of: count)
        case .verify(let migration): return verify(migration)
        case .compareRoot(let root): return compared(verification?.compare(root: root))
        case .compareDigests(let range, let values): return compared(verification?.compare(range, values))
        case .loadState(let sections): return load(sections)
        case .startGuest(let running, let moment): return start(running, by: moment)
        case .setTimer(let timer, let nanoseconds):
            timers.withLock { $0[timer.kind] = (timer, .after(nanoseconds: nanoseconds)) }
        case .cancelTimer(let kind): timers.withLock { $0[kind] = nil }
        case .report(let status):
            statistics.enter(status)
            report(.status(status))
        case .agreed(let rule, _): statistics.agreed(rule)
        case .awaitReaders(let ids): awaitReaders(ids)
        case .keeps(let sentence, let nanoseconds):
            statistics.keeps(sentence, forNanoseconds: nanoseconds)
            report(.notice(sentence))
        case .turnedAway(_, let sentence): report(.notice(sentence))
        case .preparePostcopy, .discardPages, .listen, .finishPull, .endPostcopy, .unlisten, .pullPaused:
            return performPostcopy(action)
        case .admitNet(let id): urgents.admitNet(id)
        case .prepareEpochs, .armEpochs, .goOnWithEpochs, .holdEpochs, .sayStays, .endEpochs:
            return performEpochs(action)
        case .finished(let outcome):
            if let reason = outcome.reason { report(.notice(reason)) }
            toldSecurity.withLock { $0 = [] }
            // What comes next may come without digests.
            if outcome != .completed { verifications.withLock { $0 = nil } }
            if outcome == .completed {
                postcopies.withLock { $0 = nil }
                stopListeningLater()
            }
        }
        return nil
    }

    /// Waits until nobody reads the connections before that one, which takes their place. - Returns: whether it came to that.
    func waitForEarlierReaders(_ id: ConnectionID) -> Bool {
        let ids = state.withLock { $0.core.earlierConnections }
        let isQuiet: Void? = readers.wait(deadline: .after(seconds: Self.quietSeconds)) {
            $0.isDisjoint(with: ids) ? () : nil
        }
        guard isQuiet != nil else { return false }
        post(.readersEnded(ids))
        return isOpen(id)
    }

    /// Their channels are cancelled: the threads end as soon as they notice.
    private func awaitReaders(_ ids: [ConnectionID]) {
        do throws(SystemError) {
            _ = try HostThread(name: "migration-quiet") { [self] in
                waitForReaders(of: ids)
                post(.readersEnded(ids))
            }
        } catch { report(.notice("the migration cannot go on: \(error.description)")) }
    }

    /// Until no thread reads those connections any more, which are closed.
    func waitForReaders(of ids: [ConnectionID]) { readers.wait { $0.isDisjoint(with: ids) ? () : nil } }

    /// A source that lost its connection after COMMIT may come back and ask; then the address is free for others.
    private func stopListeningLater() {
        do throws(SystemError) {
            _ = try HostThread(name: "migration-free") { [self] in
                Clock.sleep(nanoseconds: Self.hasteNanoseconds)
                machine.endHaste()
                Clock.sleep(nanoseconds: Self.answeringNanoseconds)
                listener.close()
            }
        } catch {
            machine.endHaste()
            report(.notice("the migration address stays in use: \(error.description)"))
        }
    }

    private func verify(_ migration: MigrationIdentifier) -> DestinationEvent? {
        do throws(SystemError) {
            let verification = try IncomingVerification(machine.memory, migration)
            verifications.withLock { $0 = verification }
            return nil
        } catch { return .pagesFailed("x-verify: \(error.description)") }
    }

    private func compared(_ verdict: RootVerdict?) -> DestinationEvent? {
        if case .corrupt = verdict { for line in verification?.logLines() ?? [] { report(.notice(line)) } }
        return verdict.map { .compared($0) }
    }

    /// - Returns: why it could not be said, if that is known at once.
    func say(_ bytes: [UInt8], on id: ConnectionID) -> String? {
        guard let channel = channels.withLock({ $0[id] }) else { return nil }
        do throws(ChannelError) {
            try answers.say(bytes, on: channel, id) { [self] in post(.disconnected(id, $0)) }
            return nil
        } catch { return error.description }
    }

    func start(_ running: Bool, by moment: UInt64?) -> DestinationEvent {
        let began = Clock.monotonicNanoseconds
        guard machine.startAfterMigration(running: running, by: moment) else { return .startedTooLate }
        return .guestStarted(nanoseconds: Clock.monotonicNanoseconds - began)
    }

    func load(_ sections: [DeviceSection]) -> DestinationEvent {
        let began = Clock.monotonicNanoseconds
        do throws(MachineError) {
            try machine.loadState(
                sections.map { DeviceState(name: $0.name, instance: $0.instance, version: $0.version, body: $0.body) })
            return .stateLoaded(nanoseconds: Clock.monotonicNanoseconds - began)
        } catch { return .loadFailed(error.description) }
    }
}

extension ListeningAddress {
    fileprivate init(_ address: Listener.BoundAddress) {
        switch address {
        case .inet(let host, let port): self = .inet(host: host, port: port)
        case .unix(let path): self = .unix(path: path)
        }
    }
}

extension DestinationOutcome {
    fileprivate var reason: String? {
        switch self {
        case .completed: nil
        case .waitsForAnother(let sentence), .failed(let sentence): sentence
        }
    }
}
