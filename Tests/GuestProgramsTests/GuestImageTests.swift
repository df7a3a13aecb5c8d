import Testing

@testable import GuestPrograms

@Suite("Guest images")
struct GuestImageTests {
    private static let gibibyte: UInt64 = 1 << 30

    private func image(
        _ text: String, _ memoryBytes: UInt64, low: UInt64 = 3 << 30, cpus: Int = 2, tscKilohertz: UInt64 = 2_000_000
    ) throws -> GuestImage {
        try GuestProgram(parsing: text).image(
            memoryBytes: memoryBytes, lowMemoryBytes: low, cpus: cpus, tscKilohertz: tscKilohertz)
    }

    private func parameters(_ image: GuestImage) throws -> ParameterBlock {
        try ParameterBlock(
            words: (0..<ParameterBlock.wordCount).map { image.segments[0].bytes.word(at: 0x200 + $0 * 8) })
    }

    /// Walk the image's page tables as the processor does.
    private func translate(_ image: GuestImage, _ address: UInt64) -> (physical: UInt64, flags: UInt64)? {
        guard let tables = image.segments.last else { return nil }
        var table = tables.physicalAddress
        for shift in [39, 30, 21] as [UInt64] {
            let offset = table - tables.physicalAddress + (address >> shift & 511) * 8
            let entry = tables.bytes.word(at: Int(offset))
            guard entry & 1 != 0 else { return nil }
            table = entry & 0xF_FFFF_FFFF_F000
            if shift == 21 {
                return entry & 0x80 == 0 ? nil : (table + address % (2 << 20), entry & 0xFFF)
            }
        }
        return nil
    }

    @Test("code starts at 0x7c00, low memory ends below 640 KiB, page tables stand at 1 MiB, nothing overlaps")
    func segments() throws {
        let image = try image("probe", 64 * Self.gibibyte, cpus: 64)
        #expect(image.entryAddress == 0x7C00)
        #expect(image.segments.first?.physicalAddress == 0x7C00)
        #expect(image.segments.last?.physicalAddress == 0x100000)
        for (first, second) in zip(image.segments, image.segments.dropFirst()) {
            #expect(first.physicalAddress + UInt64(first.bytes.count) <= second.physicalAddress)
        }
        for segment in image.segments.dropLast() {
            #expect(segment.physicalAddress + UInt64(segment.bytes.count) <= 0xA0000)
        }
    }

    @Test("the window maps each page of RAM in its place on both sides of the hole, open to ring 3")
    func window() throws {
        let image = try image("idle", 5 * Self.gibibyte)
        for offset in [0, 0x123456, 3 * Self.gibibyte - 1, 3 * Self.gibibyte, 5 * Self.gibibyte - 8] {
            let (physical, flags) = try #require(translate(image, GuestLayout.window + offset))
            #expect(physical == (offset < 3 * Self.gibibyte ? offset : offset + Self.gibibyte))
            #expect(flags == 0xE7)
        }
        #expect(translate(image, GuestLayout.window + 5 * Self.gibibyte) == nil)
        #expect(translate(image, 0x8000)?.physical == 0x8000)
        #expect(translate(image, 2 << 20) == nil)
    }

    @Test("the local APIC is mapped for ring 0 alone, and uncached")
    func localAPIC() throws {
        let (physical, flags) = try #require(translate(try image("idle", Self.gibibyte), 0xFEE0_0300))
        #expect(physical == 0xFEE0_0300)
        #expect(flags & 4 == 0 && flags & 0x18 == 0x18)
    }

    @Test("page tables follow what the guest uses: 512 GiB of RAM with 4 GiB filled needs ten pages")
    func tablesFollowUse() throws {
        let image = try image("dirty,fill=4G,working-set=1G", 512 * Self.gibibyte)
        #expect(image.segments.last?.bytes.count == 10 * 4096)
        let block = try parameters(image)
        #expect(block.fillFirst == 256 + 10)
        #expect(block.fillPages == 4 << 18)
        #expect(block.workFirst + 1 << 18 == block.mappedPages)
        #expect(translate(image, GuestLayout.window + 5 * Self.gibibyte) == nil)
    }

    @Test("beyond 512 GiB a second page of pointers is used")
    func beyondOnePointerTable() {
        #expect(PageTables.pageCount(mappedPages: 0) == 4)
        #expect(PageTables.pageCount(mappedPages: 512 << 18) == 4 + 1 + 512)
        #expect(PageTables.pageCount(mappedPages: 512 << 18 + 1) == 4 + 2 + 513)
    }

    @Test("'all' fills from the page tables to the end of RAM, and the working set is the end")
    func fillAll() throws {
        let block = try parameters(try image("dirty,working-set=16M,stride=3", Self.gibibyte))
        #expect(block.fillFirst == 256 + 6)
        #expect(block.fillRange.upperBound == 1 << 18)
        #expect(block.workFirst == 1 << 18 - 4096)
        #expect(block.positions == 1366)
    }

    @Test("a dirty guest fills its working set even with fill=none, a probe does not")
    func fillNone() throws {
        #expect(try parameters(try image("dirty,fill=none,working-set=8M", Self.gibibyte)).fillPages == 2048)
        let probe = try parameters(try image("probe,fill=none,working-set=8M", Self.gibibyte))
        #expect(probe.fillPages == 0)
        #expect(probe.positions == 2048)
    }

    @Test(
        "a rate becomes batches of at most 64 touches whose time gives that rate",
        arguments: [("1M", 1 << 20), ("800M", 800 << 20), ("64G", 64 << 30), ("4096", 4096), ("1", 1)]
            as [(String, UInt64)])
    func pace(text: String, rate: UInt64) throws {
        let block = try parameters(try image("dirty,rate=\(text)", Self.gibibyte, cpus: 4))
        #expect((1...64).contains(block.batch))
        let bytesPerSecond = Double(block.batch * 4096) / (Double(block.slice) / 2e9)
        #expect(abs(bytesPerSecond / Double(rate) - 1) < 0.01)
    }

    @Test(
        "the line tells vCPUs, fill and working set, and fits; the digits of the other line are where the guest writes them"
    )
    func lines() throws {
        let image = try image("dirty,fill=1G,working-set=256M", 2 * Self.gibibyte)
        let shared = try #require(image.segments.first { $0.physicalAddress == 0xF000 }).bytes
        func text(at offset: Int) -> String {
            String(decoding: shared[offset...].prefix { $0 != 0 }, as: UTF8.self)
        }
        #expect(text(at: 0x100) == "godwit guest dirty: 2 cpus, 1024 MiB filled, working set 256 MiB\n")
        #expect(
            text(at: 0x200) == "godwit guest dirty: only 00 of 2 cpus came up, 1024 MiB filled, working set 256 MiB\n")
        let digits = Int(try parameters(image).digits) - 0xF000
        #expect(text(at: digits).hasPrefix("00 of"))
    }

    @Test("each vCPU's TSS opens the eight ports of the UART to ring 3, and no other below 0x400")
    func ioBitmap() throws {
        let page = GuestLayout.cpuPage(index: 3)
        let bitmap = 0x200 + Int(page[0x266])
        for port in 0..<0x400 {
            let isClosed = page[bitmap + port / 8] >> UInt8(port % 8) & 1 == 1
            #expect(isClosed == !(0x3F8...0x3FF).contains(port))
        }
        #expect(page[bitmap + 0x80] == 0xFF)
        #expect(page.word(at: 0x204) == 0x13800)
    }

    @Test(
        "what cannot work is refused in a sentence",
        arguments: [
            ("dirty", 1 << 20, 1 << 20, 1, "2 MiB"), ("idle,fill=2G", 1 << 30, 1 << 30, 1, "fill"),
            ("dirty,working-set=2G", 1 << 30, 1 << 30, 1, "working set"), ("idle", 1 << 30, 1 << 30, 0, "vCPUs"),
            ("idle", 1 << 30, 1 << 30, 65, "vCPUs"), ("idle", 1 << 30 + 1, 1 << 30, 1, "4 KiB"),
            ("idle", 1 << 32, 1 << 32, 1, "local APIC"), ("idle", 1 << 30, 1 << 29 + 4096, 1, "2 MiB"),
            ("idle", 1 << 47, 3 << 30, 1, "64 TiB"), ("idle", 1 << 30, 0, 1, "at address 0"),
        ] as [(String, UInt64, UInt64, Int, String)])
    func refused(text: String, memoryBytes: UInt64, low: UInt64, cpus: Int, word: String) throws {
        let error = #expect(throws: GuestProgramError.self) { try image(text, memoryBytes, low: low, cpus: cpus) }
        guard case .doesNotFit(_, let reason) = error else {
            Issue.record("\(String(describing: error))")
            return
        }
        #expect(reason.contains(word))
    }

    @Test("a clock rate the guest cannot count with is refused", arguments: [0, 1 << 32] as [UInt64])
    func clockRate(tscKilohertz: UInt64) {
        #expect(throws: GuestProgramError.self) { try image("idle", 1 << 30, tscKilohertz: tscKilohertz) }
    }

    @Test("two MiB of RAM are enough for a guest that fills it")
    func smallest() throws {
        let block = try parameters(try image("dirty", 2 << 20))
        #expect(block.fillRange == 262..<512)
    }
}
