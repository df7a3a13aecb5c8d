//! The Migration room: moving a running machine.
//!
//! `Migrator` is the summary: one per machine, with QEMU's commands as methods. An `OutgoingMigration` is the shell around the protocol's
//! `SourceCore`: threads, sockets and guest memory, no decisions. An `IncomingMigration` is the same around `DestinationCore`. Under
//! `Protocol/` are both cores, without I/O, threads or clocks: read there what happens when.

import Accelerator
import Compression
import GuestMemory
public import Host
public import Machine
import MigrationStream
import Synchronization
public import Transport

/// Migrates one machine: parameters, the outgoing or incoming migration, and what is known about it. From any thread.
public final class Migrator: Sendable {
    public let machine: VirtualMachine
    /// Credentials and lists of peers, by id.
    public let security: SecurityObjects
    private let state = Mutex(State())
    private let dryRuns = Mutex(())
    private let observers = Mutex<[@Sendable (MigrationEvent) -> Void]>([])
    /// Under a lock of its own: a listener asks for one while `state` is held.
    private let descriptors = Mutex<[String: Descriptor]>([:])

    private struct State {
        var capabilities = Set(MigrationCapability.allCases.filter(\.isOnByDefault))
        var parameters = MigrationParameters()
        var outgoing: OutgoingMigration?
        var incoming: IncomingMigration?

        /// How pages go over several channels; `nil`: they do not.
        var multifd: (channels: Int, mode: MultifdMode)? {
            guard capabilities.contains(.multifd) else { return nil }
            return (
                Int(parameters.multifdChannels), parameters.flushesMultifdAfterEachSection ? .eachSection : .flush
            )
        }

        /// How packets are compressed; `nil`: they are not.
        var packing: PacketPacking? {
            guard capabilities.contains(.multifd), let method = parameters.compression else { return nil }
            return PacketPacking(
                method: method, level: Int(method == .zlib ? parameters.zlibLevel : parameters.zstdLevel))
        }
    }

    /// - Parameter allowsPlaintext: whether a migration may be waited for without TLS where other machines reach it.
    public init(_ machine: VirtualMachine, allowsPlaintext: Bool = false) {
        self.machine = machine
        security = SecurityObjects(allowsPlaintext: allowsPlaintext)
    }

    /// Calls `observer` with every event from now on, on the thread where it happens.
    public func observe(_ observer: @escaping @Sendable (MigrationEvent) -> Void) {
        observers.withLock { $0.append(observer) }
    }

    private func report(_ event: MigrationEvent) {
        for observer in observers.withLock({ $0 }) { observer(event) }
    }

    // MARK: Settings

    public func isOn(_ capability: MigrationCapability) -> Bool {
        state.withLock { $0.capabilities.contains(capability) }
    }

    public func set(_ capability: MigrationCapability, _ on: Bool) throws(MigrationError) {
        try set([(capability, on)])
    }

    /// All of them or none. - Throws: `MigrationError` while a migration is under way, and for what does not go together.
    public func set(_ changes: [(capability: MigrationCapability, on: Bool)]) throws(MigrationError) {
        try state.withLock { (state) throws(MigrationError) in
            guard state.outgoing?.isUnderWay != true else {
                throw MigrationError("migrate-set-capabilities: not while a migration is under way; cancel it first")
            }
            var wanted = state.capabilities
            for change in changes {
                if change.on { wanted.insert(change.capability) } else { wanted.remove(change.capability) }
            }
            let limits = machine.accelerator?.dirtyRateControl != nil
            if let reason = wanted.contradiction(limitsDirtyRate: limits) {
                throw MigrationError("migrate-set-capabilities: \(reason)")
            }
            // Only who waits for memory needs it; a source must not be refused for what it will not use.
            let isNews = wanted.contains(.postcopyRAM) && !state.capabilities.contains(.postcopyRAM)
            if isNews, machine.runState == .inMigrate, let reason = IncomingPostcopy.obstacle(of: machine) {
                throw MigrationError("migrate-set-capabilities: Postcopy is not supported: \(reason)")
            }
            state.capabilities = wanted
        }
    }

    private static func means(_ capabilities: Set<MigrationCapability>) -> Convergence.Means {
        if capabilities.contains(.autoConverge) { return .throttle }
        return capabilities.contains(.dirtyLimit) ? .dirtyLimit : .none
    }

    public var parameters: MigrationParameters { state.withLock { $0.parameters } }

    /// Takes effect at once, also for a migration under way. - Throws: `MigrationError` naming the value out of range.
    public func set(_ parameters: MigrationParameters) throws(MigrationError) {
        guard parameters.downtimeLimitMilliseconds <= MigrationParameters.longestDowntimeLimit else {
            throw MigrationError(
                "downtime-limit \(parameters.downtimeLimitMilliseconds): at most \(MigrationParameters.longestDowntimeLimit) ms"
            )
        }
        guard XBZRLECache.isSize(parameters.xbzrleCacheBytes) else {
            throw MigrationError(
                "Parameter 'xbzrle-cache-size' expects a power of two no less than the target page size")
        }
        for (name, level, method) in [
            ("multifd-zlib-level", parameters.zlibLevel, CompressionMethod.zlib),
            ("multifd-zstd-level", parameters.zstdLevel, .zstd),
        ] where level > UInt64(method.levels.upperBound) {
            throw MigrationError(
                "Parameter '\(name)' expects a value between 0 and \(method.levels.upperBound)")
        }
        guard (1...UInt64(StreamLimit.multifdChannels)).contains(parameters.multifdChannels) else {
            throw MigrationError(
                "multifd-channels \(parameters.multifdChannels): between 1 and \(StreamLimit.multifdChannels)")
        }
        guard (1...UInt64(StreamLimit.urgentChannels)).contains(parameters.postcopyChannels) else {
            throw MigrationError(
                "x-postcopy-channels \(parameters.postcopyChannels): between 1 and \(StreamLimit.urgentChannels)")
        }
        guard (1...10_000).contains(parameters.postcopyEpochMilliseconds) else {
            throw MigrationError("x-postcopy-epoch \(parameters.postcopyEpochMilliseconds): between 1 and 10000 ms")
        }
        if let mistake = parameters.throttlingMistake { throw MigrationError(mistake) }
        let outgoing = state.withLock { state in
            state.parameters = parameters
            return state.outgoing
        }
        outgoing?.update(parameters)
    }

    // MARK: Descriptors passed by QMP (`getfd`)

    public func keep(_ descriptor: Descriptor, as name: String) { descriptors.withLock { $0[name] = descriptor } }

    /// - Returns: false if there is none of this name.
    public func closeDescriptor(_ name: String) -> Bool {
        descriptors.withLock { $0.removeValue(forKey: name) } != nil
    }

    /// Hands a kept descriptor to a migration, which owns it from then on.
    private func takeDescriptor(_ name: String) -> Descriptor? {
        descriptors.withLock { $0.removeValue(forKey: name) }
    }

    // MARK: Commands

    /// Starts to move the guest to where `address` says (`migrate`). Returns at once.
    /// - Parameter holds: stop before the switch, as with `pause-before-switchover`, in this migration alone.
    public func migrate(to address: MigrationAddress, holds: Bool = false) throws(MigrationError) {
        try state.withLock { (state) throws(MigrationError) in
            if let outgoing = state.outgoing, outgoing.isPaused {
                throw MigrationError("migrate: the last migration is paused; go on with 'resume', or cancel it")
            }
            if let outgoing = state.outgoing, outgoing.isUnderWay || outgoing.isUnsettled {
                throw MigrationError(
                    outgoing.isUnsettled
                        ? "migrate: the last migration is unsettled; settle it first (x-migrate-settle)"
                        : "migrate: there's a migration process in progress")
            }
            guard state.incoming?.isPulling != true else {
                throw MigrationError(
                    "migrate: memory of the guest is still on its way here (postcopy); wait until that has completed")
            }
            switch machine.runState {
            case .inMigrate: throw MigrationError("migrate: the machine is itself waiting for an incoming migration")
            case .postMigrate: throw MigrationError("migrate: the guest was already handed over and may run elsewhere")
            case .internalError, .shutdown:
                throw MigrationError("migrate: the guest cannot run on (\(machine.runState.rawValue))")
            default: break
            }
            let multifd = state.multifd
            if let reason = Self.postcopyRefusal(address, state) { throw MigrationError("migrate: \(reason)") }
            let isMapped = state.capabilities.contains(.mappedRAM)
            if isMapped { try Self.checkMappedRAM(address, state) }
            guard multifd == nil || isMapped || address.canReconnect else {
                throw MigrationError("migrate: several channels (multifd) need tcp: or unix:, not \(address)")
            }
            guard !state.capabilities.contains(.resumable) || address.canReconnect else {
                throw MigrationError(
                    "migrate: a migration that can be resumed (x-resumable) needs tcp: or unix:, not \(address); "
                        + "turn the capability off")
            }
            guard multifd == nil || !state.capabilities.contains(.xbzrle) else {
                throw MigrationError(
                    "migrate: xbzrle and several channels (multifd) do not go together; turn one of them off")
            }
            let packing = state.packing
            if let packing {
                do throws(CompressionError) { try packing.method.check(level: packing.level) } catch {
                    throw MigrationError("migrate: \(error)")
                }
            }
            let outgoing = try OutgoingMigration(
                machine, to: address, parameters: state.parameters,
                capabilities: holds ? state.capabilities.union([.pauseBeforeSwitchover]) : state.capabilities,
                multifd: multifd, packing: packing,
                tls: security.settings(state.parameters, "migrate"),
                convergence: Convergence(machine, state.parameters, means: Self.means(state.capabilities)),
                descriptors: { [weak self] in self?.takeDescriptor($0) }, report: { [weak self] in self?.report($0) })
            state.outgoing = outgoing
            try outgoing.start()
        }
    }

    /// Pages with places of their own: in a file, and as they are.
    private static func checkMappedRAM(_ address: MigrationAddress, _ state: State) throws(MigrationError) {
        guard case .file = address else {
            throw MigrationError(
                "migrate: pages have places only in a file (mapped-ram): give file:PATH, or turn the capability off")
        }
        guard state.packing == nil, !state.capabilities.contains(.xbzrle) else {
            throw MigrationError(
                "migrate: pages that have places in a file (mapped-ram) are not compressed; turn that off")
        }
    }

    /// Why the guest cannot move before its memory to there, if it may be told to.
    private static func postcopyRefusal(_ address: MigrationAddress, _ state: State) -> String? {
        guard state.capabilities.contains(.postcopyRAM) else { return nil }
        switch address {
        case .file, .exec:
            return
                "memory that follows its guest (postcopy-ram) is asked for by the destination, which \(address) cannot; "
                + "turn the capability off"
        case .descriptor where state.capabilities.contains(.postcopyPreempt):
            return
                "requested pages go over a second connection (postcopy-preempt), which needs tcp: or unix:, not \(address)"
        case .descriptor where state.capabilities.contains(.postcopySafetyNet):
            return
                "what is given back (x-postcopy-safety-net) goes over another connection, which needs tcp: or unix:, not \(address)"
        default: break
        }
        if state.capabilities.contains(.postcopySafetyNet),
            state.parameters.postcopyChannels >= StreamLimit.urgentChannels
        {
            return
                "x-postcopy-safety-net takes a channel of its own; set x-postcopy-channels to \(StreamLimit.urgentChannels - 1) or less"
        }
        guard state.multifd?.mode != .eachSection else {
            return
                "a QEMU that wants x-multifd-flush-after-each-section takes several channels (multifd) or postcopy-ram, not "
                + "both; turn one of them off"
        }
        return nil
    }

    /// What a dry run takes instead of what is set; `nil`: what is set.
    public struct DryRunWishes: Sendable {
        /// What the link carries, bytes per second.
        public var bandwidth: UInt64?
        public var downtimeLimitMilliseconds: UInt64?
        public var autoConverge: Bool?
        public init(bandwidth: UInt64? = nil, downtimeLimitMilliseconds: UInt64? = nil, autoConverge: Bool? = nil) {
            self.bandwidth = bandwidth
            self.downtimeLimitMilliseconds = downtimeLimitMilliseconds
            self.autoConverge = autoConverge
        }
    }

    /// Watches the guest for two seconds and tells what a migration would come to (`x-migrate-dry-run`). Comes back after that; nothing
    /// is set, and nothing is moved.
    public func dryRun(_ wishes: DryRunWishes = DryRunWishes()) throws(MigrationError) -> DryRun.Report {
        let now = state.withLock { $0 }
        if now.outgoing?.isUnderWay == true {
            throw MigrationError("x-migrate-dry-run: a migration is under way; query-migrate tells its x-verdict")
        }
        guard machine.runState == .running, let accelerator = machine.accelerator else {
            throw MigrationError(
                "x-migrate-dry-run: there is no running guest to be watched (\(machine.runState.rawValue))")
        }
        var parameters = now.parameters
        if let limit = wishes.downtimeLimitMilliseconds {
            parameters.downtimeLimitMilliseconds = min(limit, MigrationParameters.longestDowntimeLimit)
        }
        let link = try DryRun.link(wishes.bandwidth, parameters)
        let isThrottled = wishes.autoConverge ?? now.capabilities.contains(.autoConverge)
        // One at a time: a later tracker of the same client ends the earlier.
        return try dryRuns.withLock { (_) throws(MigrationError) in
            try DryRun(memory: machine.memory, tracker: accelerator.dirtyTracker(for: .measurement))
                .run(link: link, parameters, autoConverge: isThrottled ? AutoConverge(parameters.autoConverge) : nil)
        }
    }

    /// Listens for a migration (`migrate-incoming`). Returns when the address is bound.
    /// - Parameter isLazy: pages of a `mapped-ram` file are read when the guest touches them; the file must stay as it is until then.
    public func acceptMigration(
        on address: MigrationAddress, startsGuest: Bool = true, isLazy: Bool = false
    ) throws(MigrationError) {
        try state.withLock { (state) throws(MigrationError) in
            guard machine.runState == .inMigrate else {
                throw MigrationError("migrate-incoming: '-incoming' was not specified on the command line")
            }
            guard state.incoming == nil else {
                throw MigrationError("migrate-incoming: the incoming migration has already been started")
            }
            let incoming = try IncomingMigration(
                machine, on: address, startsGuest: startsGuest, capabilities: state.capabilities,
                parameters: state.parameters,
                // What brings one connection brings no channels, whoever sent it.
                multifdChannels: address.canReconnect ? state.multifd?.channels : nil,
                tls: security.settings(state.parameters, "migrate-incoming"),
                allowsPlaintext: security.allowsPlaintext,
                descriptors: { [weak self] in self?.takeDescriptor($0) },
                mapped: .init(
                    threads: state.multifd?.channels, isDirect: state.parameters.usesDirectIO, isLazy: isLazy),
                report: { [weak self] in self?.report($0) })
            state.incoming = incoming
            try incoming.start()
        }
    }

    /// Goes on with a migration whose connection was lost (`migrate` with `resume`), over a new one to `address`.
    public func resume(to address: MigrationAddress) throws(MigrationError) {
        let outgoing = state.withLock { $0.outgoing }
        guard let outgoing, outgoing.isPaused else {
            throw MigrationError("migrate: Cannot resume if there is no paused migration")
        }
        guard address.canReconnect else {
            throw MigrationError("migrate: 'resume' needs tcp: or unix:, not \(address)")
        }
        try outgoing.resume(at: address)
    }

    /// Gives up a migration under way; the guest runs on here (`migrate_cancel`). At a destination whose source was lost, what is kept
    /// of it (`x-paused`). Without either, nothing happens.
    public func cancel() throws(MigrationError) {
        let (outgoing, incoming) = state.withLock { ($0.outgoing, $0.incoming) }
        incoming?.discard()
        guard let outgoing, outgoing.isUnderWay else { return }
        try outgoing.cancel()
    }

    /// Has the guest of a migration under way move now, and its memory follow (`migrate-start-postcopy`).
    public func startPostcopy() throws(MigrationError) {
        let (isOn, outgoing) = state.withLock { ($0.capabilities.contains(.postcopyRAM), $0.outgoing) }
        // Both sentences are QEMU's.
        guard isOn else {
            throw MigrationError("Enable postcopy with migrate_set_capability before the start of migration")
        }
        guard let outgoing, outgoing.isUnderWay else {
            throw MigrationError("Postcopy must be started after migration has been started")
        }
        try outgoing.startPostcopy()
    }

    /// Gives up the connection of a postcopy, on whichever side (`migrate-pause`): both sides pause, and can go on over another.
    public func pause() throws(MigrationError) {
        let (outgoing, incoming) = state.withLock { ($0.outgoing, $0.incoming) }
        if let outgoing, outgoing.isFollowed { return try outgoing.breakOff() }
        guard let incoming, [.postcopyActive, .postcopyRecover].contains(incoming.info().status) else {
            throw MigrationError(SourceCore.nothingToPause)
        }
        incoming.breakOff()
    }

    /// Where the source of a paused postcopy may come to go on (`migrate-recover`), instead of where it could before. Returns when the
    /// address is bound. May be said again, with another address, as long as nobody came.
    public func recover(on address: MigrationAddress) throws(MigrationError) {
        let (incoming, parameters) = state.withLock { ($0.incoming, $0.parameters) }
        // QEMU's sentence.
        guard let incoming, incoming.info().status == .postcopyPaused else {
            throw MigrationError("Migrate recover can only be run when postcopy is paused.")
        }
        let tls = try security.settings(parameters, "migrate-recover")
        try incoming.listen { () throws(ChannelError) in
            try Listener(
                on: address, tls: tls, allowsPlaintext: security.allowsPlaintext,
                descriptors: { [weak self] in self?.takeDescriptor($0) })
        }
    }

    /// Has a guest that moved with a safety net go on here (`x-postcopy-take-back`).
    public func takeBack() throws(MigrationError) {
        guard let outgoing = state.withLock({ $0.outgoing }), outgoing.isUnderWay || outgoing.isUnsettled else {
            throw MigrationError("x-postcopy-take-back: no guest has moved from here and waits for its memory")
        }
        try outgoing.takeBackGuest()
    }

    /// Has a guest that moved here with a safety net stay without its source, which will never take it back (`x-postcopy-keep`).
    public func keep() throws(MigrationError) {
        guard let incoming = state.withLock({ $0.incoming }), incoming.info().status == .postcopyPaused,
            incoming.info().safetyNet?.isOver == false
        else {
            throw MigrationError("x-postcopy-keep: no guest stands still here because its source could take it back")
        }
        try incoming.keepGuest()
    }

    /// Goes on from `pre-switchover` (`migrate-continue`).
    public func proceed() throws(MigrationError) {
        guard let outgoing = state.withLock({ $0.outgoing }), outgoing.info().status == .preSwitchover else {
            throw MigrationError("migrate-continue: no migration waits in state pre-switchover")
        }
        try outgoing.proceed()
    }

    /// Ends the doubt of an unsettled migration (`x-migrate-settle`).
    public func settle(_ settlement: Settlement) throws(MigrationError) {
        guard let outgoing = state.withLock({ $0.outgoing }), outgoing.isUnsettled else {
            throw MigrationError("x-migrate-settle: no migration is unsettled")
        }
        try outgoing.settle(settlement)
    }

    /// Gives up waiting for a migration, before the process ends.
    public func shutDown() {
        let (outgoing, incoming) = state.withLock { ($0.outgoing, $0.incoming) }
        if outgoing?.isUnderWay == true { try? outgoing?.cancel() }
        incoming?.giveUp()
        outgoing?.awaitFarewell()
    }

    /// What is known about the migration (`query-migrate`).
    public func info() -> MigrationInfo {
        let (outgoing, incoming) = state.withLock { ($0.outgoing, $0.incoming) }
        return outgoing?.info() ?? incoming?.info() ?? MigrationInfo()
    }
}
