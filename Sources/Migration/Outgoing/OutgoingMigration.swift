import Accelerator
import GuestMemory
import Host
import Machine
import MigrationStream
import Synchronization
import Transport

/// The shell around `SourceCore`: three threads, no decisions.
///
/// * `migration` owns the core: it takes events from a queue, one at a time, and performs what the core answers. Nothing it does blocks
///   on the network, so a cancel is served at every moment.
/// * `migration-send` writes to the channel what it is told, in order: stream bytes and rounds of pages.
/// * `migration-return` reads what the destination answers.
final class OutgoingMigration: Sendable {
    let machine: VirtualMachine
    /// Where the destination listens; another after a `resume` that says so.
    let target: Mutex<MigrationAddress>
    let descriptors: DescriptorResolver
    /// For every channel of the migration; `nil`: plaintext.
    let tls: TLSSettings?
    let report: @Sendable (MigrationEvent) -> Void
    let blocks: [RAMBlockDescription]
    let configuration: SourceConfiguration
    /// Channels for pages besides the main one; with pages in a file, threads that write them.
    let channelCount: Int
    let usesDirectIO: Bool
    let packing: PacketPacking?
    let verification: OutgoingVerification?
    let statistics: OutgoingStatistics
    let sender: StreamSender
    let tracker: (any DirtyTracker)?
    private let convergence: Convergence
    /// Without it a socket is one-way, as in QEMU: nobody answers, and the migration is over when all was read.
    let usesReturnPath: Bool
    /// Guest memory goes back to the host once the guest runs elsewhere.
    private let releasesRAM: Bool
    /// Ends the attempt to connect that is under way.
    let connecting = Mutex<CancelToken?>(nil)

    struct Inbox {
        var events: [SourceEvent] = []
        /// How many events the core has taken so far.
        var taken: UInt64 = 0
        var timers: [ProtocolTimer.Kind: (timer: ProtocolTimer, deadline: Deadline)] = [:]
        var isOver = false
    }
    let inbox = Monitor(Inbox())
    let open = Mutex<Channel?>(nil)
    /// Where the destination was reached last.
    let home = Mutex<MigrationAddress?>(nil)
    /// The last connection whose answers have all been read.
    let answersEnded = Monitor<UInt64>(0)
    /// Threads that read answers.
    let answering = Monitor(0)
    /// Threads that tell a destination not to wait.
    let farewells = Monitor(0)
    /// Counts the attempts to connect: what an earlier connection still says does not count.
    let attempts = Mutex<UInt64>(0)
    /// Nothing takes jobs.
    let isAbandoned = Mutex(false)
    let refusal = Mutex<String?>(nil)
    let settleAttempts = Mutex(0)
    static let settleAttemptLimit = 5
    /// So many events wait for the core at most before the destination's next word is read.
    private static let answerBacklogLimit = 64

    init(
        _ machine: VirtualMachine, to address: MigrationAddress, parameters: MigrationParameters,
        capabilities: Set<MigrationCapability>, multifd: (channels: Int, mode: MultifdMode)?,
        packing: PacketPacking?, tls: TLSSettings?, convergence: Convergence,
        descriptors: @escaping DescriptorResolver,
        report: @escaping @Sendable (MigrationEvent) -> Void
    ) throws(MigrationError) {
        self.machine = machine
        target = Mutex(address)
        self.convergence = convergence
        self.descriptors = descriptors
        self.tls = tls
        self.report = report
        blocks = machine.memory.blocks.map {
            RAMBlockDescription(name: $0.name, length: $0.byteCount, pageSize: $0.pageBytes)
        }
        tracker = machine.accelerator?.dirtyTracker(for: .migration)
        var policy = SwitchoverPolicy(
            downtimeLimitNanoseconds: parameters.downtimeLimitMilliseconds * 1_000_000,
            overheadNanoseconds: Self.guessedOverhead(cpuCount: machine.configuration.cpuCount))
        policy.limit(to: parameters.bandwidthLimit)
        if parameters.availableSwitchoverBytesPerSecond > 0 {
            policy.availableBytesPerSecond = parameters.availableSwitchoverBytesPerSecond
        }
        var configuration = SourceConfiguration(
            migration: .random(), machineName: machine.configuration.streamName, blocks: blocks,
            catalogue: machine.sectionCatalogue,
            pausesBeforeSwitchover: capabilities.contains(.pauseBeforeSwitchover), switchover: policy)
        configuration.awaitsSwitchoverAcknowledgement = capabilities.contains(.switchoverAck)
        if capabilities.contains(.validateUUID) {
            configuration.uuid = machine.configuration.uuid.map(MigrationIdentifier.init)
        }
        if capabilities.contains(.mappedRAM), case .file(_, let offset) = address {
            configuration.mapped = MappedRAMSetup(
                machine: machine.configuration.streamName, uuid: configuration.uuid, blocks: blocks,
                ramSectionID: SourceCore.ramSectionID, at: offset)
        } else {
            configuration.multifd = multifd?.mode
        }
        configuration.isResumable = capabilities.contains(.resumable) && address.canReconnect
        if capabilities.contains(.verify) { configuration.features.insert(.verification) }
        configuration.allowPostcopy(capabilities, channels: Int(parameters.postcopyChannels))
        self.configuration = configuration
        usesDirectIO = parameters.usesDirectIO
        usesReturnPath = capabilities.contains(.returnPath)
        releasesRAM = capabilities.contains(.releaseRAM)
        channelCount = multifd?.channels ?? 0
        self.packing = packing
        let cacheBytes = capabilities.contains(.xbzrle) ? parameters.xbzrleCacheBytes : nil
        statistics = OutgoingStatistics(
            totalBytes: machine.memory.byteCount, tracking: tracker?.method, xbzrleCacheBytes: cacheBytes)
        do {
            verification =
                configuration.verifies ? try OutgoingVerification(machine.memory, configuration.migration) : nil
            // A machine without vCPUs has no tracker: what is allocated is sent once.
            let bitmaps: [any DirtyPages] =
                try tracker?.makePages() ?? machine.memory.blocks.map { try DirtyBitmap(pageCount: $0.pageCount) }
            let postcopy =
                configuration.postcopy == nil
                ? nil
                : try PostcopySource(
                    machine.memory, blocks: blocks, cpuCount: machine.configuration.cpuCount, statistics: statistics,
                    parameters, hasNet: configuration.postcopy?.hasNet == true)
            sender = try StreamSender(
                machine.memory, blocks: blocks, tracker: tracker, bitmaps: bitmaps, statistics: statistics,
                mode: configuration.multifd, zeroPages: parameters.chosenZeroPageDetection,
                xbzrleCacheBytes: cacheBytes, verification: verification, postcopy: postcopy)
        } catch { throw MigrationError("\(error)") }
        sender.setBandwidth(parameters.maxBandwidthBytesPerSecond)
    }

    /// What a switchover takes besides its pages, as long as none was tried: a careful guess.
    private static func guessedOverhead(cpuCount: Int) -> UInt64 { 1_500_000 + UInt64(cpuCount) * 400_000 }

    func start() throws(MigrationError) {
        post(.start)
        do throws(SystemError) {
            _ = try HostThread(name: "migration") { [self] in run() }
        } catch { throw MigrationError(error.description) }
    }

    // MARK: From other threads

    var isUnderWay: Bool { statistics.isUnderWay }
    var isUnsettled: Bool { statistics.status == .unsettled }
    func info() -> MigrationInfo {
        var info = statistics.info()
        info.trackingCPUNanoseconds = tracker?.cpuNanoseconds
        if let times = sender.postcopy?.requests.latency.histogram, times.count > 0 { info.serviceTime = times }
        info.safetyNet = keeper?.figures
        convergence.describe(&info)
        return info
    }

    func update(_ parameters: MigrationParameters) {
        sender.setXBZRLECache(parameters.xbzrleCacheBytes)
        sender.setBandwidth(parameters.maxBandwidthBytesPerSecond)
        sender.postcopy?.pacer.bytesPerSecond = parameters.maxPostcopyBandwidthBytesPerSecond
        sender.postcopy?.pace.targetMicroseconds = parameters.pageLatencyTargetMicroseconds
        sender.postcopy?.prefetch.isOn = parameters.prefetchesPostcopy
        convergence.update(parameters)
        post(.setBandwidthLimit(bytesPerSecond: parameters.bandwidthLimit))
        let available = parameters.availableSwitchoverBytesPerSecond
        post(.setAvailableBandwidth(bytesPerSecond: available > 0 ? available : nil))
        post(.setDowntimeLimit(nanoseconds: parameters.downtimeLimitMilliseconds * 1_000_000))
    }

    func cancel() throws(MigrationError) { try command(.cancel) }
    func proceed() throws(MigrationError) { try command(.proceed) }
    var isPaused: Bool { [.paused, .postcopyPaused].contains(statistics.status) }
    /// Whether the guest has moved, and memory of it is to follow.
    var isFollowed: Bool {
        [.postcopyActive, .postcopyPaused, .postcopyRecoverSetup, .postcopyRecover].contains(statistics.status)
    }

    /// Goes on where it was, over a new connection.
    func resume(at address: MigrationAddress) throws(MigrationError) {
        target.withLock { $0 = address }
        try command(.resume)
    }

    func settle(_ settlement: Settlement) throws(MigrationError) { try command(.settle(settlement)) }

    /// Posts an operator's command and waits until the core has taken it.
    func command(_ event: SourceEvent) throws(MigrationError) {
        refusal.withLock { $0 = nil }
        let turn = post(event)
        inbox.wait(deadline: .after(seconds: 10)) { $0.taken >= turn || $0.isOver ? () : nil }
        if let sentence = refusal.withLock({ $0 }) { throw MigrationError(sentence) }
    }

    /// - Returns: how many events the core has taken when it has taken this one.
    @discardableResult
    func post(_ event: SourceEvent) -> UInt64 {
        inbox.withLock { inbox in
            // A migration that is over is still told of new parameters, and nobody takes them.
            guard !inbox.isOver else { return inbox.taken }
            inbox.events.append(event)
            // A round looks at this between two batches; a sign of life is no reason to end it.
            if event != .progressed { sender.eventsWait = true }
            return inbox.taken + UInt64(inbox.events.count)
        }
    }

    // MARK: The migration thread

    private func run() {
        HostThread.sleepExactly()
        // What it does is short, and the guest may be waiting for it.
        _ = HostThread.runBeforeOthers()
        var core = SourceCore(configuration)
        while let event = nextEvent() {
            let actions = core.handle(event, at: Clock.monotonicNanoseconds)
            if case .collected(let pages) = event, core.status == .active, core.configuration.switchover.knowsBandwidth
            {
                statistics.expect(
                    downtimeNanoseconds: core.configuration.switchover.expectedDowntimeNanoseconds(
                        remainingPages: pages))
            }
            // Whoever sees the last status sees the reason, too.
            for case .finished(let outcome) in actions { statistics.end(error: outcome.reason) }
            for action in actions { perform(action, core.phase) }
            inbox.withLock { inbox in
                inbox.events.removeFirst()
                inbox.taken += 1
                sender.eventsWait = inbox.events.contains { $0 != .progressed }
            }
        }
    }

    /// The first event, which stays in the queue until it is done; a timer that is due becomes one.
    private func nextEvent() -> SourceEvent? {
        while true {
            let next = inbox.withLock { $0.timers.values.map(\.deadline).min() } ?? .never
            let event = inbox.wait(deadline: next) { inbox -> SourceEvent?? in
                // Behind what came before, but not behind all that comes: a peer that never falls silent must not stop the clock.
                for due in inbox.timers.values.filter(\.deadline.hasPassed) {
                    inbox.timers[due.timer.kind] = nil
                    inbox.events.append(.timer(due.timer))
                }
                if let first = inbox.events.first { return .some(first) }
                return inbox.isOver ? .some(nil) : nil
            }
            if let event { return event }
        }
    }

    private func perform(_ action: SourceAction, _ phase: SourcePhase) {
        switch action {
        case .connect: connect(withChannels: phase == .connecting || phase == .reopening)
        case .send(let bytes): sender.enqueue(.bytes(bytes))
        case .skip(let count): sender.enqueue(.skip(count))
        case .startTracking: startTracking()
        case .stopTracking:
            convergence.end()
            stopTracking()
        case .collect(let final): collect(final: final)
        case .sendRound(let final, let batches, let keepsPages):
            sender.enqueue(.round(final: final, batches: batches, keepsPages: keepsPages))
        case .synchronizeChannels: sender.enqueue(.synchronize)
        case .abandon: abandon()
        case .paused(let reason):
            convergence.pause()
            statistics.end(error: reason)
            report(.notice("the migration is paused: \(reason)"))
        case .rewind:
            noteHome()
            sender.rewind()
        case .bidFarewell(let bytes): bidFarewell(bytes)
        case .sendRoot: sender.enqueue(.root)
        case .sendDigests(let range): sender.enqueue(.digests(range))
        case .interruptRound: sender.interruptRound()
        case .openUrgentChannel, .openUrgentChannels: openUrgent(action)
        case .sendDiscards: sender.enqueue(.discards)
        case .sendPackage(let bytes): sendPackage(bytes)
        case .prepareRecovery: sender.postcopy?.prepareRecovery()
        case .adoptBitmaps: adoptBitmaps()
        case .serveRequests: sender.enqueue(.serveRequests)
        case .takeBackPages, .takeBackGuest, .releaseGuest: takeBack(action)
        case .servePages:
            // The guest does not run here any more: nothing of it needs to be slowed down.
            convergence.end()
            sender.enqueue(.servePages)
        case .stopGuest: stopGuest()
        case .resumeGuest:
            machine.resumeAfterMigration(wasRunning: stoppedGuest.withLock { $0 })
            statistics.endDowntime(completed: false)
        case .giveUpRightToRun:
            // A package is loaded where it arrives, and that it was is told when the guest starts.
            if phase != .packageLeaving { statistics.mark(.load) }
            machine.handOver()
            keeper?.guestLeaves()
        case .regainRightToRun: keeper?.guestIsBack()
        case .brokeOff(let broken):
            statistics.brokeOff(broken)
            report(.notice(broken.description))
        case .saveState: saveState()
        case .flush: sender.enqueue(.flush)
        // A one-way reader may need long for what it was given; nobody else is waited for.
        case .close: close(patiently: phase == .closing)
        case .setTimer(let timer, let nanoseconds):
            inbox.withLock { $0.timers[timer.kind] = (timer, .after(nanoseconds: nanoseconds)) }
        case .cancelTimer(let kind): inbox.withLock { $0.timers[kind] = nil }
        case .report(let status): enter(status)
        case .agreed(let rule, let features):
            noteHome()
            statistics.agreed(rule)
            sender.agreed(features)
        case .refused(let sentence): refusal.withLock { $0 = sentence }
        case .finished(let outcome): finish(outcome)
        }
    }

    private func enter(_ status: MigrationStatus) {
        // Whoever sees "completed" sees the whole report.
        if [.completed, .postcopyActive].contains(status) { statistics.endDowntime(completed: true) }
        statistics.enter(status)
        report(.status(status))
        // What is left to do is tidying up, and the guest, if it is on this host, wants its processor.
        if status == .completed { HostThread.runAmongOthers() }
    }

    let stoppedGuest = Mutex(false)

    // MARK: Actions

    private func stopGuest() {
        statistics.beginDowntime()
        do throws(MachineError) {
            let wasRunning = try machine.stopForMigration()
            statistics.mark(.stop)
            stoppedGuest.withLock { $0 = wasRunning }
            post(.guestStopped(wasRunning: wasRunning))
        } catch { post(.stopFailed(error.description)) }
    }

    func startThread(_ name: String, _ body: @escaping @Sendable () -> Void) {
        do throws(SystemError) {
            _ = try HostThread(name: name, body)
        } catch { post(.disconnected(error.description)) }
    }

    func readAnswers(_ channel: Channel, _ attempt: UInt64) {
        _ = HostThread.runBeforeOthers()
        var decoder = ReturnPathDecoder(postcopyOf: sender.postcopy == nil ? [] : blocks)
        var buffer = ReceiveBuffer(capacity: 4096)
        do {
            while true {
                while let message = try decoder.next(from: &buffer) {
                    if try tookRequest(message) { continue }
                    if case .postcopy(.receivedBitmap(let block, _)) = message {
                        try takeBitmap(of: block, &decoder, &buffer, channel)
                        continue
                    }
                    guard waitForRoom(), isCurrent(attempt) else { return }
                    if case .pong(let value) = message, let mark = ResumptionMark(pong: value),
                        sender.acknowledged(mark)
                    {
                        continue
                    }
                    post(.received(message))
                }
                let count = try unsafe buffer.fill(atLeast: 1024) { (room) throws(ChannelError) in
                    try unsafe channel.receive(into: room)
                }
                guard count > 0 else {
                    if isCurrent(attempt) { post(.disconnected("the destination closed the connection")) }
                    return
                }
                // A page that goes over another connection takes no acknowledgement of its request along.
                if configuration.postcopy?.usesUrgentChannel == true { channel.acknowledgeAtOnce() }
            }
        } catch {
            if isCurrent(attempt) { post(.disconnected("\(error)")) }
        }
    }

    /// A destination that talks faster than the core listens waits in its socket, not in our memory; and whatever else comes, such
    /// as a cancel, has only so much before it. - Returns: whether the migration still goes on.
    private func waitForRoom() -> Bool {
        inbox.wait { inbox -> Bool? in
            if inbox.isOver { return false }
            return inbox.events.count < Self.answerBacklogLimit ? true : nil
        } ?? false
    }

    private func startTracking() {
        do throws(AcceleratorError) {
            try tracker?.start()
            post(.trackingStarted)
        } catch { post(.trackingFailed(error.description)) }
    }

    private func collect(final: Bool) {
        do throws(AcceleratorError) {
            let pages = try sender.collect()
            if final {
                statistics.mark(.collect)
            } else {
                convergence.collected(remainingPages: pages, statistics.info())
            }
            report(.pass(statistics.collected(remainingPages: pages)))
            post(.collected(remainingPages: pages))
        } catch { post(.trackingFailed(error.description)) }
    }

    private func saveState() {
        statistics.mark(.send)
        do throws(MachineError) {
            let states = try machine.saveState()
            statistics.mark(.state)
            post(
                .stateSaved(
                    states.map {
                        DeviceSection(name: $0.name, instance: $0.instance, version: $0.version, body: $0.body)
                    }))
        } catch { post(.stateFailed(error.description)) }
    }

    private func finish(_ outcome: SourceOutcome) {
        convergence.end()
        if case .unsettled = outcome { return askAgain() }
        connecting.withLock { $0 }?.cancel()
        inbox.withLock { $0.isOver = true }
        if releasesRAM, outcome == .completed { releaseRAM() }
    }

    /// The guest runs elsewhere and never again here. Threads may still be reading what nobody waits for.
    private func releaseRAM() {
        startThread("migration-ram") { [self] in
            sender.waitUntilClosed()
            for block in machine.memory.blocks {
                do throws(SystemError) { try block.release() } catch {
                    report(.notice("release-ram: \(error.description)"))
                }
            }
        }
    }
}

extension SourceOutcome {
    fileprivate var reason: String? {
        switch self {
        case .completed, .cancelled: nil
        case .failed(let sentence), .unsettled(let sentence): sentence
        }
    }
}

extension MigrationAddress {
    /// Whether the destination listens there for more than one connection: further channels, or one after another was lost.
    var canReconnect: Bool {
        switch self {
        case .tcp, .unix: true
        case .descriptor, .exec, .file: false
        }
    }
}

extension MigrationIdentifier {
    /// A name nobody else uses.
    static func random() -> MigrationIdentifier {
        MigrationIdentifier(high: .random(in: 0...UInt64.max), low: .random(in: 0...UInt64.max))
    }
}

extension VirtualMachine {
    /// How this machine's sections travel.
    var sectionCatalogue: SectionCatalogue {
        var catalogue = SectionCatalogue()
        for section in sections {
            catalogue.add(
                section.name, version: section.version,
                layout: section.fixedByteCount.map { .fixed(byteCount: $0) } ?? .lengthPrefixed())
        }
        return catalogue
    }
}
