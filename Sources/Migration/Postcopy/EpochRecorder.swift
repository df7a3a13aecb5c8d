//! A guest that can be taken back, in the order in which it is met:
//!
//! `EpochRecorder` stands at the destination, where the guest runs: it takes what changed since a moment ago (an epoch) into an
//! `EpochBuffer`, sends it, and lets the world hear what the guest said in it only when the source has it. `EpochKeeper` stands at the
//! source: it has the last epoch whole, in memory and device state, and hands it out when the destination is lost. Who may run the guest
//! when is decided by `Protocol/SourceCore+SafetyNet` and `Protocol/DestinationCore+SafetyNet`.

import Accelerator
import GuestMemory
import Host
import Machine
import MigrationStream
import Synchronization
import Transport

/// Gives a running guest back to its source, epoch by epoch. Two threads: `epoch-take` stops the guest for a moment and copies,
/// `epoch-send` writes to the source; so a source that takes nothing holds up neither the guest nor who lets it go.
final class EpochRecorder: Sendable {
    private struct State {
        /// The guest is about to run here.
        var isArmed = false
        /// It may, as long as epochs reach the source.
        var isOn = false
        var isOver = false
        /// Nobody hears any more what is held back.
        var isForsaken = false
        var link: (id: ConnectionID, channel: Channel)?
        /// What the source said on this link.
        var kept: UInt64?
        /// The epoch that was taken last; `isOpen`: it is not known whether the source has it.
        var taken: UInt64 = 0
        var isOpen = false
        /// On this link.
        var isSent = false
        /// The source is to hear that the guest stays here, and heard it on this link.
        var (mustSayStays, staysIsSaid) = (false, false)
        /// The guest said so much that it waits for the end of its epoch.
        var isTooMuch = false
        /// Its state is being read.
        var isCapturing = false
        var figures = MigrationInfo.SafetyNet()
    }

    private let machine: VirtualMachine
    private let tracker: (any DirtyTracker)?
    private let pending: PendingPages
    private let epochNanoseconds: UInt64
    private let state = Monitor(State())
    /// Of the epoch that was taken last; written while none is open.
    private let buffer = Mutex(EpochBuffer())
    /// Told of a link that is of no use any more, or, without one, why no epoch can be taken.
    private let failed: @Sendable (ConnectionID?, String) -> Void

    /// A guest whose last epoch is not kept for so long stands still.
    private static let longestAheadNanoseconds: UInt64 = 1_000_000_000
    /// Until what the guest asked for is done, such as a reset.
    private static let pauseNanoseconds: UInt64 = 2_000_000

    /// - Throws: `AcceleratorError` where the guest's writes cannot be told.
    init(
        _ machine: VirtualMachine, _ pending: PendingPages, epochMilliseconds: UInt64,
        failed: @escaping @Sendable (ConnectionID?, String) -> Void
    ) throws(AcceleratorError) {
        self.machine = machine
        self.pending = pending
        self.failed = failed
        epochNanoseconds = epochMilliseconds * 1_000_000
        tracker = machine.accelerator?.dirtyTracker(for: .safetyNet)
        // While the guest still runs at the source: turning a log on takes its time.
        guard let tracker else { return }
        try tracker.start()
        // What was there before is there at the source, too.
        try tracker.collect(into: try tracker.makePages())
    }

    var figures: MigrationInfo.SafetyNet {
        state.wait { state in
            var figures = state.figures
            figures.isOver = state.isOver
            return .some(figures)
        } ?? MigrationInfo.SafetyNet()
    }

    // MARK: What the core decides

    /// The guest is about to run here: from now on nothing it says is heard at once. - Throws: `SystemError`: no thread is to be had.
    func arm() throws(SystemError) {
        let isFirst = state.withLock { state in
            defer { state.isArmed = true }
            return !state.isArmed && !state.isOver
        }
        guard isFirst else { return }
        machine.holdOutput { [weak self] in self?.outputIsTooMuch() }
        _ = try HostThread.detached(name: "epoch-take") { [self] in take() }
        _ = try HostThread.detached(name: "epoch-send") { [self] in send() }
    }

    func goOn() { state.withLock { $0.isOn = true } }

    /// The source is lost: the guest stands still until there is another link, or it is known that it stays here.
    func pause() {
        state.withLock { state in
            guard state.isArmed, !state.isOver else { return }
            // The link is whoever's reads it: another one may be there already.
            (state.isOn, state.mustSayStays) = (false, false)
            machine.hold()
        }
    }

    /// Nothing is given back any more: all that was said is heard, and the guest runs.
    /// - Returns: whether anything was.
    @discardableResult
    func end() -> Bool {
        let wasArmed = state.withLock { state in
            // No hold comes behind this one's end.
            state.isOver = true
            if !state.isCapturing { machine.endHold() }
            return state.isArmed
        }
        // Else the thread that collects does it.
        if wasArmed { machine.endHoldingOutput() } else { tracker?.stop() }
        return wasArmed
    }

    /// The process ends: what is held back was never said.
    func forsake() {
        state.withLock { state in
            state.isForsaken = true
            state.isOver = true
        }
    }

    /// The guest stays here: the source need not be able to take it back any more. It answers with RELEASED.
    func sayStays() {
        let isAlone = state.withLock { state in
            state.mustSayStays = true
            return state.isOver
        }
        // Nothing else is said there.
        if isAlone { sendAlone() }
    }

    private func sendAlone() { _ = try? HostThread.detached(name: "epoch-send") { [self] in send() } }

    // MARK: The link

    /// A channel to a source that can take the guest back.
    func attach(_ id: ConnectionID, _ channel: Channel) {
        let isAlone = state.withLock { state in
            // One whose thread was slow is closed by now.
            if let link = state.link, link.id.rawValue > id.rawValue { return false }
            state.link = (id, channel)
            state.kept = nil
            (state.isSent, state.staysIsSaid) = (false, false)
            return state.isOver && state.mustSayStays
        }
        if isAlone { sendAlone() }
    }

    func detach(_ id: ConnectionID) { state.withLock { if $0.link?.id == id { $0.link = nil } } }

    /// - Returns: what is wrong with that; the link is of no use then.
    func heard(kept epoch: UInt64, on id: ConnectionID) -> String? {
        let (released, fault) = state.withLock { state -> (Bool, String?) in
            guard state.link?.id == id else { return (false, nil) }
            let known = state.isOpen ? state.taken - 1...state.taken : state.taken...state.taken
            guard known.contains(epoch) else {
                return (false, "the source has epoch \(epoch), and epoch \(state.taken) was taken last")
            }
            state.kept = epoch
            guard state.isOpen, epoch == state.taken else { return (false, nil) }
            state.isOpen = false
            state.figures.epochs = epoch
            return (!state.isForsaken, nil)
        }
        if released { machine.releaseOutput(upTo: epoch) }
        return fault
    }

    private func outputIsTooMuch() {
        state.withLock { state in
            guard !state.isOver else { return }
            state.isTooMuch = true
            machine.hold()
        }
    }

    // MARK: The thread that takes

    private func take() {
        HostThread.sleepExactly()
        var pages: [any DirtyPages] = []
        do throws(AcceleratorError) { pages = try tracker?.makePages() ?? [] } catch {
            tracker?.stop()
            return failed(nil, "x-postcopy-safety-net: \(error.description)")
        }
        // When the guest was let go in the epoch under way.
        var began: UInt64?
        while let now = letRun() {
            guard waitForEnd(of: began ?? now) else {
                began = nil
                continue
            }
            // Behind who still sends the last one: a source may say that it has what it does not read.
            buffer.withLock { $0.removeAll() }
            guard beginCapture() else { continue }
            let isTaken = capture(&pages)
            endCapture()
            if isTaken { began = goOnAhead() } else { Clock.sleep(nanoseconds: Self.pauseNanoseconds) }
        }
        tracker?.stop()
        buffer.withLock { $0.release() }
    }

    /// Whoever says that nothing is given back any more has let the guest go for good.
    private func hold() { state.withLock { if !$0.isOver { machine.hold() } } }

    /// From here on nobody but this thread lets the guest go: the kernel has who asks for a vCPU's state wait for as long as it runs.
    private func beginCapture() -> Bool {
        state.withLock { state in
            guard !state.isOver else { return false }
            machine.hold()
            state.isCapturing = true
            return true
        }
    }

    private func endCapture() {
        state.withLock { state in
            state.isCapturing = false
            if state.isOver { machine.endHold() }
        }
    }

    /// Waits until the guest may run, and lets it. - Returns: that moment; `nil`: nothing is given back any more.
    private func letRun() -> UInt64? {
        state.wait { state -> UInt64?? in
            if state.isOver { return .some(nil) }
            guard state.isOn, state.kept != nil, state.link != nil, !state.isOpen else { return nil }
            // Else it waits for the end of this epoch.
            if !state.isTooMuch { machine.endHold() }
            return .some(Clock.monotonicNanoseconds)
        } ?? nil
    }

    /// - Returns: whether the epoch is to be taken; false: the source is lost, or nothing is given back any more.
    private func waitForEnd(of began: UInt64) -> Bool {
        let now = Clock.monotonicNanoseconds
        let left = epochNanoseconds - min(epochNanoseconds, now - min(began, now))
        return state.wait(deadline: .after(nanoseconds: left)) { state -> Bool? in
            if state.isOver || !state.isOn { return false }
            return state.isTooMuch ? true : nil
        } ?? true
    }

    /// The guest is in its next epoch while the last one travels; not for long, if that does not arrive.
    /// - Returns: when it was let go.
    private func goOnAhead() -> UInt64 {
        state.withLock { state in if state.isOn, !state.isOver { machine.endHold() } }
        let began = Clock.monotonicNanoseconds
        let isKept: Void? = state.wait(deadline: .after(nanoseconds: Self.longestAheadNanoseconds)) { state in
            state.isOver || !state.isOn || !state.isOpen ? () : nil
        }
        if isKept == nil { hold() }
        return began
    }

    /// Copies what changed. - Returns: whether there is an epoch.
    private func capture(_ pages: inout [any DirtyPages]) -> Bool {
        let began = Clock.monotonicNanoseconds
        do {
            let (epoch, isAwaited) = (
                state.withLock { $0.taken + 1 }, { [state] in state.withLock { $0.isOn && !$0.isOver } }
            )
            let count = try machine.whileHeld(awaited: isAwaited) { guestRuns throws -> UInt64 in
                try tracker?.collect(into: pages)
                let count = try buffer.withLock { buffer in
                    let count = try copy(pages, into: &buffer)
                    for state in try machine.saveState() {
                        let section = DeviceSection(
                            name: state.name, instance: state.instance, version: state.version, body: state.body)
                        try buffer.append(EpochMessage.section(section).bytes)
                    }
                    try buffer.append(EpochMessage.end(epoch: epoch, guestRuns: guestRuns).bytes)
                    return count
                }
                for record in pages { record.removeAll() }
                machine.cutOutput(epoch: epoch)
                return count
            }
            guard let count else { return false }
            let (paused, bytes) = (Clock.monotonicNanoseconds - began, buffer.withLock { $0.byteCount })
            state.withLock { state in
                (state.taken, state.isOpen, state.isSent, state.isTooMuch) = (epoch, true, false, false)
                state.figures.add(pages: count, bytes: UInt64(bytes), paused: paused)
            }
            return true
        } catch {
            failed(nil, "x-postcopy-safety-net: \(error)")
            return false
        }
    }

    /// - Returns: how many pages.
    private func copy(_ pages: [any DirtyPages], into buffer: inout EpochBuffer) throws(SystemError) -> UInt64 {
        var count: UInt64 = 0
        for (index, record) in pages.enumerated() {
            let mapping = machine.memory.blocks[index].mapping
            var run = EpochRun()
            var position = PageIndex(0)
            while let next = record.nextRun(from: position, limit: .max) {
                for page in next {
                    // One that is still to come was not written, whatever is said: nobody could.
                    guard try pending.waitUntilTold(page, of: index) else { continue }
                    count += 1
                    let isZero = mapping.isZero(at: Int(page.offset.value), count: Int(GuestPage.byteCount))
                    guard !run.extend(by: page.value, isZero: isZero) else { continue }
                    try run.append(to: &buffer, block: index, from: mapping)
                    run = EpochRun(pages: page.value..<page.value + 1, isZero: isZero)
                }
                position = next.upperBound
            }
            try run.append(to: &buffer, block: index, from: mapping)
        }
        return count
    }

    // MARK: The thread that sends

    private func send() {
        while let (link, isEpoch) = nextWord() {
            do throws(ChannelError) {
                guard isEpoch else {
                    try link.channel.send(EpochMessage.stays.bytes)
                    continue
                }
                try buffer.withLock { (buffer) throws(ChannelError) in
                    try buffer.forEachPiece { (chunk, count) throws(ChannelError) in
                        var vector = IOVector()
                        vector.append(chunk, offset: 0, count: count)
                        try link.channel.send(&vector)
                    }
                }
            } catch { failed(link.id, error.description) }
        }
    }

    /// - Returns: where to say what: an epoch, or that the guest stays; `nil`: there is no more to say.
    private func nextWord() -> (link: (id: ConnectionID, channel: Channel), isEpoch: Bool)? {
        state.wait { state -> (link: (id: ConnectionID, channel: Channel), isEpoch: Bool)?? in
            if let link = state.link, state.mustSayStays, !state.staysIsSaid {
                state.staysIsSaid = true
                return .some((link, false))
            }
            if state.isOver { return .some(nil) }
            guard state.isOpen, !state.isSent, state.kept.map({ $0 < state.taken }) == true, let link = state.link
            else { return nil }
            state.isSent = true
            return .some((link, true))
        } ?? nil
    }
}

/// Pages side by side, all of zeroes or none.
private struct EpochRun {
    var pages: Range<UInt64> = 0..<0
    var isZero = false

    /// - Returns: whether the page belongs to it.
    mutating func extend(by page: UInt64, isZero: Bool) -> Bool {
        guard !pages.isEmpty, pages.upperBound == page, self.isZero == isZero else { return false }
        pages = pages.lowerBound..<page + 1
        return true
    }

    func append(to buffer: inout EpochBuffer, block: Int, from memory: Mapping) throws(SystemError) {
        guard !pages.isEmpty else { return }
        guard isZero else { return try buffer.append(pages: pages, of: block, from: memory) }
        let count = pages.upperBound - pages.lowerBound
        try buffer.append(EpochMessage.zeroes(block: block, first: pages.lowerBound, count: count).bytes)
    }
}
