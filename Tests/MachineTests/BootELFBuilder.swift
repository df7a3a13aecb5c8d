/// Builds small ELF files, sound ones and damaged ones.
struct ELFBuilder {
    struct Segment {
        var type: UInt32 = 1
        var address: UInt64
        var bytes: [UInt8]
        var memoryBytes: UInt64?
        var alignment: UInt64 = 4
    }

    struct Section {
        var type: UInt32 = 7
        var bytes: [UInt8]
    }

    var is64Bit = true
    var type: UInt64 = 2
    var machine: UInt64 = 62
    var segments: [Segment] = []
    var sections: [Section] = []

    /// A note: owner with its zero, type, and descriptor, padded to 4 bytes.
    static func note(owner: String = "Xen", type: UInt64 = 18, descriptor: [UInt8]) -> [UInt8] {
        let name = Array(owner.utf8) + [0]
        func padded(_ bytes: [UInt8]) -> [UInt8] { bytes + repeatElement(0, count: (4 - bytes.count % 4) % 4) }
        return integer(UInt64(name.count), 4) + integer(UInt64(descriptor.count), 4) + integer(type, 4) + padded(name)
            + padded(descriptor)
    }

    static func integer(_ value: UInt64, _ bytes: Int) -> [UInt8] {
        (0..<bytes).map { UInt8(truncatingIfNeeded: value >> UInt64(8 * $0)) }
    }

    /// A kernel with code at 1 MiB, entered 16 bytes into it.
    static func kernel(is64Bit: Bool = true, noteInSection: Bool = false, entry: UInt64 = 0x100010) -> ELFBuilder {
        let note = note(descriptor: integer(entry, 4))
        var builder = ELFBuilder(is64Bit: is64Bit, machine: is64Bit ? 62 : 3)
        builder.segments = [Segment(address: 0x100000, bytes: Array(0..<64), memoryBytes: 0x3000)]
        if noteInSection {
            builder.sections = [Section(type: 1, bytes: [1, 2, 3]), Section(bytes: note)]
        } else {
            builder.segments.append(Segment(type: 4, address: 0, bytes: note))
        }
        return builder
    }

    var file: [UInt8] {
        let headerBytes = is64Bit ? 64 : 52
        let segmentHeaderBytes = is64Bit ? 56 : 32
        let sectionHeaderBytes = is64Bit ? 64 : 40
        let sectionTable = headerBytes + segments.count * segmentHeaderBytes
        var dataOffset = sectionTable + sections.count * sectionHeaderBytes
        let word = is64Bit ? 8 : 4
        func fields(_ fields: [(UInt64, Int)]) -> [UInt8] { fields.flatMap { Self.integer($0.0, $0.1) } }

        var file: [UInt8] = [0x7f, 0x45, 0x4c, 0x46, is64Bit ? 2 : 1, 1, 1] + [UInt8](repeating: 0, count: 9)
        file += fields([
            (type, 2), (machine, 2), (1, 4), (0, word), (UInt64(headerBytes), word), (UInt64(sectionTable), word),
            (0, 4), (UInt64(headerBytes), 2), (UInt64(segmentHeaderBytes), 2), (UInt64(segments.count), 2),
            (UInt64(sectionHeaderBytes), 2), (UInt64(sections.count), 2), (0, 2),
        ])
        for segment in segments {
            let fileBytes = UInt64(segment.bytes.count)
            let memoryBytes = segment.memoryBytes ?? fileBytes
            let offset = UInt64(dataOffset)
            file += fields(
                is64Bit
                    ? [
                        (UInt64(segment.type), 4), (5, 4), (offset, 8), (0xffff_8000_0000_0000, 8),
                        (segment.address, 8), (fileBytes, 8), (memoryBytes, 8), (segment.alignment, 8),
                    ]
                    : [
                        (UInt64(segment.type), 4), (offset, 4), (0xc000_0000, 4), (segment.address, 4), (fileBytes, 4),
                        (memoryBytes, 4), (5, 4), (segment.alignment, 4),
                    ])
            dataOffset += segment.bytes.count
        }
        for section in sections {
            file += fields([
                (0, 4), (UInt64(section.type), 4), (0, word), (0, word), (UInt64(dataOffset), word),
                (UInt64(section.bytes.count), word), (0, 4), (0, 4), (4, word), (0, word),
            ])
            dataOffset += section.bytes.count
        }
        return file + segments.flatMap(\.bytes) + sections.flatMap(\.bytes)
    }
}
