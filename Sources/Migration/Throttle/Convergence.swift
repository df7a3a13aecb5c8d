import Accelerator
import GuestMemory
import Host
import Machine
import Synchronization

/// What one migration does about a guest that writes too much, and what it says about its own end.
///
/// It is told what each collect found, on the thread `migration`, and sets the throttle or the dirty limit. The verdict is reckoned when
/// somebody asks for it, on the thread of whoever asks, so that it costs a migration nobody watches nothing.
final class Convergence: Sendable {
    /// How the guest is slowed down.
    enum Means: Sendable { case none, throttle, dirtyLimit }

    private struct State {
        var throttle: AutoConverge
        var limitTrigger: ConvergenceTrigger
        var limit: UInt64
        var isLimited = false
        var history: RoundHistory
        var policy: SwitchoverPolicy
        var maxBandwidth: UInt64
        /// At the last collect.
        var collectedAt: UInt64?
        var sentBytes: UInt64 = 0
        var sentPages: UInt64 = 0
        var wholePages: UInt64 = 0
        var remainingPages: UInt64 = 0
        var isOver = false
        /// How often parameters changed.
        var changes = 0
        var throttleTimePerRound: UInt64 = 0
        var ringFullTime: UInt64 = 0
    }
    private let state: Mutex<State>
    private let latest = Mutex<(verdict: ConvergenceVerdict, collectedAt: UInt64, changes: Int)?>(nil)
    private let means: Means
    private let accelerator: (any Accelerator)?
    private let began = Clock.monotonicNanoseconds
    /// As many collects must have been seen before anything is said.
    private static let fewestCollects = 2
    private static let chunkPages: UInt64 = 1 << 14

    init(_ machine: VirtualMachine, _ parameters: MigrationParameters, means: Means) {
        accelerator = machine.accelerator
        self.means = means
        let chunks = (machine.memory.byteCount / 4096 + Self.chunkPages - 1) / Self.chunkPages
        state = Mutex(
            State(
                throttle: AutoConverge(parameters.autoConverge),
                limitTrigger: ConvergenceTrigger(periodNanoseconds: 0), limit: 0,
                history: RoundHistory(chunkCount: Int(min(chunks, 1 << 20))), policy: SwitchoverPolicy(),
                maxBandwidth: 0))
        update(parameters)
    }

    /// The operator changed parameters.
    func update(_ parameters: MigrationParameters) {
        state.withLock { state in
            state.throttle.settings = parameters.autoConverge
            state.limitTrigger.thresholdPercent = parameters.autoConverge.triggerThreshold
            state.limitTrigger.periodNanoseconds = parameters.vcpuDirtyLimitPeriodMilliseconds * 1_000_000
            let isNewLimit = state.limit != parameters.vcpuDirtyLimitMegabytes
            state.limit = parameters.vcpuDirtyLimitMegabytes
            // A migration that is over is still told of new parameters: its guest is free.
            if isNewLimit, state.isLimited, !state.isOver { setLimit(state.limit << 20) }
            state.policy.downtimeLimitNanoseconds = parameters.downtimeLimitMilliseconds * 1_000_000
            let available = parameters.availableSwitchoverBytesPerSecond
            state.policy.availableBytesPerSecond = available > 0 ? available : nil
            state.maxBandwidth = parameters.maxBandwidthBytesPerSecond
            state.changes += 1
        }
    }

    // MARK: From the migration

    /// The dirty pages were collected while the guest ran. - Parameter info: what had been sent by then.
    func collected(remainingPages: UInt64, _ info: MigrationInfo) {
        guard let ram = info.ram else { return }
        // Those that went as differences, or were as before, are settled like the others.
        let deltas = info.xbzrle.map { $0.pages - min($0.pages, $0.overflows) } ?? 0
        let (bytes, pages, now) = (ram.transferred, ram.normal + ram.duplicate + deltas, Clock.monotonicNanoseconds)
        state.withLock { state in
            guard !state.isOver else { return }
            defer {
                (state.collectedAt, state.sentBytes, state.sentPages) = (now, bytes, pages)
                state.wholePages = ram.normal
                state.remainingPages = remainingPages
            }
            guard let before = state.collectedAt else { return state.history.began(pages: remainingPages) }
            let sent = (bytes: bytes - min(bytes, state.sentBytes), pages: pages - min(pages, state.sentPages))
            let left = state.remainingPages - min(state.remainingPages, sent.pages)
            let fresh = remainingPages - min(remainingPages, left)
            state.history.collected(
                remaining: remainingPages, sentPages: sent.pages,
                wholePages: ram.normal - min(ram.normal, state.wholePages), sentBytes: sent.bytes,
                seconds: Double(now - before) / 1e9, pace: 1 - Double(state.throttle.percentage) / 100)
            slowDown(&state, dirtyBytes: fresh * 4096, sentBytes: sent.bytes, nanoseconds: now - before)
        }
    }

    private func slowDown(_ state: inout State, dirtyBytes: UInt64, sentBytes: UInt64, nanoseconds: UInt64) {
        switch means {
        case .none: break
        case .throttle:
            let before = state.throttle.percentage
            let percentage = state.throttle.collected(
                dirtyBytes: dirtyBytes, sentBytes: sentBytes, nanoseconds: nanoseconds)
            // A host without a thread to spare: the guest is as fast as it was, and the migration goes on.
            if percentage != before { try? accelerator?.throttle(to: Int(percentage)) }
        case .dirtyLimit:
            let fired = state.limitTrigger.collected(
                dirtyBytes: dirtyBytes, sentBytes: sentBytes, nanoseconds: nanoseconds)
            if fired != nil, !state.isLimited {
                state.isLimited = true
                setLimit(state.limit << 20)
            }
            if state.isLimited { measureLimit(&state) }
        }
    }

    private func setLimit(_ bytesPerSecond: UInt64?) {
        try? accelerator?.dirtyRateControl?.setLimit(bytesPerSecond, of: nil)
    }

    /// QEMU's figures, by what the limit does now: a round is the time in which a vCPU would fill its ring.
    private func measureLimit(_ state: inout State) {
        guard let limits = accelerator?.dirtyRateControl?.limits, !limits.isEmpty,
            let entries = accelerator?.dirtyTracking.ringEntries
        else { return }
        let mean = limits.reduce(0.0) { $0 + Double($1.currentBytesPerSecond) } / Double(limits.count)
        guard mean > 0 else { return }
        let microseconds = Double(entries) * 4096 / mean * 1e6
        state.ringFullTime = UInt64(min(microseconds, 1e15))
        let most = limits.map(\.pausedShare).max() ?? 0
        state.throttleTimePerRound = UInt64(min(microseconds * most, 1e15))
    }

    /// The connection is lost: nobody is helped by a slow guest. What is learnt begins anew with the next collect.
    func pause() {
        let wasLimited = state.withLock { state in
            defer { state.isLimited = false }
            state.collectedAt = nil
            // Or a guest that runs freely would count as throttled from then on.
            state.throttle = AutoConverge(state.throttle.settings)
            return state.isLimited
        }
        if means == .throttle { try? accelerator?.throttle(to: 0) }
        if wasLimited { setLimit(nil) }
    }

    /// The migration is over, or given up: the guest is as fast as it was.
    func end() {
        let wasLimited = state.withLock { state -> Bool? in
            guard !state.isOver else { return nil }
            state.isOver = true
            return state.isLimited
        }
        guard let wasLimited else { return }
        if means == .throttle { try? accelerator?.throttle(to: 0) }
        if wasLimited { setLimit(nil) }
    }

    // MARK: For those who ask

    /// Adds what this knows to the figures of a migration.
    func describe(_ info: inout MigrationInfo) {
        let isActive = info.status == .active || info.status == .preSwitchover || info.status == .device
        let now = state.withLock { $0 }
        if isActive, means == .throttle, now.throttle.percentage > 0, !now.isOver {
            info.throttlePercentage = now.throttle.percentage
        }
        if isActive, now.isLimited {
            info.dirtyLimitThrottleMicroseconds = now.throttleTimePerRound
            info.dirtyLimitRingFullMicroseconds = now.ringFullTime
        }
        if info.status == .active { info.verdict = verdict(now) }
    }

    /// The latest verdict. The lock is another than the migration's, which waits for nobody who asks.
    private func verdict(_ now: State) -> ConvergenceVerdict {
        guard let collectedAt = now.collectedAt else { return ConvergenceVerdict(.observing) }
        var verdict = latest.withLock { latest -> ConvergenceVerdict in
            if let known = latest, known.collectedAt == collectedAt, known.changes == now.changes {
                return known.verdict
            }
            let verdict = reckon(now, collectedAt)
            latest = (verdict, collectedAt, now.changes)
            return verdict
        }
        let since = Clock.monotonicNanoseconds - collectedAt
        verdict.remainingNanoseconds = verdict.remainingNanoseconds.map { $0 - min($0, since) }
        return verdict
    }

    private func reckon(_ now: State, _ collectedAt: UInt64) -> ConvergenceVerdict {
        guard now.history.collectCount >= Self.fewestCollects, let rate = now.history.linkBytesPerSecond,
            let (model, dirty) = now.history.model()
        else { return ConvergenceVerdict(.observing) }
        var link = ConvergenceForecast.Link(bytesPerSecond: rate)
        let cap = Double(now.maxBandwidth)
        // A round of little is over before pacing bites.
        if cap > 0 { link.bytesPerSecond = min(rate, cap * 1.05) }
        link.bytesPerPage = now.history.bytesPerPage
        var forecast = ConvergenceForecast(model: model, link: link, policy: now.policy)
        forecast.dirtyPages = dirty
        forecast.chunkCount = now.history.chunkCount
        if means == .throttle { forecast.autoConverge = now.throttle }
        // Few rounds leave much open: what gets shorter is not given up.
        if now.history.mayShrink, !forecast.outcome().converges { return ConvergenceVerdict(.observing) }
        var worst = forecast
        if let (model, dirty) = now.history.model(worst: true) {
            worst.model = model
            worst.dirtyPages = dirty
        }
        return ConvergenceVerdict(
            forecast, worst: worst, elapsedSeconds: Double(collectedAt - min(collectedAt, began)) / 1e9,
            isCapped: cap > 0 && rate > cap * 0.8)
    }
}
