import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host

/// The memory slots of a machine: which part of a RAM block the kernel shows where.
///
/// Blocks are cut into large pieces, so that dirty logging is turned on, read and paid for only where a guest has memory in use. Pieces
/// are not small, because making one takes the kernel about 20 ms (it waits for a grace period), whatever its size.
struct KVMSlots {
    struct Slot {
        let number: UInt32
        let guestAddress: GuestPhysicalAddress
        /// Index of the block in `GuestMemory.blocks`.
        let block: Int
        let pages: Range<PageIndex>
        let hostAddress: UInt
        var pageCount: UInt64 { pages.upperBound.value - pages.lowerBound.value }
    }

    /// Slots start at multiples of this many bytes; larger guests get larger slots, not more than some 32.
    static func granule(for memory: GuestMemory) -> UInt64 {
        var granule: UInt64 = 64 << 30
        while memory.byteCount / granule > 32 { granule *= 2 }
        return granule
    }

    let slots: [Slot]

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
                slots.append(
                    Slot(
                        number: UInt32(slots.count), guestAddress: address, block: block,
                        pages: start.page..<RAMOffset(start.value + size).page,
                        hostAddress: range.block.mapping.hostAddress(at: Int(start.value))))
                done += size
            }
        }
        guard slots.count <= limit else {
            throw AcceleratorError(
                "guest memory needs \(slots.count) memory slots, but this kernel's KVM has \(limit); use less memory")
        }
        self.slots = slots
        for slot in slots { try Self.set(slot, on: machine, logging: false) }
    }

    /// Makes a slot, or changes whether it logs writes. The guest may run.
    static func set(_ slot: Slot, on machine: Descriptor, logging: Bool) throws(AcceleratorError) {
        var region = kvm_userspace_memory_region()
        region.slot = slot.number
        region.flags = logging ? UInt32(KVM_MEM_LOG_DIRTY_PAGES) : 0
        region.guest_phys_addr = slot.guestAddress.value
        region.memory_size = slot.pageCount << GuestPage.shift
        region.userspace_addr = UInt64(slot.hostAddress)
        let what = "KVM_SET_USER_MEMORY_REGION \(slot.guestAddress), \(slot.pageCount << GuestPage.shift) bytes"
        let result = unsafe gw_kvm_set_user_memory_region(machine.number, &region)
        try kvm(
            result, what, remedy: result == -ENOMEM ? "the host has not enough memory for a guest of this size" : nil)
    }
}
