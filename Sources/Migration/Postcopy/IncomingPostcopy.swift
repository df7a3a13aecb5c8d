import Accelerator
import Glibc
import GuestMemory
import Host
import Machine
import MigrationStream
import Synchronization

/// One migration's postcopy at the destination: what is still to come, the watch over memory, and the thread that asks for pages.
///
/// Whoever touches guest memory here may sleep until a page comes: a vCPU, a QMP command, who loads device state. So nothing that brings
/// pages (the threads that read connections, `fault-1`) takes a lock that such a thread may hold.
final class IncomingPostcopy: Sendable {
    let pending: PendingPages
    private let memory: GuestMemory
    private let accelerator: (any Accelerator)?
    private let watched: WatchedMemory
    private let server: FaultServer
    private let collapser: Collapser
    /// Blocks of hugetlb pages, by index.
    private let splits: [Int: SplitBlock]
    /// Ends populating ahead, once.
    private let quiet: @Sendable () -> Void
    private let failed: @Sendable (String) -> Void
    /// Threads of the guest, which are to go on at once when their page is here; `nil`: nobody is in a hurry.
    private let guestThreads: [Int32]?

    private enum Watch {
        case notYet
        case on
        case over
    }

    private struct State {
        var isQuiet = false
        var watch = Watch.notYet
        var thread: HostThread?
    }
    private let state = Mutex(State())
    /// How long pages that are on their way behind the stream's end are waited for.
    private static let lastPagesSeconds: UInt64 = 10

    /// - Parameters:
    ///   - blockTime: if that is to be measured.
    ///   - guestThreads: the kernel's ids; `nil`: requested pages have no precedence in this host.
    ///   - quiet: called before the first page is forgotten; then nothing but this puts memory behind blocks.
    ///   - request: asks the source, from the thread that heard of the faults.
    ///   - hugeShare: told what share of allocated RAM is huge, once all is here and was made huge as far as it goes.
    ///   - failed: the watch over memory failed: one sentence.
    /// - Throws: `SystemError` with the remedy where userfaultfd cannot be had.
    init(
        _ memory: GuestMemory, _ accelerator: (any Accelerator)?, blockTime: BlockTime?, guestThreads: [Int32]? = nil,
        quiet: @escaping @Sendable () -> Void,
        request: @escaping @Sendable ([PageRequest]) -> Void, hugeShare: @escaping @Sendable (Double) -> Void,
        failed: @escaping @Sendable (String) -> Void
    ) throws(SystemError) {
        self.memory = memory
        self.accelerator = accelerator
        self.guestThreads = guestThreads
        self.quiet = quiet
        self.failed = failed
        pending = try PendingPages(memory, blockTime: blockTime)
        watched = try WatchedMemory(memory, wanting: [.missingShared, .threadID, .writeProtection, .move])
        var splits: [Int: SplitBlock] = [:]
        for index in memory.blocks.indices {
            splits[index] = try SplitBlock(watched, memory, index, pending.blocks[index])
        }
        self.splits = splits
        collapser = Collapser(memory, pending, splits, report: hugeShare)
        server = try FaultServer(watched, memory, pending, splits, request: request)
    }

    /// Why a machine cannot wait for its memory, with the remedy; `nil`: it can.
    static func obstacle(of machine: VirtualMachine) -> String? {
        do throws(SystemError) {
            let features = try UserFault.supportedFeatures()
            let blocks = machine.memory.blocks
            if blocks.contains(where: { $0.pageBytes > GuestPage.byteCount }), !features.contains(.writeProtection) {
                return
                    "this kernel cannot stop writes, which it takes to make memory huge again; start this machine with "
                    + "--memory-backing anonymous"
            }
            guard blocks.contains(where: { $0.hasWindows }), !features.contains(.missingShared) else { return nil }
            return "this kernel does not tell of missing pages of memory files; start this machine with "
                + "--memory-backing anonymous"
        } catch { return error.description }
    }

    /// Forgets pages that will come again.
    func discard(_ discard: RAMDiscard) throws(SystemError) {
        guard let index = memory.blocks.firstIndex(where: { $0.name == discard.block }) else { return }
        beQuiet()
        for range in discard.ranges {
            let pages = RAMOffset(range.offset).page..<RAMOffset(range.offset + range.length).page
            if let split = splits[index] { try split.expect(pages) } else { try memory.blocks[index].discard(pages) }
            pending.expect(pages, of: index)
        }
    }

    /// Huge pages would be made of what is there, with zeroes for what is missing.
    private func beQuiet() {
        let isFirst = state.withLock { state in
            defer { state.isQuiet = true }
            return !state.isQuiet
        }
        guard isFirst else { return }
        quiet()
        for block in memory.blocks { block.allowHugePages(false) }
    }

    /// From here on whoever touches a missing page waits for it.
    /// - Parameter asksWholePages: the source sends, and is asked for, whole pages of its memory.
    func listen(asksWholePages: Bool) throws(SystemError) {
        beQuiet()
        if asksWholePages { server.askForWholePages() }
        // Watched already when it fails half-way: `end` undoes it.
        state.withLock { $0.watch = .on }
        for index in memory.blocks.indices {
            let block = memory.blocks[index]
            if let split = splits[index] {
                try split.watch()
                block.expect(split)
                continue
            }
            try watched.faults.register(block.mapping, 0..<Int(block.byteCount), .missing)
            block.expect(pending.blocks[index])
            // Watched memory is filled up by nobody; and what is complete can only be made huge where that is allowed.
            block.allowHugePages(true)
        }
        try watched.watchWindows(of: accelerator)
        guestThreads?.forEach { HostThread.takeShortTurns($0, true) }
        let thread = try HostThread(name: "fault-1") { [self] in
            // What it does is short, and somebody waits.
            if let guestThreads { HostThread.runUrgently(among: guestThreads.count) }
            do throws(SystemError) { try server.run() } catch {
                // A fault may be heard of and memory not be watched any more: whoever waited there was woken.
                if state.withLock({ $0.watch == .on }) { failed("the watch over missing pages: \(error)") }
            }
        }
        state.withLock { $0.thread = thread }
        try collapser.start { [self] in allIsHuge() }
    }

    /// For a thread that reads pages.
    /// - Parameter inOrder: they come in the order of memory, but for what is asked for. One such thread at a time.
    func placer(inOrder: Bool) throws(SystemError) -> PagePlacer {
        let placement = PagePlacement(watched: watched, memory: memory, pending: pending)
        guard inOrder else { return try PagePlacer(placement) }
        let awake = guestThreads.flatMap { _ in try? AwakeProcessors() }
        // Without, pages are placed one by one.
        let staged = try? StagedHugePage(placement)
        if let staged { server.look(in: staged) }
        return try PagePlacer(placement, staged: staged, awake: awake)
    }

    /// Waits a while for pages that are on their way; when all are here, ends the watch. Not while holding the core's lock.
    /// - Returns: how many are missing.
    func finish(waits: Bool) -> UInt64 {
        let missing =
            waits ? pending.waitUntilComplete(deadline: .after(seconds: Self.lastPagesSeconds)) : pending.missingPages
        if missing == 0 {
            end(isComplete: true)
        }
        return missing
    }

    /// The guest does not start on what came: pages that still come are dropped, from here on.
    /// - Throws: `SystemError`: what came before is not all there any more; no guest may ever start on this memory.
    func abandon() throws(SystemError) {
        pending.abandon()
        if let damage = end() { throw damage }
    }

    /// The process ends, or the migration failed: who waits for a page that is missing is told that it does not come, and no vCPU ever
    /// sees zeroes in its place.
    /// - Parameter retire: has no vCPU enter the guest any more, and does not wait for those that sleep in it.
    func forsake(retire: () -> Void) {
        if pending.missingPages > 0 {
            // First: whoever is woken by what follows finds this done.
            retire()
            for block in memory.blocks { block.forsake() }
        }
        end()
    }

    /// Memory is not watched any more: who still waits goes on, and finds zeroes where nothing came. Again and again without harm; not
    /// while holding the core's lock, nor on the thread that serves faults.
    /// - Parameter isComplete: nothing is missing; what is to become huge is still watched until it is.
    /// - Returns: why memory is not what came, if it is not.
    @discardableResult
    func end(isComplete: Bool = false) -> SystemError? {
        let (before, thread) = state.withLock { state in
            defer { state.watch = .over }
            return (state.watch, state.thread)
        }
        switch before {
        case .over: return nil
        case .notYet: return restore()
        case .on: break
        }
        for (index, block) in memory.blocks.enumerated() where splits[index] == nil {
            // A block that was not registered yet refuses: nothing is to be undone there.
            try? watched.faults.unregister(block.mapping, 0..<Int(block.byteCount))
            block.expect(nil)
            block.allowHugePages(true)
        }
        watched.endWindows()
        guestThreads?.forEach { HostThread.takeShortTurns($0, false) }
        var damage: SystemError?
        if isComplete {
            collapser.streamEnded()
        } else {
            for split in splits.values { split.unwatch() }
            collapser.abandon()
            damage = restore()
        }
        // Last: a change of the layout that is under way may have slept for a page.
        try? accelerator?.watchWindows(nil)
        guard !isComplete || splits.isEmpty else { return damage }
        server.end()
        thread?.join()
        return damage
    }

    /// Blocks of hugetlb pages show them again. - Returns: why some do not.
    private func restore() -> SystemError? {
        var damage: SystemError?
        for (index, split) in splits {
            do throws(SystemError) { try split.restore() } catch { damage = damage ?? error }
            memory.blocks[index].expect(nil)
        }
        return damage
    }

    /// On the thread `collapse`, behind the stream. Where something could not be made huge, its faults are served for good.
    private func allIsHuge() {
        guard !splits.isEmpty, splits.values.allSatisfy({ $0.splitUnits.isEmpty }) else { return }
        for index in splits.keys { memory.blocks[index].expect(nil) }
        let thread = state.withLock { $0.thread }
        server.end()
        thread?.join()
    }
}
