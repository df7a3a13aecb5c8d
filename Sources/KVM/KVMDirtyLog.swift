import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host
import Synchronization

/// Dirty tracking by KVM's dirty log: a bitmap per memory slot.
///
/// Until slots can change, each has one piece.
///
/// Slots in which nothing is allocated cost nothing: nobody can have written there. When a page appears in one, its log is turned
/// on first and everything found in it afterwards counts as written. In manual mode (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with
/// INITIALLY_SET) starting freezes nobody: all pages of a slot begin as dirty, and are write-protected only as they are sent.
///
/// Each client has a tracker of its own, and there is one log: who starts later has it. An earlier client, such as a cancelled
/// migration whose sender still hangs on a dead connection, can neither clear the log of the next one nor turn it off.
final class KVMDirtyLog: DirtyTracker, @unchecked Sendable {
    enum Mode { case manual, automatic }

    let client: DirtyClient
    let method = "log"
    let cpuNanoseconds: UInt64 = 0
    /// Who has the log of a machine; held during every use of it.
    typealias Turn = Mutex<KVMDirtyLog?>

    /// A machine's `Turn`, for its trackers to share.
    final class Owner: Sendable { let turn = Turn(nil) }

    private let owner: Owner
    private let machine: Descriptor
    private let memory: GuestMemory
    private let mode: Mode
    private let table: KVMSlots
    private let slots: [Slot]
    private var logs: [State]
    /// A slot's log as the kernel gives it; kept, because a fresh one costs as much as reading the log.
    private var words: [UInt64] = []

    private enum State {
        /// Not logged: the slot was a hole when last looked at.
        case untouched
        /// Logged; bits inside these holes mean nothing. What appears in a hole counts as written.
        case masked(holes: [Range<PageIndex>])
        /// Logged, and so fragmented that the bits of holes were cleared once: every bit means a written page.
        case whole

        var isLogged: Bool { if case .untouched = self { false } else { true } }
    }

    /// So many holes in a slot, and looking into them each time costs more than clearing their bits once.
    private static let fragmentedHoles = 1024

    init(machine: Descriptor, slots: KVMSlots, memory: GuestMemory, _ mode: Mode, owner: Owner, client: DirtyClient) {
        self.client = client
        self.owner = owner
        self.machine = machine
        self.memory = memory
        self.mode = mode
        table = slots
        self.slots = slots.slots
        logs = Array(repeating: .untouched, count: slots.slots.count)
    }

    func makePages() throws(AcceleratorError) -> sending [any DirtyPages] {
        do throws(SystemError) {
            var pages: [any DirtyPages] = []
            for block in memory.blocks { pages.append(try DirtyBitmap(pageCount: block.pageCount)) }
            return pages
        } catch { throw AcceleratorError(error.description) }
    }

    func start() throws(AcceleratorError) {
        try owner.turn.withLock { (current) throws(AcceleratorError) in
            guard current !== self else { throw AcceleratorError("dirty page tracking is on already for this client") }
            current?.turnOff()
            memory.hostWrites.setRecording(true)
            current = self
        }
    }

    func stop() {
        owner.turn.withLock { current in
            guard current === self else { return }
            turnOff()
            current = nil
        }
    }

    private func turnOff() {
        memory.hostWrites.setRecording(false)
        for (slot, state) in zip(slots, logs) where state.isLogged {
            // Turning logging off only drops the bitmap; the slot itself was accepted before.
            try? table.set(slot, logging: false)
        }
        logs = Array(repeating: .untouched, count: slots.count)
    }

    private func whileOn<R>(_ body: () throws(AcceleratorError) -> R) throws(AcceleratorError) -> R {
        try owner.turn.withLock { (current) throws(AcceleratorError) -> R in
            guard current === self else {
                throw AcceleratorError("dirty page tracking was stopped, or a later client has taken it over")
            }
            return try body()
        }
    }

    func collect(into bitmaps: [any DirtyPages]) throws(AcceleratorError) {
        try whileOn { () throws(AcceleratorError) in try collectAll(into: bitmaps) }
    }

    private func collectAll(into bitmaps: [any DirtyPages]) throws(AcceleratorError) {
        memory.hostWrites.collect(memory.blocks, into: bitmaps)
        for index in slots.indices {
            let slot = slots[index]
            if case .untouched = logs[index] {
                guard try isTouched(slot) else { continue }
                try table.set(slot, logging: true)
                logs[index] = try firstState(of: slot, into: bitmaps[slot.block])
            }
            try collect(index, into: bitmaps[slot.block])
        }
    }

    /// After the log was turned on: what is there already counts as written.
    private func firstState(of slot: Slot, into bitmap: any DirtyPages) throws(AcceleratorError) -> State {
        guard mode == .automatic else { return .masked(holes: [slot.pages]) }
        for run in try allocatedRuns(slot, in: slot.pages) { bitmap.set(run) }
        return .whole
    }

    private func collect(_ index: Int, into bitmap: any DirtyPages) throws(AcceleratorError) {
        let slot = slots[index]
        // Holes first: a page that appears after this look keeps its bit for the next time.
        if case .masked(let holes) = logs[index] {
            var left: [Range<PageIndex>] = []
            for hole in holes {
                var position = hole.lowerBound
                for run in try allocatedRuns(slot, in: hole) {
                    bitmap.set(run)
                    if position < run.lowerBound { left.append(position..<run.lowerBound) }
                    position = run.upperBound
                }
                if position < hole.upperBound { left.append(position..<hole.upperBound) }
            }
            logs[index] = .masked(holes: left)
            if left.count > Self.fragmentedHoles { try clear(left, index, into: bitmap) }
        }
        let wordCount = Int((slot.pageCount + 63) / 64)
        if words.count < wordCount { words = [UInt64](repeating: 0, count: wordCount) }
        try readLog(slot, into: &words)
        if case .masked(let holes) = logs[index] {
            for hole in holes { Self.zero(&words, Self.bits(hole, of: slot)) }
        }
        unsafe words.withUnsafeBufferPointer {
            unsafe bitmap.merge(UnsafeBufferPointer(rebasing: $0[..<wordCount]), at: slot.pages.lowerBound)
        }
    }

    private static func bits(_ pages: Range<PageIndex>, of slot: Slot) -> Range<UInt64> {
        (pages.lowerBound.value - slot.pages.lowerBound.value)..<(pages.upperBound.value - slot.pages.lowerBound.value)
    }

    private func readLog(_ slot: Slot, into words: inout [UInt64]) throws(AcceleratorError) {
        var request = unsafe kvm_dirty_log()
        unsafe request.slot = slot.number
        // SAFETY: the kernel writes one bit per page of the slot, rounded up to words: the size of `words`.
        let status = unsafe words.withUnsafeMutableBytes { buffer in
            unsafe request.dirty_bitmap = buffer.baseAddress
            return unsafe gw_kvm_get_dirty_log(machine.number, &request)
        }
        try kvm(status, "KVM_GET_DIRTY_LOG slot \(slot.number)")
    }

    private static func zero(_ words: inout [UInt64], _ bits: Range<UInt64>) {
        forEachWord(of: bits) { words[$0] &= ~$1 }
    }

    private static func set(_ words: inout [UInt64], _ bits: Range<UInt64>) {
        forEachWord(of: bits) { words[$0] |= $1 }
    }

    private static func forEachWord(of bits: Range<UInt64>, _ body: (Int, UInt64) -> Void) {
        var bit = bits.lowerBound
        while bit < bits.upperBound {
            let stop = min(bits.upperBound, (bit / 64 + 1) * 64)
            let length = stop - bit
            let mask: UInt64 = length == 64 ? ~0 : ((1 << length) - 1) << (bit % 64)
            body(Int(bit / 64), mask)
            bit = stop
        }
    }

    /// Clears the bits of holes for good. A page that appears meanwhile is reported, whether its bit was cleared or not.
    private func clear(_ holes: [Range<PageIndex>], _ index: Int, into bitmap: any DirtyPages) throws(AcceleratorError)
    {
        let slot = slots[index]
        var mask = [UInt64](repeating: 0, count: Int((slot.pageCount + 63) / 64))
        for hole in holes { Self.set(&mask, Self.bits(hole, of: slot)) }
        let step: UInt64 = 1 << 14
        for first in stride(from: 0, to: slot.pageCount, by: Int(step)) {
            let count = min(step, slot.pageCount - first)
            try unsafe mask.withUnsafeBufferPointer { (buffer) throws(AcceleratorError) in
                try unsafe clear(slot, first: first, count: count, buffer.baseAddress! + Int(first / 64))
            }
        }
        for hole in holes {
            for run in try allocatedRuns(slot, in: hole) { bitmap.set(run) }
        }
        logs[index] = .whole
    }

    func willSend(_ pages: Range<PageIndex>, of block: Int, marked bitmap: any DirtyPages) throws(AcceleratorError) {
        guard mode == .manual else { return }
        try whileOn { () throws(AcceleratorError) in try watch(pages, of: block, marked: bitmap) }
    }

    private func watch(_ pages: Range<PageIndex>, of block: Int, marked bitmap: any DirtyPages) throws(AcceleratorError)
    {
        for (slot, state) in zip(slots, logs) where slot.block == block && state.isLogged {
            let part = pages.clamped(to: slot.pages)
            guard !part.isEmpty else { continue }
            let first = part.lowerBound.value - slot.pages.lowerBound.value
            // The kernel takes whole words, or up to the end of the slot.
            let end = min(slot.pages.upperBound.value, (part.upperBound.value + 63) / 64 * 64)
            let count = end - part.lowerBound.value
            let failure = unsafe bitmap.withWords(of: part.lowerBound..<PageIndex(end)) { words -> AcceleratorError? in
                do throws(AcceleratorError) {
                    try unsafe clear(slot, first: first, count: count, words.baseAddress!)
                    return nil
                } catch { return error }
            }
            if let failure { throw failure }
        }
    }

    private func clear(
        _ slot: Slot, first: UInt64, count: UInt64, _ words: UnsafePointer<UInt64>
    )
        throws(AcceleratorError)
    {
        var request = unsafe kvm_clear_dirty_log()
        unsafe request.slot = slot.number
        unsafe request.first_page = first
        unsafe request.num_pages = UInt32(count)
        unsafe request.dirty_bitmap = UnsafeMutableRawPointer(mutating: words)
        try kvm(unsafe gw_kvm_clear_dirty_log(machine.number, &request), "KVM_CLEAR_DIRTY_LOG slot \(slot.number)")
    }

    // MARK: What is allocated

    private func isTouched(_ slot: Slot) throws(AcceleratorError) -> Bool {
        do throws(SystemError) { return try memory.blocks[slot.block].isAllocated(in: slot.pages) } catch {
            throw AcceleratorError(error.description)
        }
    }

    private func allocatedRuns(
        _ slot: Slot, in pages: Range<PageIndex>
    ) throws(AcceleratorError) -> [Range<PageIndex>] {
        do throws(SystemError) { return try memory.blocks[slot.block].allocatedRuns(in: pages) } catch {
            throw AcceleratorError(error.description)
        }
    }
}

extension Slot {
    var block: Int { pieces[0].block }
    var pages: Range<PageIndex> { pieces[0].blockPages }
}
