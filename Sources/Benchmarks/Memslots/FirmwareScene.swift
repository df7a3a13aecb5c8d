import GuestMemory
import GuestPrograms
import Host

/// The memory of a PC and what its firmware does to the layout, with places everywhere in what changes.
struct FirmwareScene {
    let memory: GuestMemory
    let steps: [MemoryTransaction]
    /// Pages that show the same in no two views.
    private(set) var changing: [UInt64] = []
    private let views: [FlatView]

    private static let mebibyte: UInt64 = 1 << 20
    private static let bar: UInt64 = 48 * mebibyte
    private static let dimm: UInt64 = 160 * mebibyte

    /// PC, PAM: what lies at C0000 to FFFFF, in the order and in the pieces in which firmware unlocks it.
    private static let segments: [Range<UInt64>] =
        [0xF0000..<0x100000] + (0..<12).map { 0xC0000 + $0 * 0x4000..<0xC4000 + $0 * 0x4000 }

    init() throws {
        func block(_ name: String, _ byteCount: UInt64) throws -> RAMBlock {
            try RAMBlock(name: name, byteCount: byteCount, backing: .memfd)
        }
        let ram = try block("ram", 128 * Self.mebibyte)
        let rom = try block("rom", 256 << 10)
        let vram = try block("vram", 32 * Self.mebibyte)
        let dimm = try block("dimm", 16 * Self.mebibyte)
        memory = GuestMemory(blocks: [ram, rom, vram, dimm])

        var layout = MemoryTransaction()
        let all = layout.create(.ram("ram", ram))
        let video = layout.create(.ram("vram", vram))
        layout.add(.alias("ram-below-4g", of: all, byteCount: ram.byteCount), at: 0)
        layout.add(.rom("bios", rom), at: 0xC0000, priority: 1)
        let pam = Self.segments.map { segment in
            let alias = MemoryRegion.alias(
                "pam-\(String(segment.lowerBound, radix: 16))", of: all, offset: segment.lowerBound,
                byteCount: UInt64(segment.count))
            let id = layout.add(alias, at: segment.lowerBound, priority: 2)
            layout.enable(id, false)
            return id
        }
        let smram = layout.add(.alias("vga-low", of: video, byteCount: 128 << 10), at: 0xA0000, priority: 1)
        let bar = layout.add(.alias("vram-bar", of: video, byteCount: 16 * Self.mebibyte), at: Self.bar, priority: 1)
        let module = layout.add(.ram("dimm", dimm), at: Self.dimm)
        let patch = layout.add(
            .ram("patch", rom, offset: RAMOffset(0x10000), byteCount: 0x4000), at: Self.dimm + 0x40_0000, priority: 1)
        layout.enable(patch, false)
        try memory.commit(layout)

        steps = Self.steps(pam: pam, smram: smram, bar: bar, module: module, patch: patch)
        views = try Self.rehearse(steps, on: memory)
    }

    private static func steps(
        pam: [MemoryRegionID], smram: MemoryRegionID, bar: MemoryRegionID, module: MemoryRegionID,
        patch: MemoryRegionID
    ) -> [MemoryTransaction] {
        var steps: [MemoryTransaction] = []
        func step(_ body: (inout MemoryTransaction) -> Void) {
            var transaction = MemoryTransaction()
            body(&transaction)
            steps.append(transaction)
        }
        // Shadowing: RAM instead of ROM, the copy, then write protection.
        for segment in pam { step { $0.enable(segment) } }
        for segment in pam { step { $0.setReadOnly(segment, true) } }
        step { $0.enable(smram, false) }
        step { $0.enable(smram) }
        step { $0.setAlias(bar, offset: 16 * mebibyte) }
        step { $0.move(bar, to: self.bar + 8 * mebibyte) }
        step { $0.move(bar, to: self.bar) }
        step { $0.setAlias(bar, offset: 0) }
        step { $0.resize(module, to: 8 * mebibyte) }
        step { $0.resize(module, to: 16 * mebibyte) }
        step { $0.enable(patch) }
        step { $0.enable(patch, false) }
        // As after a reset: the next run finds what this one found.
        step { transaction in
            for segment in pam {
                transaction.enable(segment, false)
                transaction.setReadOnly(segment, false)
            }
        }
        return steps
    }

    /// All views of one pass, taken before anybody listens.
    private static func rehearse(_ steps: [MemoryTransaction], on memory: GuestMemory) throws -> [FlatView] {
        var views = [memory.view]
        for step in steps {
            try memory.commit(step)
            views.append(memory.view)
        }
        return views
    }

    // MARK: Places

    /// The guest that spins in what changes, and the contents it must find there.
    func makeGuest(cpuCount: Int, outside: Set<Int>) throws -> SpinGuest {
        var guest = SpinGuest(cpuCount: cpuCount, outside: outside)
        for segment in Self.segments {
            for page in [segment.lowerBound + 0x1000, segment.upperBound - 0x1000] { addPlace(at: page, to: &guest) }
        }
        for page in stride(from: UInt64(0xA0000), to: 0xC0000, by: 0x9000) { addPlace(at: page, to: &guest) }
        for part in 0..<24 { addPlace(at: Self.bar + UInt64(part) * Self.mebibyte + 0x5000, to: &guest) }
        for part in 0..<8 { addPlace(at: Self.dimm + UInt64(part) * Self.mebibyte + 0x1000, to: &guest) }
        for page in [0x3F_F000, 0x40_0000, 0x40_3000, 0x40_4000] as [UInt64] {
            addPlace(at: Self.dimm + page, to: &guest)
        }
        for table in [0xC8000, 0xCA000, 0xA4000, 0xBC000, Self.bar + 0x10_0000, Self.bar + 0xC0_0000] as [UInt64] {
            addWalkTable(at: table, to: &guest)
        }
        return guest
    }

    /// The pages of blocks that are seen at an address, each once; `nil` if at times there is none.
    private func backings(of address: UInt64) -> [FlatRange]? {
        var found: [FlatRange] = []
        for view in views {
            guard let range = view.range(at: GuestPhysicalAddress(address)) else { return nil }
            let page = range.part(at: address)
            if let index = found.firstIndex(where: { $0.block === page.block && $0.offset == page.offset }) {
                if page.isReadOnly { found[index] = page }
            } else {
                found.append(page)
            }
        }
        return found.count <= 4 ? found : nil
    }

    private func number(of block: RAMBlock) -> UInt64 {
        UInt64(memory.blocks.firstIndex { $0 === block } ?? 0)
    }

    private func addPlace(at address: UInt64, to guest: inout SpinGuest) {
        guard let backings = backings(of: address) else { return }
        for page in backings {
            let offset = Int(page.offset.value)
            page.block.mapping.store(word(page), at: offset)
            page.block.mapping.write(SpinGuest.function(returning: UInt32(word(page) >> 12)), at: offset + 0x800)
        }
        guest.reads.append(.init(address, answers: backings.map(word)))
        guest.calls.append(.init(address + 0x800, answers: backings.map { word($0) >> 12 }))
        if backings.allSatisfy({ !$0.isReadOnly }) { guest.writes.append(address) }
    }

    /// Says which page of which block this is.
    private func word(_ page: FlatRange) -> UInt64 {
        (number(of: page.block) + 1) << 40 | page.offset.value | 0x5A5
    }

    /// A page table that differs by the block it is seen of: each leads to a page of its own in the guest's low memory.
    private func addWalkTable(at address: UInt64, to guest: inout SpinGuest) {
        guard let backings = backings(of: address) else { return }
        var answers: [UInt64] = []
        for page in backings {
            let target = 0x90000 + number(of: page.block) * 0x1000
            let answer = 0x77_0000 + number(of: page.block)
            memory.blocks[0].mapping.store(answer, at: Int(target))
            page.block.mapping.write(SpinGuest.walkTable(mapping: target), at: Int(page.offset.value))
            if !answers.contains(answer) { answers.append(answer) }
        }
        for entry in stride(from: 0, to: 512, by: 16) {
            guest.walks.append(
                .init(SpinGuest.walkAddress(table: guest.walkTables.count, entry: entry), answers: answers))
        }
        guest.walkTables.append(address)
    }

    /// The sum of a vCPU's counters in all pages of all blocks.
    func counted(by cpu: Int, in guest: SpinGuest) -> UInt64 {
        var seen: Set<UInt64> = []
        var sum: UInt64 = 0
        for address in guest.writes {
            for page in backings(of: address) ?? [] where seen.insert(word(page)).inserted {
                let offset = Int(page.offset.value) + SpinGuest.counterOffset(cpu: cpu)
                sum += page.block.mapping.load(at: offset, as: UInt64.self)
            }
        }
        return sum
    }
}

extension FlatRange {
    /// The page that holds an address.
    fileprivate func part(at address: UInt64) -> FlatRange {
        FlatRange(
            guestAddress: GuestPhysicalAddress(address), byteCount: GuestPage.byteCount, block: block,
            offset: RAMOffset(offset.value + address - guestAddress.value), isReadOnly: isReadOnly)
    }
}
