import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host

/// KVM's dirty log: a bitmap per memory slot.
///
/// In manual mode (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with INITIALLY_SET) turning it on freezes nobody: all pages of a slot begin as
/// dirty, bits stay set until they are cleared, and pages are write-protected as they are cleared. In automatic mode reading clears.
/// Source: the kernel's Documentation/virt/kvm/api.rst, 4.8 and 4.117.
///
/// Called under the lock of `DirtyTracking` alone.
final class DirtyLog: DirtySource, @unchecked Sendable {
    enum Mode { case manual, automatic }

    let method = "log"
    let otherCPUNanoseconds: UInt64 = 0
    /// What is set in the log stays set until it is cleared: nothing has to be remembered of a collect.
    let mark: UInt64 = 0
    private let machine: Descriptor
    private let memory: GuestMemory
    private let mode: Mode
    private var logs: [UInt32: State] = [:]
    /// A slot's log as the kernel gives it; kept, because a fresh one costs as much as reading the log.
    private var words: [UInt64] = []

    private enum State {
        /// Bits inside these holes, in slot pages, mean nothing. What appears in a hole counts as written.
        case masked(holes: [Range<UInt64>])
        /// Every bit means a written page.
        case whole
    }

    /// So many holes in a slot, and looking into them each time costs more than clearing their bits once.
    private static let fragmentedHoles = 1024
    /// Bits that are cleared at a time: 256 MiB of guest memory.
    private static let clearedPages: UInt64 = 1 << 16

    init(machine: Descriptor, memory: GuestMemory, _ mode: Mode) {
        self.machine = machine
        self.memory = memory
        self.mode = mode
    }

    func makeRecord(pageCount: UInt64) throws(SystemError) -> any DirtyPages { try DirtyBitmap(pageCount: pageCount) }

    func begin() {}

    func end() { logs = [:] }

    /// What is there already counts as written.
    func wasTurnedOn(_ slot: Slot, _ report: DirtyReport) throws(AcceleratorError) {
        guard mode == .automatic else {
            logs[slot.number] = .masked(holes: try look(into: [slot.allPages], of: slot, report))
            return
        }
        for run in try allocatedRuns(slot, in: slot.allPages) { report.set(run, of: slot) }
        logs[slot.number] = .whole
    }

    func collect(_ slots: [Slot], for client: DirtyClient, _ report: DirtyReport) throws(AcceleratorError) {
        for slot in slots { try collect(slot, isCleared: client != .migration, report) }
    }

    /// - Parameter isCleared: what is reported is watched afresh at once; nobody says later that it will be read.
    private func collect(_ slot: Slot, isCleared: Bool, _ report: DirtyReport) throws(AcceleratorError) {
        // Holes first: a page that appears after this look keeps its bit for the next time.
        try lookIntoHoles(slot, report)
        let wordCount = try read(slot)
        unsafe words.withUnsafeBufferPointer {
            unsafe report.merge(UnsafeBufferPointer(rebasing: $0[..<wordCount]), of: slot)
        }
        guard isCleared, mode == .manual else { return }
        for first in stride(from: 0, to: slot.pageCount, by: Int(Self.clearedPages)) {
            let count = min(Self.clearedPages, slot.pageCount - first)
            let part = words[Int(first / 64)..<Int((first + count + 63) / 64)]
            if part.contains(where: { $0 != 0 }) { try clear(slot, first: first, count: count, part) }
        }
    }

    private func lookIntoHoles(_ slot: Slot, _ report: DirtyReport) throws(AcceleratorError) {
        guard case .masked(let holes) = logs[slot.number] else { return }
        let left = try look(into: holes, of: slot, report)
        logs[slot.number] = .masked(holes: left)
        if left.count > Self.fragmentedHoles { try clearHoles(left, slot, report) }
    }

    func ignoreWhatAppears(in slot: Slot, _ report: DirtyReport) throws(AcceleratorError) {
        if case .masked(let holes) = logs[slot.number] { try clearHoles(holes, slot, report) }
    }

    /// Reports what is allocated in holes, which are given in order. - Returns: what is left of them.
    private func look(
        into holes: [Range<UInt64>], of slot: Slot, _ report: DirtyReport
    ) throws(AcceleratorError) -> [Range<UInt64>] {
        guard let first = holes.first, let last = holes.last else { return [] }
        // Each look is a system call: with many holes one over everything is cheaper, though it finds what is known, too.
        var found =
            holes.count > Self.fragmentedHoles
            ? try allocatedRuns(slot, in: first.lowerBound..<last.upperBound)[...] : nil
        var left: [Range<UInt64>] = []
        for hole in holes {
            var position = hole.lowerBound
            let runs: [Range<UInt64>]
            if let all = found {
                let rest = all.drop { $0.upperBound <= hole.lowerBound }
                runs = rest.prefix { $0.lowerBound < hole.upperBound }.map { $0.clamped(to: hole) }
                found = rest
            } else {
                runs = try allocatedRuns(slot, in: hole)
            }
            for run in runs {
                report.set(run, of: slot)
                if position < run.lowerBound { left.append(position..<run.lowerBound) }
                position = run.upperBound
            }
            if position < hole.upperBound { left.append(position..<hole.upperBound) }
        }
        return left
    }

    /// Reads a slot's log into `words`, the bits of holes left out. - Returns: how many words it has.
    private func read(_ slot: Slot) throws(AcceleratorError) -> Int {
        let wordCount = Int((slot.pageCount + 63) / 64)
        if words.count < wordCount { words = [UInt64](repeating: 0, count: wordCount) }
        var request = unsafe kvm_dirty_log()
        unsafe request.slot = slot.number
        // SAFETY: the kernel writes one bit per page of the slot, rounded up to words: `words` has as many or more.
        let status = unsafe words.withUnsafeMutableBytes { buffer in
            unsafe request.dirty_bitmap = buffer.baseAddress
            return unsafe gw_kvm_get_dirty_log(machine.number, &request)
        }
        try kvm(status, "KVM_GET_DIRTY_LOG slot \(slot.number)")
        if case .masked(let holes) = logs[slot.number] {
            for hole in holes { DirtyWords.clear(hole, in: &words) }
        }
        return wordCount
    }

    /// Clears the bits of holes for good. A page that appears meanwhile is reported, whether its bit was cleared or not.
    private func clearHoles(
        _ holes: [Range<UInt64>], _ slot: Slot, _ report: DirtyReport
    ) throws(AcceleratorError) {
        var mask = [UInt64](repeating: 0, count: Int((slot.pageCount + 63) / 64))
        for hole in holes { DirtyWords.set(hole, in: &mask) }
        for first in stride(from: 0, to: slot.pageCount, by: Int(Self.clearedPages)) {
            let count = min(Self.clearedPages, slot.pageCount - first)
            try clear(slot, first: first, count: count, mask[Int(first / 64)..<Int((first + count + 63) / 64)])
        }
        _ = try look(into: holes, of: slot, report)
        logs[slot.number] = .whole
    }

    /// With other clients about, they hear of what is set before it is cleared.
    func willSend(_ chunk: DirtyChunk, _ slots: [Slot], others: DirtyReport) throws(AcceleratorError) {
        guard mode == .manual else { return chunk.forgetMarked() }
        var marked: [UInt64]?
        for slot in slots {
            var isRead = others.isEmpty
            for piece in slot.pieces where piece.block == chunk.block {
                guard let part = piece.slotPages(of: chunk.pages) else { continue }
                if !isRead {
                    try lookIntoHoles(slot, DirtyReport([chunk.pending]).and(others))
                    let wordCount = try read(slot)
                    unsafe words.withUnsafeBufferPointer {
                        unsafe others.merge(UnsafeBufferPointer(rebasing: $0[..<wordCount]), of: slot)
                    }
                    isRead = true
                }
                let known = marked ?? chunk.marked.words(of: chunk.pages)
                marked = known
                try clear(slot, part, known, of: chunk, piece, read: others.isEmpty ? nil : words)
            }
        }
        chunk.forgetMarked()
    }

    /// Clears the marked pages of a chunk in one slot, whatever the alignment is.
    ///
    /// - Parameter read: what others were told of. A bit that was set since stays, or they would never hear of it; one that was not set
    ///   needs no clearing, because its page is watched.
    private func clear(
        _ slot: Slot, _ part: Range<UInt64>, _ marked: [UInt64], of chunk: DirtyChunk, _ piece: Slot.Piece,
        read: [UInt64]?
    ) throws(AcceleratorError) {
        // The kernel takes whole words, or up to the end of the slot.
        let first = part.lowerBound / 64 * 64
        let end = min(slot.pageCount, (part.upperBound + 63) / 64 * 64)
        var bits = [UInt64](repeating: 0, count: Int((end - first + 63) / 64))
        // Bit i of `marked` is page chunk.first + i; in the slot that is page i + shift.
        let shift =
            Int64(bitPattern: part.lowerBound &- first)
            - Int64(chunk.pages.lowerBound.distance(to: piece.blockPages(of: part)!.lowerBound))
        if shift == 0, part.lowerBound == first {
            for index in bits.indices { bits[index] = marked[index] }
            if part.upperBound % 64 != 0 {
                DirtyWords.clear(part.upperBound - first..<UInt64(bits.count) * 64, in: &bits)
            }
        } else {
            DirtyWords.forEachRun(marked) { run in
                let low = Int64(run.lowerBound) + shift
                let high = Int64(run.upperBound) + shift
                let lowest = Int64(part.lowerBound - first)
                let range = max(low, lowest)..<max(max(low, lowest), min(high, lowest + Int64(part.count)))
                if !range.isEmpty { DirtyWords.set(UInt64(range.lowerBound)..<UInt64(range.upperBound), in: &bits) }
            }
        }
        if let read { for index in bits.indices { bits[index] &= read[Int(first / 64) + index] } }
        try clear(slot, first: first, count: end - first, bits[...])
    }

    private func clear(
        _ slot: Slot, first: UInt64, count: UInt64, _ words: ArraySlice<UInt64>
    ) throws(AcceleratorError) {
        var request = unsafe kvm_clear_dirty_log()
        unsafe request.slot = slot.number
        unsafe request.first_page = first
        unsafe request.num_pages = UInt32(count)
        // SAFETY: the kernel reads one bit per page asked for, rounded up to words: what the slice holds.
        let status = unsafe words.withUnsafeBufferPointer { words in
            unsafe request.dirty_bitmap = UnsafeMutableRawPointer(mutating: words.baseAddress)
            return unsafe gw_kvm_clear_dirty_log(machine.number, &request)
        }
        try kvm(status, "KVM_CLEAR_DIRTY_LOG slot \(slot.number)")
    }

    /// The log of a slot may go with the slot: what it says is taken now, for the old pages and the new.
    func willChange(
        _ old: Slot, to new: Slot?, isOn: Bool, _ report: DirtyReport
    ) throws(AcceleratorError) {
        if isOn {
            try lookIntoHoles(old, report)
            let wordCount = try read(old)
            unsafe words.withUnsafeBufferPointer { words in
                let bits = unsafe UnsafeBufferPointer(rebasing: words[..<wordCount])
                unsafe report.merge(bits, of: old)
                if let new { unsafe report.merge(bits, of: new.cut(to: old.pageCount)) }
            }
        }
        let state = logs[old.number]
        logs[old.number] = nil
        guard let new, isOn else { return }
        // A slot that stays keeps its log: what now stands behind it differently is looked at like a hole.
        guard let state, old.number == new.number, old.pageCount == new.pageCount, mode == .manual else {
            return try wasTurnedOn(new, report)
        }
        var holes = new.ranges(unlike: old)
        if case .masked(let before) = state { holes += before }
        logs[new.number] = .masked(holes: Self.united(holes))
    }

    /// In order, without overlap.
    private static func united(_ ranges: [Range<UInt64>]) -> [Range<UInt64>] {
        var result: [Range<UInt64>] = []
        for range in ranges.sorted(by: { $0.lowerBound < $1.lowerBound }) {
            if let last = result.last, range.lowerBound <= last.upperBound {
                result[result.count - 1] = last.lowerBound..<max(last.upperBound, range.upperBound)
            } else {
                result.append(range)
            }
        }
        return result
    }

    private func allocatedRuns(_ slot: Slot, in pages: Range<UInt64>) throws(AcceleratorError) -> [Range<UInt64>] {
        do throws(SystemError) { return try slot.allocatedRuns(in: pages, of: memory) } catch {
            throw AcceleratorError(error.description)
        }
    }
}

extension Slot {
    /// The ranges of slot pages behind which stands something else than behind those of `other`, in order.
    func ranges(unlike other: Slot) -> [Range<UInt64>] {
        let bounds = (pieces + other.pieces).flatMap { [$0.slotPages.lowerBound, $0.slotPages.upperBound] }
        let borders = Set(bounds).sorted()
        return zip(borders, borders.dropFirst()).compactMap { low, high in
            place(of: low) == other.place(of: low) ? nil : low..<high
        }
    }

    /// The block and page behind a page of the slot.
    private func place(of slotPage: UInt64) -> [UInt64]? {
        guard let piece = pieces.first(where: { $0.slotPages.contains(slotPage) }) else { return nil }
        return [UInt64(piece.block), piece.firstPage.value + (slotPage - piece.slotPages.lowerBound)]
    }

    /// The pieces in the slot's first pages alone.
    func cut(to pageCount: UInt64) -> Slot {
        var slot = self
        slot.pieces = pieces.compactMap { piece in
            let part = piece.slotPages.clamped(to: 0..<pageCount)
            guard let pages = piece.blockPages(of: part) else { return nil }
            return Piece(slotPages: part, block: piece.block, firstPage: pages.lowerBound)
        }
        return slot
    }
}
