import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host
import Synchronization

/// A memory slot: a guest-physical range, and the pages of RAM blocks that stand behind it piece by piece.
struct Slot: Sendable {
    /// Consecutive pages of a slot that are consecutive pages of a block.
    struct Piece: Sendable {
        /// Pages of the slot, counted from its first.
        let slotPages: Range<UInt64>
        /// Index of the block in `GuestMemory.blocks`.
        let block: Int
        /// The page of the block that stands behind `slotPages.lowerBound`.
        let firstPage: PageIndex

        var blockPages: Range<PageIndex> { firstPage..<firstPage.advanced(by: slotPages.count) }
    }

    /// KVM's slot number.
    let number: UInt32
    let guestAddress: GuestPhysicalAddress
    let pageCount: UInt64
    let hostAddress: UInt
    /// Guest writes leave the guest instead (KVM_MEM_READONLY).
    var isReadOnly = false
    /// In order, without overlap. What no piece covers shows no memory.
    var pieces: [Piece]

    var byteCount: UInt64 { pageCount << GuestPage.shift }
}

/// Is told of changes to slots, so that no dirty page is lost over them. Calls come one at a time, on the thread that commits.
protocol SlotObserver: AnyObject, Sendable {
    /// A slot is about to be made. - Returns: whether its log is on from the start.
    func willAdd(_ slot: Slot) -> Bool
    /// No vCPU can write through the pieces of `old` any more that `new` (the slot from now on; `nil`: it goes) does not have: the last
    /// chance to ask the kernel what was written through them. What is reported for a page that has a new piece counts for both.
    /// The table still holds `old`.
    func willChange(_ old: Slot, to new: Slot?) throws(AcceleratorError)
}

/// The memory slots of a machine: which part of a RAM block the kernel shows where.
///
/// Blocks are cut into large pieces, so that dirty logging is turned on, read and paid for only where a guest has memory in use. Pieces
/// are not small, because making one takes the kernel about 20 ms (it waits for a grace period), whatever its size.
final class KVMSlots: Sendable {
    let machine: Descriptor
    /// Held while slots change, or their logging does. Taken before the lock of a `SlotObserver`, never inside it.
    let changing = Mutex(())
    private let table: Mutex<[Slot]>
    private let observer = Mutex<(any SlotObserver)?>(nil)

    /// The slots there are, by ascending guest address: a value that does not change under its reader.
    var slots: [Slot] { table.withLock { $0 } }

    func setObserver(_ new: any SlotObserver) { observer.withLock { $0 = new } }

    /// Slots start at multiples of this many bytes; larger guests get larger slots, not more than some 32.
    static func granule(for memory: GuestMemory) -> UInt64 {
        var granule: UInt64 = 64 << 30
        while memory.byteCount / granule > 32 { granule *= 2 }
        return granule
    }

    init(machine: Descriptor, memory: GuestMemory, limit: Int) throws(AcceleratorError) {
        let granule = Self.granule(for: memory)
        var slots: [Slot] = []
        for range in memory.view.ranges {
            guard let block = memory.blocks.firstIndex(where: { $0 === range.block }) else { continue }
            var done: UInt64 = 0
            while done < range.byteCount {
                let address = range.guestAddress + done
                let size = min(range.byteCount - done, granule - address.value % granule)
                let start = RAMOffset(range.offset.value + done)
                let pages = size >> GuestPage.shift
                slots.append(
                    Slot(
                        number: UInt32(slots.count), guestAddress: address, pageCount: pages,
                        hostAddress: range.block.mapping.hostAddress(at: Int(start.value)),
                        pieces: [Slot.Piece(slotPages: 0..<pages, block: block, firstPage: start.page)]))
                done += size
            }
        }
        guard slots.count <= limit else {
            throw AcceleratorError(
                "guest memory needs \(slots.count) memory slots, but this kernel's KVM has \(limit); use less memory")
        }
        self.machine = machine
        table = Mutex(slots)
        for slot in slots { try set(slot, logging: false) }
    }

    /// Makes a slot, or changes whether it logs writes. The guest may run.
    func set(_ slot: Slot, logging: Bool) throws(AcceleratorError) {
        var region = kvm_userspace_memory_region()
        region.slot = slot.number
        region.flags =
            (logging ? UInt32(KVM_MEM_LOG_DIRTY_PAGES) : 0) | (slot.isReadOnly ? UInt32(KVM_MEM_READONLY) : 0)
        region.guest_phys_addr = slot.guestAddress.value
        region.memory_size = slot.byteCount
        region.userspace_addr = UInt64(slot.hostAddress)
        let what = "KVM_SET_USER_MEMORY_REGION \(slot.guestAddress), \(slot.byteCount) bytes"
        let result = unsafe gw_kvm_set_user_memory_region(machine.number, &region)
        try kvm(
            result, what, remedy: result == -ENOMEM ? "the host has not enough memory for a guest of this size" : nil)
    }
}
