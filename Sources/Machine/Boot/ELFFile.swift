/// The parts of an ELF file that loading needs. Every offset comes from outside and is checked before use.
///
/// Source: System V ABI, chapters 4 and 5. 32-bit and 64-bit files for x86, little-endian, executable or shared.
struct ELFFile {
    /// Bounds on what a hostile file can make us do.
    enum Limit {
        static let programHeaders = 256
        static let noteBytes = 1 << 20
    }

    enum SegmentType {
        static let load: UInt32 = 1
        static let note: UInt32 = 4
    }

    /// `SHT_NOTE`.
    private static let noteSection: UInt32 = 7

    struct ProgramHeader: Equatable {
        let type: UInt32
        let fileOffset: UInt64
        let physicalAddress: UInt64
        let fileBytes: UInt64
        let memoryBytes: UInt64
        let alignment: UInt64
    }

    /// One note of a `PT_NOTE` segment or an `SHT_NOTE` section.
    struct Note: Equatable {
        let name: ArraySlice<UInt8>
        let type: UInt32
        let descriptor: ArraySlice<UInt8>
    }

    let programHeaders: [ProgramHeader]

    private let bytes: [UInt8]
    private let is64Bit: Bool
    private let sectionTable: (offset: UInt64, entryBytes: UInt64, count: UInt64)

    init(_ bytes: [UInt8]) throws(KernelFault) {
        guard bytes.count >= 16, bytes[0..<4] == [0x7f, 0x45, 0x4c, 0x46] else { throw .notELF }
        guard bytes[4] == 1 || bytes[4] == 2 else { throw .unsupported("ELF class \(bytes[4])") }
        guard bytes[5] == 1 else { throw .unsupported("ELF file that is not little-endian") }
        let is64Bit = bytes[4] == 2
        let header = Fields(bytes, at: 0, is64Bit: is64Bit)
        guard header.fits(is64Bit ? 64 : 52) else { throw .outsideFile("the ELF header") }

        let type = header.half(16)
        guard type == 2 || type == 3 else { throw .unsupported("ELF file of type \(type), not an executable") }
        let machine = header.half(18)
        guard machine == 3 || machine == 62 else { throw .unsupported("ELF file for machine \(machine)") }

        let counts = is64Bit ? 54 : 42
        let entryBytes = UInt64(header.half(counts))
        let count = Int(header.half(counts + 2))
        guard count <= Limit.programHeaders else {
            throw .excessive("the number of program headers (\(count))", limit: Limit.programHeaders)
        }
        let tableOffset = header.word(32, or: 28)
        var programHeaders: [ProgramHeader] = []
        for index in 0..<count {
            programHeaders.append(
                try Self.programHeader(index, tableOffset: tableOffset, entryBytes: entryBytes, bytes, is64Bit))
        }
        self.programHeaders = programHeaders
        self.bytes = bytes
        self.is64Bit = is64Bit
        sectionTable = (header.word(40, or: 32), UInt64(header.half(counts + 4)), UInt64(header.half(counts + 6)))
    }

    /// The bytes of the file in `offset..<offset + count`; `part` names them in the error.
    func slice(offset: UInt64, count: UInt64, part: String) throws(KernelFault) -> ArraySlice<UInt8> {
        let length = UInt64(bytes.count)
        guard offset <= length, count <= length - offset else { throw .outsideFile(part) }
        return bytes[Int(offset)..<Int(offset + count)]
    }

    /// The first note that `matches`, looked for in `PT_NOTE` segments, then in `SHT_NOTE` sections: linkers do not
    /// always make a segment of a note section.
    func firstNote(where matches: (Note) -> Bool) throws(KernelFault) -> Note? {
        var budget = Limit.noteBytes
        for (index, header) in programHeaders.enumerated() where header.type == SegmentType.note {
            let area = try slice(offset: header.fileOffset, count: header.fileBytes, part: "note segment \(index)")
            if let note = try Self.firstNote(in: area, alignment: header.alignment, &budget, where: matches) {
                return note
            }
        }
        guard sectionTable.offset != 0 else { return nil }
        for index in 0..<sectionTable.count {
            guard let section = try sectionHeader(index), section.type == Self.noteSection else { continue }
            let area = try slice(offset: section.offset, count: section.byteCount, part: "note section \(index)")
            if let note = try Self.firstNote(in: area, alignment: section.alignment, &budget, where: matches) {
                return note
            }
        }
        return nil
    }

    private static func programHeader(
        _ index: Int, tableOffset: UInt64, entryBytes: UInt64, _ bytes: [UInt8], _ is64Bit: Bool
    ) throws(KernelFault) -> ProgramHeader {
        let needed = is64Bit ? 56 : 32
        // The product is below 2^24, so only the sum can overflow.
        let (offset, overflows) = tableOffset.addingReportingOverflow(UInt64(index) * entryBytes)
        let fields = Fields(bytes, at: offset, is64Bit: is64Bit)
        guard entryBytes >= needed, !overflows, fields.fits(needed) else {
            throw .outsideFile("program header \(index)")
        }
        return ProgramHeader(
            type: fields.single(0), fileOffset: fields.word(8, or: 4), physicalAddress: fields.word(24, or: 12),
            fileBytes: fields.word(32, or: 16), memoryBytes: fields.word(40, or: 20), alignment: fields.word(48, or: 28)
        )
    }

    private func sectionHeader(
        _ index: UInt64
    ) throws(KernelFault) -> (type: UInt32, offset: UInt64, byteCount: UInt64, alignment: UInt64)? {
        let needed = is64Bit ? 64 : 40
        let (offset, overflows) = sectionTable.offset.addingReportingOverflow(index * sectionTable.entryBytes)
        let fields = Fields(bytes, at: offset, is64Bit: is64Bit)
        guard sectionTable.entryBytes >= needed, !overflows, fields.fits(needed) else {
            throw .outsideFile("section header \(index)")
        }
        return (fields.single(4), fields.word(24, or: 16), fields.word(32, or: 20), fields.word(48, or: 32))
    }

    /// Walks the notes of one area: three 32-bit words (name length, descriptor length, type), name, descriptor, both
    /// padded to the alignment. An area that ends inside a note ends the walk.
    private static func firstNote(
        in area: ArraySlice<UInt8>, alignment: UInt64, _ budget: inout Int, where matches: (Note) -> Bool
    ) throws(KernelFault) -> Note? {
        guard area.count <= budget else { throw .excessive("the length of the notes", limit: Limit.noteBytes) }
        budget -= area.count
        let mask = alignment == 8 ? 7 : 3
        var rest = area
        while rest.count >= 12 {
            func word(_ index: Int) -> UInt32 {
                rest.dropFirst(4 * index).prefix(4).reversed().reduce(0) { $0 << 8 | UInt32($1) }
            }
            let (nameBytes, descriptorBytes) = (Int(word(0)), Int(word(1)))
            // 32-bit lengths cannot overflow these sums.
            let descriptorOffset = (12 + nameBytes + mask) & ~mask
            guard descriptorOffset + descriptorBytes <= rest.count else { return nil }
            let note = Note(
                name: rest.dropFirst(12).prefix(nameBytes), type: word(2),
                descriptor: rest.dropFirst(descriptorOffset).prefix(descriptorBytes))
            if matches(note) { return note }
            rest = rest.dropFirst((descriptorOffset + descriptorBytes + mask) & ~mask)
        }
        return nil
    }
}

/// Little-endian fields of a structure at an offset of the file; ask `fits` before anything else.
private struct Fields {
    private let bytes: [UInt8]
    private let offset: UInt64
    private let is64Bit: Bool

    init(_ bytes: [UInt8], at offset: UInt64, is64Bit: Bool) {
        self.bytes = bytes
        self.offset = offset
        self.is64Bit = is64Bit
    }

    func fits(_ byteCount: Int) -> Bool {
        let length = UInt64(bytes.count)
        return offset <= length && UInt64(byteCount) <= length - offset
    }

    func half(_ position: Int) -> UInt16 { UInt16(truncatingIfNeeded: integer(position, byteCount: 2)) }

    func single(_ position: Int) -> UInt32 { UInt32(truncatingIfNeeded: integer(position, byteCount: 4)) }

    /// A field of the file's class: 8 bytes at `position` in 64-bit files, 4 bytes at `position32` in 32-bit ones.
    func word(_ position: Int, or position32: Int) -> UInt64 {
        is64Bit ? integer(position, byteCount: 8) : integer(position32, byteCount: 4)
    }

    private func integer(_ position: Int, byteCount: Int) -> UInt64 {
        let start = Int(offset) + position
        return bytes[start..<start + byteCount].reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }
}
