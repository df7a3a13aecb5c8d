import GuestMemory
import Host

/// What KVM may have made of guest page tables, and keeps when other memory takes their place.
enum ShadowPaging: Sendable {
    /// Nothing: the processor walks the guest's tables itself.
    case none
    /// Page tables of 64-bit guests: other guests are emulated (PVM).
    case longMode
    /// Page tables of any guest.
    case anyMode
}

extension KVMSlots {
    /// Whether the kernel may hold translations made from page tables that lay in these pages, which are not shown any more.
    ///
    /// It marks every entry it uses as accessed in the guest's table (unless the table is read-only), and follows what the guest writes to
    /// the table afterwards. So a page without an entry that is present, accessed and points into the address space is behind none of its
    /// translations. A page of data can look like a table: then it is settled for nothing.
    func mayHoldTables(_ lost: [ShownPages]) -> Bool {
        let limit = max(4 << 30, (slots.last?.guestPages.upperBound ?? 0) << GuestPage.shift)
        var left = Self.scannedPages
        for item in lost {
            let block = memory.blocks[item.content.block]
            let first = item.content.firstPage
            let pages = first..<PageIndex(first.value + UInt64(item.pages.count))
            // Never-touched pages hold no tables, and are not read: that would allocate them.
            guard let runs = try? block.allocatedRuns(in: pages) else { return true }
            for run in runs {
                let count = run.upperBound.value - run.lowerBound.value
                guard count <= left else { return true }
                left -= count
                let look = TableLook(
                    mask: item.content.isReadOnly ? 1 : 0x21, limit: limit, isNarrow: shadowPaging == .anyMode)
                // SAFETY: whole pages of the block; what the guest changes meanwhile through another address may be seen or not.
                let found = unsafe block.mapping.withBytes(
                    at: Int(run.lowerBound.offset.value), count: Int(count) << Int(GuestPage.shift)
                ) { unsafe look.finds($0) }
                if found { return true }
            }
        }
        return false
    }

    /// More than so many pages cost more to look at than a grace period does.
    private static let scannedPages: UInt64 = 8192
}

/// What an entry of a page table looks like.
private struct TableLook {
    let mask: UInt64
    /// The end of the guest's address space.
    let limit: UInt64
    /// Entries of four bytes count as well.
    let isNarrow: Bool

    func finds(_ bytes: UnsafeRawBufferPointer) -> Bool {
        var offset = 0
        while offset < bytes.count {
            defer { offset += 8 }
            let word = unsafe bytes.loadUnaligned(fromByteOffset: offset, as: UInt64.self)
            if word == 0 { continue }
            if word & mask == mask, word & 0x000f_ffff_ffff_f000 < limit { return true }
            guard isNarrow else { continue }
            if word & mask == mask || (word >> 32) & mask == mask { return true }
        }
        return false
    }
}
