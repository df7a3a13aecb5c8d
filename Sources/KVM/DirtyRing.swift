import Accelerator
import CLinux
import GuestMemory
import Host
import Synchronization

/// What is counted over all rings of a machine.
final class DirtyRingSum: Sendable {
    /// Entries taken, added after they were marked as taken: one number that only grows, so that more of it includes all that was less.
    let taken = Atomic<UInt64>(0)
    /// Entries were to be given back while no vCPU was in the guest: the first that enters does it before.
    let isResetDue = Atomic<Bool>(false)
}

/// One vCPU's dirty ring: the kernel writes an entry for each page this vCPU makes dirty, and stops the vCPU when the ring is full.
///
/// Harvesting takes entries and marks them as taken; the kernel uses their places again, and watches their pages afresh, after
/// KVM_RESET_DIRTY_RINGS (`DirtyRings.reset`). Source: the kernel's Documentation/virt/kvm/api.rst, 8.29.
@safe final class DirtyRing: @unchecked Sendable {
    let entryCount: Int
    /// Entries taken since the ring was made. A page written twice between two resets is one entry, or a few: the kernel may repeat.
    let taken = Atomic<UInt64>(0)
    /// How far `taken` had come when the last reset began.
    let given = Atomic<UInt64>(0)
    let sum: DirtyRingSum
    /// The vCPU is in the guest, or about to enter it and past its look at `isResetDue`.
    let isInGuest = Atomic<Bool>(false)
    private let area: Mapping
    /// SAFETY: the start of `area`, which lives as long as this object; indices are masked.
    private let entries: UnsafeMutablePointer<kvm_dirty_gfn>
    /// Guards what follows, and the entries.
    private let lock = Mutex(())
    private var next = 0
    /// What was taken and not yet handed on, one record per block; `nil` while nobody is to hear of it.
    private var staged: [any DirtyPages]?
    /// By number: the pieces of the slots.
    private var pieces: [UInt32: [Slot.Piece]] = [:]
    private var batch: [UInt64] = []
    /// For `take`: slot above page. Kept for its room.
    private var found: [UInt64] = []

    /// Page numbers go into a record so many at a time.
    private static let batchPages = 1024
    /// A slot has at most 2^31 pages, and its number 17 bits.
    private static let pageBits: UInt64 = 40
    private static let pageMask: UInt64 = 1 << pageBits - 1

    /// Maps the ring of a vCPU whose machine has rings. - Throws: when the kernel does not let it be mapped.
    init(of cpu: Descriptor, entryCount: Int, sum: DirtyRingSum) throws(AcceleratorError) {
        self.entryCount = entryCount
        self.sum = sum
        do throws(SystemError) {
            let offset = UInt64(KVM_DIRTY_LOG_PAGE_OFFSET) * GuestPage.byteCount
            area = try Mapping(cpu, offset: offset, byteCount: entryCount * MemoryLayout<kvm_dirty_gfn>.stride)
        } catch {
            throw AcceleratorError("dirty ring of \(cpu.name), \(entryCount) entries: \(error.description)")
        }
        unsafe entries = UnsafeMutablePointer(bitPattern: area.hostAddress(at: 0))!
        batch.reserveCapacity(Self.batchPages)
    }

    /// From here on `slots` say what entries mean, and `staged` takes them; with `nil` they are dropped.
    func begin(_ slots: [Slot], staged: [any DirtyPages]?) {
        lock.withLock { _ in
            _ = take()
            pieces = Dictionary(uniqueKeysWithValues: slots.map { ($0.number, $0.pieces) })
            self.staged = staged
        }
    }

    /// What stands in the ring means `old`; what comes means `new`. What `both` names counts for old and new.
    func change(_ number: UInt32, both: [Slot.Piece], new: [Slot.Piece]?) {
        lock.withLock { _ in
            pieces[number] = both
            _ = take()
            pieces[number] = new
        }
    }

    /// Takes what stands in the ring. - Returns: how many entries.
    @discardableResult
    func harvest() -> Int { lock.withLock { _ in take() } }

    /// Takes what stands in the ring, and hands over everything taken so far.
    func harvest(_ report: DirtyReport) {
        lock.withLock { _ in
            _ = take()
            guard let staged else { return }
            report.add(staged)
            for pages in staged { pages.removeAll() }
        }
    }

    /// How many entries the kernel cannot use again yet: taken and not given back, and those that stand there.
    var fill: Int {
        lock.withLock { _ in
            let kept = Int(taken.load(ordering: .relaxed) - given.load(ordering: .relaxed))
            return kept + standing(most: max(0, entryCount - kept))
        }
    }

    /// Entries since the ring was made, those included that stand there.
    var count: UInt64 {
        lock.withLock { _ in taken.load(ordering: .relaxed) + UInt64(standing(most: entryCount)) }
    }

    /// Looks at a few entries only: they become dirty in order.
    private func standing(most: Int) -> Int {
        var low = 0
        var high = most
        while low < high {
            let middle = (low + high) / 2
            if unsafe gw_dirty_gfn_flags(entry(next + middle)) & 3 == 1 { low = middle + 1 } else { high = middle }
        }
        return low
    }

    private func entry(_ index: Int) -> UnsafeMutablePointer<kvm_dirty_gfn> {
        unsafe entries + (index & (entryCount - 1))
    }

    /// Entries go back sorted: the kernel watches pages afresh 64 at a time where entries that follow each other are near each other, and one
    /// at a time where they are not, which costs a guest that writes here and there many times as much.
    private func take() -> Int {
        // Locals: these loops are all that a page costs here.
        let (entries, mask, first) = unsafe (entries, entryCount - 1, next)
        var found = found
        self.found = []
        defer {
            found.removeAll(keepingCapacity: true)
            self.found = found
        }
        var ascends = true
        var last: UInt64 = 0
        while found.count < entryCount {
            let entry = unsafe entries + ((first &+ found.count) & mask)
            // Dirty and not taken yet.
            guard unsafe gw_dirty_gfn_flags(entry) & 3 == 1 else { break }
            let taken = unsafe UInt64(entry.pointee.slot) << Self.pageBits | entry.pointee.offset
            if taken < last { ascends = false }
            last = taken
            found.append(taken)
        }
        let count = found.count
        guard count > 0 else { return 0 }
        if !ascends { unsafe found.withUnsafeMutableBufferPointer { unsafe PageSort.sort($0) } }
        for index in 0..<count {
            let entry = unsafe entries + ((first &+ index) & mask)
            if !ascends {
                unsafe entry.pointee.slot = UInt32(truncatingIfNeeded: found[index] >> Self.pageBits)
                unsafe entry.pointee.offset = found[index] & Self.pageMask
            }
            unsafe gw_dirty_gfn_give_back(entry)
        }
        stage(found)
        next = first &+ count
        taken.add(UInt64(count), ordering: .relaxed)
        sum.taken.add(UInt64(count), ordering: .sequentiallyConsistent)
        return count
    }

    private func stage(_ found: [UInt64]) {
        var batch = batch
        self.batch = []
        var slot: UInt64 = 0
        for taken in found {
            if taken >> Self.pageBits != slot || batch.count == Self.batchPages {
                stage(&batch, of: UInt32(truncatingIfNeeded: slot))
                slot = taken >> Self.pageBits
            }
            batch.append(taken & Self.pageMask)
        }
        stage(&batch, of: UInt32(truncatingIfNeeded: slot))
        self.batch = batch
    }

    /// Puts a batch of slot pages into the records of the blocks behind them.
    private func stage(_ batch: inout [UInt64], of slot: UInt32) {
        defer { batch.removeAll(keepingCapacity: true) }
        guard let staged, !batch.isEmpty, let pieces = pieces[slot] else { return }
        if pieces.count == 1, pieces[0].slotPages.lowerBound == 0, pieces[0].firstPage.value == 0,
            pieces[0].slotPages.upperBound == staged[pieces[0].block].pageCount
        {
            unsafe batch.withUnsafeBufferPointer { unsafe staged[pieces[0].block].insert($0) }
            return
        }
        var numbers: [UInt64] = []
        numbers.reserveCapacity(batch.count)
        for piece in pieces {
            numbers.removeAll(keepingCapacity: true)
            for page in batch where piece.slotPages.contains(page) {
                numbers.append(piece.firstPage.value + (page - piece.slotPages.lowerBound))
            }
            unsafe numbers.withUnsafeBufferPointer { unsafe staged[piece.block].insert($0) }
        }
    }
}
