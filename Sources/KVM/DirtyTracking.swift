import Accelerator
import GuestMemory
import Host
import Synchronization

/// What finds written pages: KVM's log, or its rings. Called under the lock of `DirtyTracking`, unless it says otherwise.
protocol DirtySource: AnyObject, Sendable {
    /// `log` or `ring`.
    var method: String { get }
    /// CPU time of threads that harvest beside the trackers' calls, in nanoseconds. From any thread.
    var otherCPUNanoseconds: UInt64 { get }
    /// Grows with what is found out.
    var mark: UInt64 { get }
    /// An empty record of the kind that suits.
    func makeRecord(pageCount: UInt64) throws(SystemError) -> any DirtyPages
    /// Tracking begins: no slot is logged yet.
    func begin() throws(AcceleratorError)
    /// Tracking has ended: no slot is logged any more.
    func end()
    /// The log of a slot was turned on. What is allocated now is reported, at once or by the next `collect`.
    func wasTurnedOn(_ slot: Slot, _ report: DirtyReport) throws(AcceleratorError)
    /// Reports what was written in these slots, which are all that are logged.
    func collect(_ slots: [Slot], for client: DirtyClient, _ report: DirtyReport) throws(AcceleratorError)
    /// The marked pages of the chunk are watched afresh from now on; what is found out on the way goes to the others, and to `pending`
    /// of the asker.
    func willSend(_ chunk: DirtyChunk, _ slots: [Slot], others: DirtyReport) throws(AcceleratorError)
    /// See `SlotObserver`.
    func willChange(_ old: Slot, to new: Slot?, isOn: Bool, _ report: DirtyReport) throws(AcceleratorError)
    /// What appears in that slot, which is logged, need not have been written by the guest: nothing is made of it.
    func ignoreWhatAppears(in slot: Slot, _ report: DirtyReport) throws(AcceleratorError)
}

/// Pages that a client is about to read.
struct DirtyChunk {
    /// Starts at a multiple of 64.
    let pages: Range<PageIndex>
    let block: Int
    /// What the client collected and has not sent.
    let marked: any DirtyPages
    /// What was found out since for this client, one record per block.
    let pending: [any DirtyPages]
    /// The source's `mark` at the client's last collect.
    let mark: UInt64

    /// The marked pages were written, found out, and are watched afresh since: they are read after this, so nothing is to be sent twice.
    func forgetMarked() {
        pending[block].clear(pending[block].words(inCommonWith: marked, in: pages), from: pages.lowerBound)
    }
}

/// Dirty tracking of a machine: one source of reports, and several clients which each hear of every written page.
///
/// A client has a record per RAM block of what was found out and not yet collected by it (`pending`). Whatever asks the source, for
/// whichever client, the answer goes to all; so nothing is lost for one when another asks.
///
/// Slots in which nothing is allocated are not logged: nobody can have written there. When a page appears in one, its log is turned on
/// first and everything found in it afterwards counts as written.
final class DirtyTracking: SlotObserver, @unchecked Sendable {
    /// What is kept for a client while it tracks.
    private final class Record {
        let tracker: KVMDirtyTracker
        let pending: [any DirtyPages]
        /// It was told of every page that was ever touched.
        var hasAll = false
        /// The source's at the last collect.
        var mark: UInt64 = 0

        init(_ tracker: KVMDirtyTracker, _ pending: [any DirtyPages]) {
            self.tracker = tracker
            self.pending = pending
        }
    }

    let source: any DirtySource
    private let memory: GuestMemory
    private let slots: KVMSlots
    /// Guards what follows. Taken inside `KVMSlots.changing`, never the other way round.
    private let lock = Mutex(())
    private var table: [Slot]
    private var logged: Set<UInt32> = []
    private var records: [Record] = []
    /// Somebody needs reports to be made though nobody collects them: limits.
    private var isHeld = false

    init(_ source: any DirtySource, slots: KVMSlots, memory: GuestMemory) {
        self.source = source
        self.slots = slots
        self.memory = memory
        table = slots.slots
        slots.setObserver(Door(self))
    }

    /// What slots hold on to, so that they and their tracking go together when nobody else holds either.
    private final class Door: SlotObserver, @unchecked Sendable {
        private weak let tracking: DirtyTracking?

        init(_ tracking: DirtyTracking) { self.tracking = tracking }

        func willAdd(_ slot: Slot) -> Bool { tracking?.willAdd(slot) ?? false }

        func wasRefused(_ slot: Slot) { tracking?.wasRefused(slot) }

        var isTracking: Bool { tracking?.isTracking ?? false }

        func willChange(_ old: Slot, to new: Slot?) throws(AcceleratorError) {
            try tracking?.willChange(old, to: new)
        }
    }

    // MARK: For the trackers

    func makePages() throws(AcceleratorError) -> [any DirtyPages] {
        do throws(SystemError) {
            var pages: [any DirtyPages] = []
            for block in memory.blocks { pages.append(try source.makeRecord(pageCount: block.pageCount)) }
            return pages
        } catch { throw AcceleratorError(error.description) }
    }

    /// A tracker of the same client that is on already ends.
    func start(_ tracker: KVMDirtyTracker) throws(AcceleratorError) {
        try whileUnchanged { () throws(AcceleratorError) in
            guard !records.contains(where: { $0.tracker === tracker }) else {
                throw AcceleratorError("dirty page tracking is on already for this client")
            }
            let record = Record(tracker, try makePages())
            try begin()
            records.removeAll { $0.tracker.client == tracker.client }
            records.append(record)
            if tracker.client == .safetyNet { try watchAll(record) }
        }
    }

    /// All slots from now on, whether or not something is in them: memory is placed there behind the guest's back.
    private func watchAll(_ record: Record) throws(AcceleratorError) {
        do throws(AcceleratorError) {
            for slot in table {
                try turnOn(slot)
                try source.ignoreWhatAppears(in: slot, DirtyReport(records.map(\.pending)))
            }
        } catch {
            records.removeAll { $0 === record }
            endIfUnused()
            throw error
        }
        record.hasAll = true
    }

    func stop(_ tracker: KVMDirtyTracker) {
        try? whileUnchanged { () throws(AcceleratorError) in
            guard let index = records.firstIndex(where: { $0.tracker === tracker }) else { return }
            records.remove(at: index)
            endIfUnused()
        }
    }

    /// Keeps reports coming while nobody collects them, or no longer.
    func hold(_ isHeld: Bool) throws(AcceleratorError) {
        try whileUnchanged { () throws(AcceleratorError) in
            if isHeld {
                let wasHeld = self.isHeld
                try begin()
                self.isHeld = true
                do throws(AcceleratorError) { for slot in table { try turnOn(slot) } } catch {
                    self.isHeld = wasHeld
                    endIfUnused()
                    throw error
                }
            } else {
                self.isHeld = false
                endIfUnused()
            }
        }
    }

    private var isOn: Bool { isHeld || !records.isEmpty }

    private func begin() throws(AcceleratorError) {
        guard !isOn else { return }
        try source.begin()
        memory.hostWrites.setRecording(true)
    }

    private func endIfUnused() {
        guard !isOn else { return }
        memory.hostWrites.setRecording(false)
        for slot in table where logged.contains(slot.number) {
            // Turning logging off only drops what the kernel keeps; the slot itself was accepted before.
            try? slots.set(slot, logging: false)
        }
        logged = []
        source.end()
    }

    func collect(_ tracker: KVMDirtyTracker, into pages: [any DirtyPages]) throws(AcceleratorError) {
        try whileUnchanged { () throws(AcceleratorError) in
            let record = try record(of: tracker)
            for (pending, record) in zip(record.pending, pages) { pending.takeAll(into: record) }
            let own = DirtyReport([pages])
            let all = own.and(DirtyReport(records.filter { $0 !== record }.map(\.pending)))
            memory.hostWrites.collect(memory.blocks) { all.set($1, of: $0) }
            for slot in table {
                let wasOn = logged.contains(slot.number)
                if !wasOn, try isTouched(slot) {
                    // Until it is sent, all of it stays reported: what is written meanwhile costs the guest nothing.
                    if isLate(tracker) { try reportAllocated(slot, own) } else { try turnOn(slot, all) }
                }
                if wasOn, !record.hasAll { try reportAllocated(slot, own) }
            }
            if !record.hasAll { try reportUnshown(own) }
            try source.collect(table.filter { logged.contains($0.number) }, for: tracker.client, all)
            record.hasAll = true
            record.mark = source.mark
        }
    }

    func willSend(
        _ pages: Range<PageIndex>, of block: Int, marked: any DirtyPages, _ tracker: KVMDirtyTracker
    ) throws(AcceleratorError) {
        try whileUnchanged { () throws(AcceleratorError) in
            let record = try record(of: tracker)
            if isLate(tracker) { try turnOnSlots(of: pages, block, marked, record) }
            let chunk = DirtyChunk(
                pages: pages, block: block, marked: marked, pending: record.pending, mark: record.mark)
            let others = DirtyReport(records.filter { $0 !== record }.map(\.pending))
            try source.willSend(chunk, table.filter { logged.contains($0.number) }, others: others)
        }
    }

    /// A migration has a slot's log turned on just before its first page is sent. The call waits for a grace period of the kernel (up to 20
    /// ms, for each slot that is touched), and rings watch all of the slot at once: neither is for the start of a migration.
    private func isLate(_ tracker: KVMDirtyTracker) -> Bool { tracker.client == .migration }

    /// Turns on the slots that show some of these pages. No page of them was sent yet: what is marked there will be read later, and
    /// need not be reported again for having been there.
    private func turnOnSlots(
        of pages: Range<PageIndex>, _ block: Int, _ marked: any DirtyPages, _ record: Record
    ) throws(AcceleratorError) {
        for slot in table where !logged.contains(slot.number) {
            guard slot.pieces.contains(where: { $0.block == block && $0.slotPages(of: pages) != nil }) else { continue }
            guard try isTouched(slot) else { continue }
            let parts = slot.pieces.filter { $0.block == block }.map { piece in
                PageIndex(piece.blockPages.lowerBound.value / 64 * 64)..<piece.blockPages.upperBound
            }
            // What was known before was written through another slot, where it may not be watched again yet: that stays.
            let known = parts.map { record.pending[block].words(inCommonWith: marked, in: $0) }
            try turnOn(slot)
            for (part, known) in zip(parts, known) {
                var fresh = record.pending[block].words(inCommonWith: marked, in: part)
                for index in known.indices { fresh[index] &= ~known[index] }
                record.pending[block].clear(fresh, from: part.lowerBound)
            }
        }
    }

    private func record(of tracker: KVMDirtyTracker) throws(AcceleratorError) -> Record {
        guard let record = records.first(where: { $0.tracker === tracker }) else {
            throw AcceleratorError("dirty page tracking was stopped, or a later client has taken it over")
        }
        return record
    }

    // MARK: Slots

    private func turnOn(_ slot: Slot, _ report: DirtyReport? = nil) throws(AcceleratorError) {
        guard !logged.contains(slot.number) else { return }
        try slots.set(slot, logging: true)
        logged.insert(slot.number)
        try source.wasTurnedOn(slot, report ?? DirtyReport(records.map(\.pending)))
    }

    private func isTouched(_ slot: Slot) throws(AcceleratorError) -> Bool {
        do throws(SystemError) { return try slot.isTouched(in: memory) } catch {
            throw AcceleratorError(error.description)
        }
    }

    private func reportAllocated(_ slot: Slot, _ report: DirtyReport) throws(AcceleratorError) {
        do throws(SystemError) {
            for run in try slot.allocatedRuns(in: slot.allPages, of: memory) { report.set(run, of: slot) }
        } catch { throw AcceleratorError(error.description) }
    }

    /// What no slot shows now may have been written before, and may be shown later.
    private func reportUnshown(_ report: DirtyReport) throws(AcceleratorError) {
        for (index, block) in memory.blocks.enumerated() {
            var shown = table.flatMap(\.pieces).filter { $0.block == index }.map(\.blockPages)
            shown.sort { $0.lowerBound < $1.lowerBound }
            shown.append(block.pages.upperBound..<block.pages.upperBound)
            var position = block.pages.lowerBound
            for range in shown {
                if position < range.lowerBound {
                    do throws(SystemError) {
                        let runs = try block.allocatedRuns(in: position..<range.lowerBound)
                        for run in runs { report.set(run, of: index) }
                    } catch { throw AcceleratorError(error.description) }
                }
                position = max(position, range.upperBound)
            }
        }
    }

    func willAdd(_ slot: Slot) -> Bool {
        (try? locked { () throws(AcceleratorError) -> Bool in
            table.append(slot)
            guard isOn else { return false }
            try source.wasTurnedOn(slot, DirtyReport(records.map(\.pending)))
            logged.insert(slot.number)
            return true
        }) ?? false
    }

    func wasRefused(_ slot: Slot) {
        try? locked { () throws(AcceleratorError) in
            table.removeAll { $0.number == slot.number }
            logged.remove(slot.number)
            // The kernel has no such slot that it could be asked for.
            try source.willChange(slot, to: nil, isOn: false, DirtyReport(records.map(\.pending)))
        }
    }

    var isTracking: Bool { lock.withLock { _ in isOn } }

    func willChange(_ old: Slot, to new: Slot?) throws(AcceleratorError) {
        try locked { () throws(AcceleratorError) in
            let (wasOn, report) = (logged.contains(old.number), DirtyReport(records.map(\.pending)))
            // Nobody looks into it any more: what was written since the last collect would never be heard of.
            if isOn, !wasOn { try reportAllocated(old, report) }
            try source.willChange(old, to: new, isOn: wasOn, report)
            table.removeAll { $0.number == old.number }
            if let new {
                table.append(new)
            } else {
                logged.remove(old.number)
            }
        }
    }

    // MARK: Locks

    private func locked<R>(_ body: () throws(AcceleratorError) -> R) throws(AcceleratorError) -> R {
        try lock.withLock { (_) throws(AcceleratorError) -> R in try body() }
    }

    /// Slots stay as they are, and their logging is this thread's to change.
    private func whileUnchanged(_ body: () throws(AcceleratorError) -> Void) throws(AcceleratorError) {
        try slots.changing.withLock { (_) throws(AcceleratorError) in try locked(body) }
    }
}
