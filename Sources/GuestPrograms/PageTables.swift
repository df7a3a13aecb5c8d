/// The guest's page tables, made by the host, because the guest's own ring 0 may be emulated and slow.
///
/// They map the first 2 MiB and the local APIC where they are, and the RAM the guest uses, hole removed, at
/// ``GuestLayout/window``, in pages of 2 MiB: 4 KiB of tables for each GiB used, whatever the machine's size. Accessed and dirty
/// bits are set beforehand, so that the processor does not write the tables.
struct PageTables {
    static let largePageBytes: UInt64 = 2 << 20

    let map: MemoryMap
    /// Pages to map, from RAM offset 0 on.
    let mappedPages: UInt64

    private static let user: UInt64 = 0x27  // present, writable, ring 3, accessed
    private static let large: UInt64 = 0xC0  // 2 MiB, dirty
    private static let device: UInt64 = 0xFB  // as above, ring 0 only, not cached

    /// Pages of tables for so many pages mapped: PML4, three for identity, then directories of 1 GiB under pointers of 512 GiB.
    static func pageCount(mappedPages: UInt64) -> UInt64 {
        4 + blocks(mappedPages, 1 << 27) + blocks(mappedPages, 1 << 18)
    }

    private static func blocks(_ pages: UInt64, _ size: UInt64) -> UInt64 { (pages + size - 1) / size }

    /// The tables' content, to be placed at ``GuestLayout/tables``.
    var bytes: [UInt8] {
        var result = [UInt8](repeating: 0, count: Int(Self.pageCount(mappedPages: mappedPages) * GuestLayout.pageBytes))
        func set(_ table: UInt64, _ entry: UInt64, _ value: UInt64) {
            result.place(value, at: Int(table * GuestLayout.pageBytes + entry * 8))
        }
        func pointer(to table: UInt64) -> UInt64 { GuestLayout.tables + table * GuestLayout.pageBytes | Self.user }

        set(0, 0, pointer(to: 1))
        set(1, 0, pointer(to: 2))
        set(1, GuestLayout.localAPIC >> 30, pointer(to: 3))
        set(2, 0, Self.user | Self.large)
        set(3, GuestLayout.localAPIC >> 21 & 511, GuestLayout.localAPIC | Self.device)

        let pointerTables = Self.blocks(mappedPages, 1 << 27)
        let directories = Self.blocks(mappedPages, 1 << 18)
        for index in 0..<pointerTables {
            set(0, GuestLayout.window >> 39 + index, pointer(to: 4 + index))
        }
        for index in 0..<directories {
            set(4, index, pointer(to: 4 + pointerTables + index))
        }
        for index in 0..<Self.blocks(mappedPages, 512) {
            let address = map.physicalAddress(index * Self.largePageBytes)
            set(4 + pointerTables, index, address | Self.user | Self.large)
        }
        return result
    }
}
