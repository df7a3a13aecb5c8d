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
    private let faults: UserFault
    private let server: FaultServer
    /// Ends populating ahead, once.
    private let quiet: @Sendable () -> Void
    private let failed: @Sendable (String) -> Void
    /// Threads of the guest, which are to go on at once when their page is here; `nil`: nobody is in a hurry.
    private let guestThreads: [Int32]?

    private struct State {
        var isQuiet = false
        var isWatching = false
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
    ///   - failed: the watch over memory failed: one sentence.
    /// - Throws: `SystemError` with the remedy where userfaultfd cannot be had.
    init(
        _ memory: GuestMemory, blockTime: BlockTime?, guestThreads: [Int32]? = nil,
        quiet: @escaping @Sendable () -> Void,
        request: @escaping @Sendable ([PageRequest]) -> Void, failed: @escaping @Sendable (String) -> Void
    ) throws(SystemError) {
        self.memory = memory
        self.guestThreads = guestThreads
        self.quiet = quiet
        self.failed = failed
        pending = try PendingPages(memory, blockTime: blockTime)
        faults = try UserFault(wanting: [.missingShared, .threadID])
        if memory.blocks.contains(where: { $0.file != nil }), !faults.features.contains(.missingShared) {
            throw SystemError(
                "watch", "a memory file for missing pages", code: ENOSYS, remedy: "use --memory-backing anonymous")
        }
        server = try FaultServer(faults, memory, pending, request: request)
    }

    /// Why a machine cannot wait for its memory, with the remedy; `nil`: it can.
    static func obstacle(of machine: VirtualMachine) -> String? {
        do throws(SystemError) { _ = try UserFault.supportedFeatures() } catch { return error.description }
        // KVM's slots show a file through mappings of their own (`SlotWindows`), whose holes would be filled with zeroes unnoticed.
        guard machine.accelerator != nil, machine.memory.blocks.contains(where: { $0.file != nil }) else { return nil }
        return "vCPUs see a memory file in places that are not watched for missing pages; "
            + "start this machine with --memory-backing anonymous"
    }

    /// Forgets pages that will come again.
    func discard(_ discard: RAMDiscard) throws(SystemError) {
        guard let index = memory.blocks.firstIndex(where: { $0.name == discard.block }) else { return }
        beQuiet()
        for range in discard.ranges {
            let pages = RAMOffset(range.offset).page..<RAMOffset(range.offset + range.length).page
            try memory.blocks[index].discard(pages)
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
    func listen() throws(SystemError) {
        beQuiet()
        // Watched already when it fails half-way: `end` undoes it.
        state.withLock { $0.isWatching = true }
        for index in memory.blocks.indices {
            let block = memory.blocks[index]
            try faults.register(block.mapping, 0..<Int(block.byteCount), .missing)
            block.expect(pending.blocks[index])
        }
        guestThreads?.forEach { HostThread.takeShortTurns($0, true) }
        let thread = try HostThread(name: "fault-1") { [self] in
            // What it does is short, and somebody waits.
            if guestThreads != nil { _ = HostThread.runBeforeOthers() }
            do throws(SystemError) { try server.run() } catch {
                // A fault may be heard of and memory not be watched any more: whoever waited there was woken.
                if state.withLock({ $0.isWatching }) { failed("the watch over missing pages: \(error)") }
            }
        }
        state.withLock { $0.thread = thread }
    }

    /// For a thread that reads pages.
    func placer() throws(SystemError) -> PagePlacer { try PagePlacer(faults, memory, pending) }

    /// Waits a while for pages that are on their way; when all are here, ends the watch. Not while holding the core's lock.
    /// - Returns: how many are missing.
    func finish(waits: Bool) -> UInt64 {
        let missing =
            waits ? pending.waitUntilComplete(deadline: .after(seconds: Self.lastPagesSeconds)) : pending.missingPages
        if missing == 0 { end() }
        return missing
    }

    /// The guest does not start on what came: pages that still come are dropped, from here on.
    func abandon() {
        pending.abandon()
        end()
    }

    /// Memory is not watched any more: who still waits goes on, and finds zeroes where nothing came. Again and again without harm; not
    /// while holding the core's lock, nor on the thread that serves faults.
    func end() {
        let (wasWatching, thread) = state.withLock { state in
            defer { state.isWatching = false }
            return (state.isWatching, state.thread)
        }
        guard wasWatching else { return }
        for block in memory.blocks {
            // A block that was not registered yet refuses: nothing is to be undone there.
            try? faults.unregister(block.mapping, 0..<Int(block.byteCount))
            block.expect(nil)
            block.allowHugePages(true)
        }
        guestThreads?.forEach { HostThread.takeShortTurns($0, false) }
        server.end()
        thread?.join()
    }
}
