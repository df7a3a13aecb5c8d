import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host
import Synchronization

/// The memory slots of a machine: which part of a RAM block the kernel shows where.
///
/// Slots are cut into large pieces, so that dirty logging is turned on, read and paid for only where a guest has memory in use. Pieces
/// are not small, because making one waits for a grace period of the kernel, whatever its size.
///
/// `SlotPlan` says how slots follow a change of the layout, `+Commit` carries plans out, `+Fault` corrects slots that promised more than
/// the layout shows.
final class KVMSlots: Sendable {
    let machine: Descriptor
    let memory: GuestMemory
    let strategy: SlotStrategy
    /// Keeps vCPUs out of the guest for changes that cannot be made under them.
    let hold = VirtualCPUHold()
    /// Held while slots change, or their logging does. Taken before the lock of a `SlotObserver`, never inside it.
    let changing = Mutex(())
    /// How many changes are done: a vCPU that failed compares it with what it was before.
    let generation = Atomic<UInt64>(0)
    let counters = Mutex(MemorySlotStatistics())
    let windows: SlotWindows
    let limit: Int
    let shadowPaging: ShadowPaging
    let granulePages: UInt64
    private let table = Mutex<[Slot]>([])
    private let observing = Mutex<(any SlotObserver)?>(nil)
    private let kernel = Mutex(Kernel())
    private let scratch: ScratchSlot
    private let damageFound = Mutex<String?>(nil)
    private let hasDamage = Atomic<Bool>(false)

    /// What the kernel was told last.
    private struct Kernel {
        var slots: [UInt32: Slot] = [:]
        var logged: Set<UInt32> = []
    }

    /// The slots there are, by ascending guest address: a value that does not change under its reader.
    var slots: [Slot] { table.withLock { $0 } }

    var observer: (any SlotObserver)? { observing.withLock { $0 } }

    /// Why nobody knows what the slots show: a change of the layout failed, and so did the way back. Once so, so for good.
    var damage: String? { hasDamage.load(ordering: .acquiring) ? damageFound.withLock { $0 } : nil }

    /// No vCPU enters the guest any more: it would go on with memory that may not be its own.
    func isDamaged(_ sentence: String) {
        damageFound.withLock { $0 = $0 ?? sentence }
        hasDamage.store(true, ordering: .sequentiallyConsistent)
    }

    func setObserver(_ new: any SlotObserver) { observing.withLock { $0 = new } }

    /// Slots start at multiples of this many bytes; larger guests get larger slots, not more than some 32.
    static func granule(for memory: GuestMemory) -> UInt64 {
        var granule: UInt64 = 64 << 30
        while memory.byteCount / granule > 32 { granule *= 2 }
        return granule
    }

    /// With a dirty ring the smallest part of memory that can be watched on its own is a slot: as small as a chunk that is sent, where
    /// that makes not more than some 32.
    static func fineGranule(for memory: GuestMemory) -> UInt64 {
        var granule: UInt64 = 64 << 20
        while memory.byteCount / granule > 32 { granule *= 2 }
        return granule
    }

    /// Makes the slots that show a machine's memory as it is laid out now.
    ///
    /// - Parameter granule: slots end at multiples of this many bytes at the latest; large ones if left out.
    init(
        machine: Descriptor, memory: GuestMemory, limit: Int, strategy: SlotStrategy = .atomic,
        shadowPaging: ShadowPaging = .anyMode, granule: UInt64? = nil
    ) throws(AcceleratorError) {
        self.machine = machine
        self.memory = memory
        self.limit = limit
        self.strategy = strategy
        self.shadowPaging = shadowPaging
        granulePages = (granule ?? Self.granule(for: memory)) >> GuestPage.shift
        windows = SlotWindows(granulePages: granulePages)
        scratch = ScratchSlot(number: UInt32(limit - 1))
        do throws(MemoryError) {
            // There is no vCPU yet that would have to be held.
            try perform(try plan(to: memory.view))
        } catch { throw AcceleratorError(error.description) }
    }

    /// The plan from the slots there are to a layout. - Throws: a layout that cannot be shown.
    func plan(to view: FlatView) throws(MemoryError) -> SlotPlan {
        var shown: [ShownPages] = []
        for range in view.ranges {
            let page = GuestPage.byteCount
            guard let block = memory.blocks.firstIndex(where: { $0 === range.block }) else {
                throw MemoryError("\(range.place): block '\(range.block.name)' is none of this machine's")
            }
            guard range.guestAddress.value % page == 0, range.byteCount % page == 0, range.offset.value % page == 0
            else {
                throw MemoryError("\(range.place): KVM shows memory in whole pages of \(page) bytes")
            }
            guard range.offset.value <= range.block.byteCount,
                range.byteCount <= range.block.byteCount - range.offset.value
            else {
                throw MemoryError(
                    "\(range.place): block '\(range.block.name)' ends before, at \(range.block.byteCount) bytes")
            }
            let first = range.guestAddress.value >> GuestPage.shift
            let pages = first..<first + range.byteCount >> GuestPage.shift
            shown.append(
                ShownPages(
                    pages: pages,
                    content: .init(block: block, firstPage: range.offset.page, isReadOnly: range.isReadOnly)))
            guard strategy == .atomic, range.block.hasWindows else { continue }
            do throws(SystemError) { try windows.reserve(pages) } catch {
                throw MemoryError("\(range.place): \(error.description)")
            }
        }
        var planner = planner
        planner.devices = view.devicePages
        return try planner.plan(from: slots, to: shown)
    }

    /// Numbers of the slots whose writes are not to be lost over a change: one that nobody had written to when its log was to be turned on
    /// may have been written since.
    private var watched: Set<UInt32> {
        let logged = kernel.withLock { $0.logged }
        return observer?.isTracking == true ? logged.union(slots.map(\.number)) : logged
    }

    var planner: SlotPlanner {
        SlotPlanner(
            strategy: strategy, hasFile: memory.blocks.map(\.hasWindows), granulePages: granulePages,
            limit: limit, hasShadowPaging: shadowPaging != .none, logged: watched,
            windowAddress: { [windows] in windows.hostAddress(of: $0) },
            blockAddress: { [memory] in memory.blocks[$0].mapping.hostAddress(at: Int($1.offset.value)) })
    }

    func publish(_ slots: [Slot]) { table.withLock { $0 = slots } }

    // MARK: The kernel

    /// Changes whether a slot logs writes. The guest may run. A slot that has gone meanwhile is left alone.
    func set(_ slot: Slot, logging: Bool) throws(AcceleratorError) {
        try kernel.withLock { (kernel) throws(AcceleratorError) in
            guard let now = kernel.slots[slot.number], now.isPlaced(like: slot) else { return }
            try tell(now, byteCount: now.byteCount, logging: logging)
            if logging { kernel.logged.insert(slot.number) } else { kernel.logged.remove(slot.number) }
        }
    }

    /// Makes a slot. The guest may run.
    func make(_ slot: Slot, logging: Bool) throws(AcceleratorError) {
        try kernel.withLock { (kernel) throws(AcceleratorError) in
            try tell(slot, byteCount: slot.byteCount, logging: logging)
            kernel.slots[slot.number] = slot
            if logging { kernel.logged.insert(slot.number) }
        }
    }

    /// Takes a slot away. The guest may run.
    func remove(_ slot: Slot) throws(AcceleratorError) {
        try kernel.withLock { (kernel) throws(AcceleratorError) in
            try tell(slot, byteCount: 0, logging: false)
            kernel.slots[slot.number] = nil
            kernel.logged.remove(slot.number)
        }
    }

    private func tell(_ slot: Slot, byteCount: UInt64, logging: Bool) throws(AcceleratorError) {
        var region = kvm_userspace_memory_region()
        region.slot = slot.number
        region.flags =
            (logging ? UInt32(KVM_MEM_LOG_DIRTY_PAGES) : 0) | (slot.isReadOnly ? UInt32(KVM_MEM_READONLY) : 0)
        region.guest_phys_addr = slot.guestAddress.value
        region.memory_size = byteCount
        region.userspace_addr = UInt64(slot.hostAddress)
        let what = "KVM_SET_USER_MEMORY_REGION \(slot.guestAddress), \(byteCount) bytes"
        let result = unsafe gw_kvm_set_user_memory_region(machine.number, &region)
        let remedy: String? =
            switch result {
            case -ENOMEM: "the host has not enough memory for a guest of this size"
            case -EINVAL: "this address may lie beyond what the guest's processor can address"
            default: nil
            }
        try kvm(result, what, remedy: remedy)
    }

    /// Waits for a grace period, in which the kernel forgets translations as well. The guest may run, and has no gap.
    func settle() throws(AcceleratorError) {
        counters.withLock { $0.zaps += 1 }
        try scratch.move { (slot) throws(AcceleratorError) in
            try tell(slot, byteCount: slot.byteCount, logging: false)
        }
    }
}

/// A slot of one page out of every guest's reach. To move it, the kernel takes it away and makes it again: both wait until no vCPU is
/// inside an access to guest memory or a fault, and the first has the kernel forget every translation made from guest page tables
/// (kvm_arch_flush_shadow_memslot). No other slot is touched.
private final class ScratchSlot: Sendable {
    private struct Place {
        var address: GuestPhysicalAddress
        var page: AddressWindow
    }
    private let number: UInt32
    private let place = Mutex<Place?>(nil)
    /// The ends of address spaces of 46, 39 and 36 bits: kernels refuse what lies beyond their own.
    private static let candidates: [UInt64] = [(1 << 46) - (64 << 10), (1 << 39) - (64 << 10), (1 << 36) - (64 << 10)]

    init(number: UInt32) { self.number = number }

    func move(_ tell: (Slot) throws(AcceleratorError) -> Void) throws(AcceleratorError) {
        try place.withLock { (place) throws(AcceleratorError) in
            if place == nil { place = try make(tell) }
            guard var moved = place else { return }
            moved.address = GuestPhysicalAddress(moved.address.value ^ GuestPage.byteCount)
            try tell(slot(at: moved))
            place = moved
        }
    }

    private func slot(at place: Place) -> Slot {
        Slot(
            number: number, guestAddress: place.address, pageCount: 1, hostAddress: place.page.hostAddress(at: 0),
            pieces: [])
    }

    private func make(_ tell: (Slot) throws(AcceleratorError) -> Void) throws(AcceleratorError) -> Place {
        let page: AddressWindow
        do throws(SystemError) { page = try AddressWindow(byteCount: Int(GuestPage.byteCount)) } catch {
            throw AcceleratorError(error.description)
        }
        var failure = AcceleratorError("")
        for candidate in Self.candidates {
            let place = Place(address: GuestPhysicalAddress(candidate), page: page)
            do throws(AcceleratorError) {
                try tell(slot(at: place))
                return place
            } catch { failure = error }
        }
        throw failure
    }
}

extension FlatRange {
    /// For sentences.
    var place: String { "memory at \(guestAddress), \(byteCount) bytes" }
}

extension FlatView {
    /// Guest pages where a device answers, be it in a part of them.
    fileprivate var devicePages: [Range<UInt64>] {
        deviceRanges.map { range in
            range.lowerBound >> GuestPage.shift..<(range.upperBound + GuestPage.byteCount - 1) >> GuestPage.shift
        }
    }
}
