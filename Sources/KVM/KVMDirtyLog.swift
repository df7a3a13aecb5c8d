import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host

/// Dirty tracking by KVM's dirty log: a bitmap per memory slot.
///
/// Slots whose memory file is a hole cost nothing: nobody can have written there. When a page appears in one, its log is turned
/// on first and everything found in it afterwards counts as written. In manual mode (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with
/// INITIALLY_SET) starting freezes nobody: all pages of a slot begin as dirty, and are write-protected only as they are sent.
final class KVMDirtyLog: DirtyTracker, @unchecked Sendable {
    enum Mode { case manual, automatic }

    let method = "log"
    private let machine: Descriptor
    private let memory: GuestMemory
    private let mode: Mode
    private let slots: [KVMSlots.Slot]
    private var logs: [State]
    private var isOn = false

    private enum State {
        /// Not logged: the slot was a hole when last looked at.
        case untouched
        /// Logged; bits of pages that are holes mean nothing.
        case masked
        /// Logged, and so fragmented that the bits of holes were cleared once: every bit means a written page.
        case whole
    }

    /// Runs of allocated pages in a slot from which looking for holes costs more than clearing their bits.
    private static let fragmentedRuns = 1024

    init(machine: Descriptor, slots: KVMSlots, memory: GuestMemory, _ mode: Mode) {
        self.machine = machine
        self.memory = memory
        self.mode = mode
        self.slots = slots.slots
        logs = Array(repeating: .untouched, count: slots.slots.count)
    }

    func start() throws(AcceleratorError) {
        precondition(!isOn, "tracking starts once")
        logs = Array(repeating: .untouched, count: slots.count)
        memory.hostWrites.setRecording(true)
        isOn = true
    }

    func stop() {
        guard isOn else { return }
        isOn = false
        memory.hostWrites.setRecording(false)
        for (slot, state) in zip(slots, logs) where state != .untouched {
            // Turning logging off only drops the bitmap; the slot itself was accepted before.
            try? KVMSlots.set(slot, on: machine, logging: false)
        }
        logs = Array(repeating: .untouched, count: slots.count)
    }

    func collect(into bitmaps: [DirtyBitmap]) throws(AcceleratorError) {
        memory.hostWrites.collect(memory.blocks, into: bitmaps)
        for index in slots.indices {
            let slot = slots[index]
            if logs[index] == .untouched {
                guard try nextRun(slot, from: slot.pages.lowerBound) != nil else { continue }
                try KVMSlots.set(slot, on: machine, logging: true)
                logs[index] = .masked
                if mode == .automatic {
                    for run in try allocatedRuns(slot, limit: .max) { bitmaps[slot.block].set(run) }
                    logs[index] = .whole
                }
            }
            try collect(index, into: bitmaps[slot.block])
        }
    }

    private func collect(_ index: Int, into bitmap: DirtyBitmap) throws(AcceleratorError) {
        let slot = slots[index]
        var words = [UInt64](repeating: 0, count: Int((slot.pageCount + 63) / 64))
        try readLog(slot, into: &words)
        if logs[index] == .masked {
            let runs = try allocatedRuns(slot, limit: Self.fragmentedRuns)
            if runs.count == Self.fragmentedRuns {
                try clearHoles(index, into: bitmap)
                try readLog(slot, into: &words)
            } else {
                keep(runs, of: slot, in: &words)
            }
        }
        unsafe words.withUnsafeBufferPointer { unsafe bitmap.merge($0, at: slot.pages.lowerBound) }
    }

    private func readLog(_ slot: KVMSlots.Slot, into words: inout [UInt64]) throws(AcceleratorError) {
        var request = unsafe kvm_dirty_log()
        unsafe request.slot = slot.number
        // SAFETY: the kernel writes one bit per page of the slot, rounded up to words: the size of `words`.
        let status = unsafe words.withUnsafeMutableBytes { buffer in
            unsafe request.dirty_bitmap = buffer.baseAddress
            return unsafe gw_kvm_get_dirty_log(machine.number, &request)
        }
        try kvm(status, "KVM_GET_DIRTY_LOG slot \(slot.number)")
    }

    /// Zeroes the bits of pages that are in no run.
    private func keep(_ runs: [Range<PageIndex>], of slot: KVMSlots.Slot, in words: inout [UInt64]) {
        let base = slot.pages.lowerBound.value
        var position: UInt64 = 0
        for run in runs {
            Self.zero(&words, position..<(run.lowerBound.value - base))
            position = run.upperBound.value - base
        }
        Self.zero(&words, position..<slot.pageCount)
    }

    private static func zero(_ words: inout [UInt64], _ bits: Range<UInt64>) {
        var bit = bits.lowerBound
        while bit < bits.upperBound {
            let stop = min(bits.upperBound, (bit / 64 + 1) * 64)
            let length = stop - bit
            let mask: UInt64 = length == 64 ? ~0 : ((1 << length) - 1) << (bit % 64)
            words[Int(bit / 64)] &= ~mask
            bit = stop
        }
    }

    /// Clears the bits of holes for good. A page that appears meanwhile is reported, whether its bit was cleared or not.
    private func clearHoles(_ index: Int, into bitmap: DirtyBitmap) throws(AcceleratorError) {
        let slot = slots[index]
        let before = try allocatedRuns(slot, limit: .max)
        var words = [UInt64](repeating: ~0, count: Int((slot.pageCount + 63) / 64))
        let base = slot.pages.lowerBound.value
        for run in before { Self.zero(&words, (run.lowerBound.value - base)..<(run.upperBound.value - base)) }
        let step: UInt64 = 1 << 14
        for first in stride(from: 0, to: slot.pageCount, by: Int(step)) {
            let count = min(step, slot.pageCount - first)
            try unsafe words.withUnsafeBufferPointer { (buffer) throws(AcceleratorError) in
                try unsafe clear(slot, first: first, count: count, buffer.baseAddress! + Int(first / 64))
            }
        }
        let known = try DirtyBitmapFailure.of { () throws(SystemError) in
            try DirtyBitmap(pageCount: memory.blocks[slot.block].pageCount)
        }
        for run in before { known.set(run) }
        for run in try allocatedRuns(slot, limit: .max) {
            for page in run where !known.contains(page) { bitmap.set(page..<page.advanced(by: 1)) }
        }
        logs[index] = .whole
    }

    func willSend(_ pages: Range<PageIndex>, of block: Int, marked bitmap: DirtyBitmap) throws(AcceleratorError) {
        guard mode == .manual else { return }
        for (slot, state) in zip(slots, logs) where slot.block == block && state != .untouched {
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
        _ slot: KVMSlots.Slot, first: UInt64, count: UInt64, _ words: UnsafePointer<UInt64>
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

    private func nextRun(_ slot: KVMSlots.Slot, from page: PageIndex) throws(AcceleratorError) -> Range<PageIndex>? {
        do throws(SystemError) {
            return try memory.blocks[slot.block].nextAllocatedRun(from: page, to: slot.pages.upperBound)
        } catch { throw AcceleratorError(error.description) }
    }

    private func allocatedRuns(_ slot: KVMSlots.Slot, limit: Int) throws(AcceleratorError) -> [Range<PageIndex>] {
        var runs: [Range<PageIndex>] = []
        var page = slot.pages.lowerBound
        while runs.count < limit, let run = try nextRun(slot, from: page) {
            runs.append(run)
            page = run.upperBound
        }
        return runs
    }
}

/// Turns a failure to allocate a bitmap into the accelerator's error.
private enum DirtyBitmapFailure {
    static func of(_ make: () throws(SystemError) -> DirtyBitmap) throws(AcceleratorError) -> DirtyBitmap {
        do throws(SystemError) { return try make() } catch { throw AcceleratorError(error.description) }
    }
}
