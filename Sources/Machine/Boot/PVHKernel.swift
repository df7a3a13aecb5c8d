/// Boots a flat ELF kernel by the PVH protocol: its segments at their physical addresses, and a jump in 32-bit
/// protected mode to the entry point that a Xen note names, with EBX at the start info.
///
/// The file comes from outside: whatever is in it, the result is a plan within the guest's RAM or a `BootError`.
/// Source: Xen, `docs/misc/pvh.pandoc` and `xen/include/public/elfnote.h`.
public struct PVHKernel: Equatable, Sendable {
    /// The longest kernel file: 1 GiB.
    public static let maximumFileBytes: UInt64 = 1 << 30
    /// The longest command line in bytes of UTF-8.
    public static let maximumCommandLineBytes = PVHStartInfo.maximumCommandLineBytes

    /// `XEN_ELFNOTE_PHYS32_ENTRY`.
    private static let entryNoteType: UInt32 = 18

    /// The plan that boots this kernel.
    public let plan: BootPlan

    /// Reads a kernel for a guest with `ram`.
    ///
    /// - Parameters:
    ///   - file: the file's name, for errors.
    ///   - contents: the whole file; the plan shares its storage.
    /// - Throws: `BootError.kernel`.
    public init(file: String, contents: [UInt8], commandLine: String = "", ram: RAMLayout) throws(BootError) {
        do throws(KernelFault) {
            plan = try Self.plan(contents: contents, commandLine: commandLine, ram: ram)
        } catch {
            throw .kernel(file: file, error)
        }
    }

    /// Checks a file's length before its contents are read.
    ///
    /// - Throws: `BootError.kernel` when it is longer than `maximumFileBytes`.
    public static func checkLength(_ byteCount: UInt64, file: String) throws(BootError) {
        guard byteCount <= maximumFileBytes else {
            throw .kernel(file: file, .tooLarge(bytes: byteCount, limit: maximumFileBytes))
        }
    }

    private static func plan(
        contents: [UInt8], commandLine: String, ram: RAMLayout
    ) throws(KernelFault) -> BootPlan {
        let elf = try ELFFile(contents)
        let segments = try loadedSegments(of: elf, in: ram)
        let entry32 = try entryPoint(of: elf)
        let entry = UInt64(entry32)
        guard segments.contains(where: { $0.address <= entry && entry - $0.address < $0.byteCount }) else {
            throw .entryOutside(entry)
        }
        let startInfo = try PVHStartInfo(memoryMap: ram.e820, commandLine: commandLine)
        return BootPlan(
            segments: startInfo.segments + segments,
            cpu: .protected32(entry: entry32, ebx: UInt32(PVHStartInfo.address)))
    }

    private static func loadedSegments(of elf: ELFFile, in ram: RAMLayout) throws(KernelFault) -> [BootPlan.Segment] {
        var loaded: [(index: Int, segment: BootPlan.Segment)] = []
        for (index, header) in elf.programHeaders.enumerated()
        where header.type == ELFFile.SegmentType.load && header.memoryBytes > 0 {
            let address = header.physicalAddress
            guard header.fileBytes <= header.memoryBytes else { throw .fileSizeAboveMemorySize(segment: index) }
            guard ram.contains(address: address, count: header.memoryBytes) else {
                throw .outsideRAM(segment: index, address: address, bytes: header.memoryBytes)
            }
            guard !(address..<address + header.memoryBytes).overlaps(PVHStartInfo.range) else {
                throw .onStartInfo(segment: index, address: address)
            }
            let bytes = try elf.slice(offset: header.fileOffset, count: header.fileBytes, part: "segment \(index)")
            loaded.append((index, .init(address: address, bytes: bytes, byteCount: header.memoryBytes)))
        }
        guard !loaded.isEmpty else { throw .nothingToLoad }
        loaded.sort { $0.segment.address < $1.segment.address }
        for (lower, upper) in zip(loaded, loaded.dropFirst())
        where upper.segment.address - lower.segment.address < lower.segment.byteCount {
            throw .overlap(min(lower.index, upper.index), max(lower.index, upper.index))
        }
        return loaded.map(\.segment)
    }

    private static func entryPoint(of elf: ELFFile) throws(KernelFault) -> UInt32 {
        let owner = Array("Xen\0".utf8)
        guard let note = try elf.firstNote(where: { $0.type == entryNoteType && $0.name.elementsEqual(owner) }) else {
            throw .noEntryNote
        }
        guard note.descriptor.count == 4 || note.descriptor.count == 8 else {
            throw .entryNoteLength(UInt32(note.descriptor.count))
        }
        let entry = note.descriptor.reversed().reduce(0) { $0 << 8 | UInt64($1) }
        guard let entry32 = UInt32(exactly: entry) else { throw .entryOutside(entry) }
        return entry32
    }
}
