/// Fixed places of a guest in physical memory; `Guests/layout.inc` is the other side.
enum GuestLayout {
    static let pageBytes: UInt64 = 4096
    static let wordsPerPage = 512
    static let maximumCPUs = 64

    /// The flat image, and its first instruction.
    static let entry: UInt64 = 0x7C00
    static let parameters: UInt64 = 0x7E00
    /// A page of code that is never written.
    static let code: UInt64 = 0x8000
    /// Counters and lines all vCPUs share.
    static let shared: UInt64 = 0xF000
    static let line: UInt64 = 0xF100
    static let shortLine: UInt64 = 0xF200
    /// One page per vCPU: status block, TSS, stacks.
    static let cpuPages: UInt64 = 0x10000
    /// One page per vCPU: 512 counters.
    static let histograms: UInt64 = 0x50000
    static let tables: UInt64 = 0x100000
    /// Virtual address of RAM offset 0.
    static let window: UInt64 = 1 << 39
    static let localAPIC: UInt64 = 0xFEE0_0000

    static let parametersMagic = magic("GODWITP1")
    static let sharedMagic = magic("GODWITG1")
    static let statusMagic = magic("GODWITS1")

    private static func magic(_ text: String) -> UInt64 {
        text.utf8.reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }

    static func cpuPageAddress(_ index: Int) -> UInt64 {
        cpuPages + UInt64(index) * pageBytes
    }

    /// The page of a vCPU as the guest finds it: its index, its way to sleep, and a 64-bit TSS whose I/O permission bitmap opens
    /// the UART to ring 3.
    static func cpuPage(index: Int) -> [UInt8] {
        let task = 0x200
        let bitmap = 0x68
        var page = [UInt8](repeating: 0, count: Int(pageBytes))
        page.place(statusMagic, at: 0)
        page.place(UInt64(index), at: GuestStatus.Word.index.rawValue * 8)
        // The BSP wakes by the PIT; the others arm their local APIC timer, which counts nanoseconds under KVM.
        page.place(index == 0 ? 0 : 1_000_000, at: GuestStatus.Word.napTicks.rawValue * 8)
        page.place(cpuPageAddress(index) + 0x800, at: task + 4)  // RSP0
        page[task + 0x66] = UInt8(bitmap)
        for port in 0...0x80 {
            page[task + bitmap + port] = 0xFF
        }
        page[task + bitmap + 0x3F8 / 8] = 0
        return page
    }
}

/// Where a machine's RAM stands: the first part at 0, the rest at 4 GiB.
struct MemoryMap: Equatable, Sendable {
    static let highMemory: UInt64 = 4 << 30
    /// Addresses of 46 bits; the guest's window could map 47.
    static let maximumBytes: UInt64 = 64 << 40

    let memoryBytes: UInt64
    let lowMemoryBytes: UInt64

    var pages: UInt64 { memoryBytes / GuestLayout.pageBytes }
    var lowPages: UInt64 { lowMemoryBytes / GuestLayout.pageBytes }

    init(memoryBytes: UInt64, lowMemoryBytes: UInt64, guest: String) throws(GuestProgramError) {
        guard memoryBytes <= Self.maximumBytes, memoryBytes % GuestLayout.pageBytes == 0 else {
            throw .doesNotFit(
                guest: guest,
                reason:
                    "\(memoryBytes) bytes of RAM; it needs a multiple of 4 KiB, at most \(Self.maximumBytes >> 40) TiB")
        }
        let whole = lowMemoryBytes == memoryBytes || lowMemoryBytes % PageTables.largePageBytes == 0
        guard whole, lowMemoryBytes <= min(memoryBytes, GuestLayout.localAPIC) else {
            throw .doesNotFit(
                guest: guest,
                reason: "\(lowMemoryBytes) bytes of RAM below 4 GiB; they must end below the local APIC "
                    + "at 0xfee00000, at a multiple of 2 MiB if more RAM follows")
        }
        self.memoryBytes = memoryBytes
        self.lowMemoryBytes = lowMemoryBytes
    }

    /// The physical address of an offset into RAM.
    func physicalAddress(_ offset: UInt64) -> UInt64 {
        offset < lowMemoryBytes ? offset : offset - lowMemoryBytes + Self.highMemory
    }
}
