/// What a VMM loads to start a built-in guest, and how it enters it.
///
/// The vCPU starts in 32-bit protected mode at ``entryAddress``: flat segments (CS 32-bit code), CR0.PE set, paging and
/// interrupts off. The other vCPUs wait for INIT and SIPI. To reset the guest, load all segments again.
public struct GuestImage: Equatable, Sendable {
    /// Bytes for one place in guest memory.
    public struct Segment: Equatable, Sendable {
        public let physicalAddress: UInt64
        public let bytes: [UInt8]
    }

    /// Where execution starts.
    public let entryAddress: UInt64
    /// In ascending order, without overlap: low memory, and the page tables at 1 MiB.
    public let segments: [Segment]
}

extension GuestProgram {
    /// The guest for a machine: code, parameters, per-vCPU pages and page tables.
    ///
    /// - Parameters:
    ///   - memoryBytes: RAM of the machine, a multiple of 4 KiB.
    ///   - lowMemoryBytes: The part of it that stands at address 0; the rest stands at 4 GiB.
    ///   - cpus: vCPUs that will take part, 1 to 64.
    ///   - tscKilohertz: The rate at which the guest sees its time stamp counter run.
    /// - Throws: ``GuestProgramError/doesNotFit(guest:reason:)``.
    public func image(
        memoryBytes: UInt64, lowMemoryBytes: UInt64, cpus: Int, tscKilohertz: UInt64
    ) throws(GuestProgramError) -> GuestImage {
        let map = try MemoryMap(
            memoryBytes: memoryBytes, lowMemoryBytes: min(lowMemoryBytes, memoryBytes), guest: kind.name)
        guard (1...GuestLayout.maximumCPUs).contains(cpus) else {
            throw .doesNotFit(
                guest: kind.name, reason: "\(cpus) vCPUs; it can use 1 to \(GuestLayout.maximumCPUs)")
        }
        guard (1...UInt64(UInt32.max)).contains(tscKilohertz) else {
            throw .doesNotFit(
                guest: kind.name,
                reason: "a time stamp counter of \(tscKilohertz) kHz; it needs 1 to \(UInt32.max)")
        }
        let parameters = try parameterBlock(map: map, cpus: UInt64(cpus), tscKilohertz: tscKilohertz)

        var code = GuestCode.bytes
        let offset = Int(GuestLayout.parameters - GuestLayout.entry)
        code.replaceSubrange(offset..<offset + parameters.bytes.count, with: parameters.bytes)
        var segments = [
            GuestImage.Segment(physicalAddress: GuestLayout.entry, bytes: code),
            GuestImage.Segment(physicalAddress: GuestLayout.shared, bytes: sharedPage(parameters)),
            GuestImage.Segment(
                physicalAddress: GuestLayout.cpuPages, bytes: (0..<cpus).flatMap(GuestLayout.cpuPage(index:))),
        ]
        if kind == .probe {
            let histograms = [UInt8](repeating: 0, count: cpus * Int(GuestLayout.pageBytes))
            segments.append(GuestImage.Segment(physicalAddress: GuestLayout.histograms, bytes: histograms))
        }
        let tables = PageTables(map: map, mappedPages: parameters.mappedPages)
        segments.append(GuestImage.Segment(physicalAddress: GuestLayout.tables, bytes: tables.bytes))
        return GuestImage(entryAddress: GuestLayout.entry, segments: segments)
    }

    /// Which pages the guest fills and works on, and its times in ticks.
    func parameterBlock(
        map: MemoryMap, cpus: UInt64, tscKilohertz: UInt64
    ) throws(GuestProgramError) -> ParameterBlock {
        let use = try pageUse(map: map)
        var block = ParameterBlock()
        block.kind = kind.rawValue
        block.flags = (order == .random ? ParameterBlock.randomFlag : 0) | (probeWrites ? ParameterBlock.writeFlag : 0)
        block.cpus = cpus
        block.fillFirst = use.first
        block.fillPages = use.fillPages
        block.words = wordsPerPage
        block.workFirst = use.first + max(use.fillPages, use.workPages) - use.workPages
        block.positions = (use.workPages + stridePages - 1) / stridePages
        block.stride = stridePages
        block.seed = seed
        block.setPace(rate: rateBytesPerSecond, tscKilohertz: tscKilohertz)
        block.beat = ParameterBlock.ticks(nanoseconds: heartbeatNanoseconds, tscKilohertz: tscKilohertz)
        block.millisecond = tscKilohertz
        block.digits = GuestLayout.shortLine + UInt64(shortLinePrefix.utf8.count)
        block.memoryBytes = map.memoryBytes
        block.lowMemoryBytes = map.lowMemoryBytes
        block.mappedPages = use.first + max(use.fillPages, use.workPages)
        return block
    }

    /// The page tables stand before the pages they map, so that their size and the first of these pages depend on each other.
    private func pageUse(
        map: MemoryMap
    ) throws(GuestProgramError) -> (first: UInt64, fillPages: UInt64, workPages: UInt64) {
        var tablePages = PageTables.pageCount(mappedPages: 0)
        while true {
            let first = GuestLayout.tables / GuestLayout.pageBytes + tablePages
            guard map.pages > first, map.lowMemoryBytes > first * GuestLayout.pageBytes else {
                throw .doesNotFit(
                    guest: kind.name,
                    reason:
                        "the machine has \(sizeText(map.memoryBytes)) of RAM; the guest needs at least 2 MiB, of which "
                        + "\(sizeText(first * GuestLayout.pageBytes)) at address 0")
            }
            let (fillPages, workPages) = try pageCounts(available: map.pages - first)
            let needed = PageTables.pageCount(mappedPages: first + max(fillPages, workPages))
            if needed <= tablePages { return (first, fillPages, workPages) }
            tablePages = needed
        }
    }

    private func pageCounts(available: UInt64) throws(GuestProgramError) -> (fill: UInt64, work: UInt64) {
        var fillPages: UInt64 =
            switch fill {
            case .none: 0
            case .all: available
            case .bytes(let bytes): bytes / GuestLayout.pageBytes
            }
        var workPages: UInt64 = 0
        if kind != .idle {
            let asked = workingSetBytes.map { $0 / GuestLayout.pageBytes }
            workPages = asked ?? (fillPages == 0 ? available : fillPages)
            if kind == .dirty { fillPages = max(fillPages, workPages) }
        }
        for (what, pages) in [("working set", workPages), ("fill", fillPages)] where pages > available {
            let room = available * GuestLayout.pageBytes
            throw .doesNotFit(
                guest: kind.name,
                reason:
                    "its \(what) of \(sizeText(pages * GuestLayout.pageBytes)) is larger than the \(sizeText(room)) "
                    + "the machine has above 1 MiB; give the machine more memory or the guest less to do")
        }
        return (fillPages, workPages)
    }
}
