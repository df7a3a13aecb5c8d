/// Appends the records of a migration stream to ``bytes``. Page contents never pass through it.
///
/// What it is given must respect ``StreamLimit``; names longer than 255 bytes are a programming error.
public struct StreamWriter: Sendable {
    public private(set) var bytes: [UInt8] = []

    public init() {}

    /// Returns what was written and starts over.
    public mutating func take() -> [UInt8] {
        let taken = bytes
        bytes = []
        return taken
    }

    // MARK: Integers and text

    mutating func be16(_ value: UInt16) {
        bytes.append(UInt8(truncatingIfNeeded: value >> 8))
        bytes.append(UInt8(truncatingIfNeeded: value))
    }

    mutating func be32(_ value: UInt32) {
        be16(UInt16(truncatingIfNeeded: value >> 16))
        be16(UInt16(truncatingIfNeeded: value))
    }

    mutating func be64(_ value: UInt64) {
        be32(UInt32(truncatingIfNeeded: value >> 32))
        be32(UInt32(truncatingIfNeeded: value))
    }

    /// Bytes encoded elsewhere, such as page records.
    public mutating func append(_ more: [UInt8]) { bytes.append(contentsOf: more) }

    mutating func append(repeating byte: UInt8, count: Int) {
        bytes.append(contentsOf: repeatElement(byte, count: count))
    }

    /// A name with its length in one byte before it.
    mutating func name(_ name: String) {
        let text = Array(name.utf8)
        precondition(text.count <= 255, "StreamWriter: name of more than 255 bytes")
        bytes.append(UInt8(text.count))
        append(text)
    }

    mutating func identifier(_ identifier: MigrationIdentifier) {
        be64(identifier.high)
        be64(identifier.low)
    }

    // MARK: The frame

    /// "QEVM" and the version.
    public mutating func header() {
        be32(Wire.magic)
        be32(Wire.version)
    }

    /// The machine's name, and subsections if any.
    public mutating func configuration(machine: String, subsections: [ConfigurationSubsection] = []) {
        bytes.append(SectionType.configuration.rawValue)
        let text = Array(machine.utf8)
        precondition(text.count <= StreamLimit.machineNameBytes, "StreamWriter: machine name too long")
        be32(UInt32(text.count))
        append(text)
        for subsection in subsections {
            bytes.append(SectionType.subsection.rawValue)
            name(subsection.name)
            be32(1)
            switch subsection {
            case .targetPageBits(let bits): be32(bits)
            case .capabilities(let names):
                be32(UInt32(names.count))
                for capability in names { name(capability) }
            case .uuid(let uuid): identifier(uuid)
            }
        }
    }

    /// EOF: everything was sent.
    public mutating func endOfStream() { bytes.append(SectionType.endOfStream.rawValue) }

    /// The JSON text that follows EOF, see ``VMDescription``.
    public mutating func vmDescription(_ json: String) {
        bytes.append(SectionType.vmDescription.rawValue)
        let text = Array(json.utf8)
        be32(UInt32(text.count))
        append(text)
    }

    // MARK: Sections

    /// START or FULL: what a section is called. A body and ``sectionFooter(id:)`` follow.
    public mutating func sectionHead(_ type: SectionType, id: UInt32, name: String, instance: UInt32, version: UInt32) {
        bytes.append(type.rawValue)
        be32(id)
        self.name(name)
        be32(instance)
        be32(version)
    }

    public mutating func sectionFooter(id: UInt32) {
        bytes.append(SectionType.footer.rawValue)
        be32(id)
    }

    /// A whole FULL section with its footer.
    public mutating func deviceSection(_ section: DeviceSection, id: UInt32, layout: SectionLayout) {
        sectionHead(.full, id: id, name: section.name, instance: section.instance, version: section.version)
        if case .lengthPrefixed = layout { be32(UInt32(section.body.count)) }
        append(section.body)
        sectionFooter(id: id)
    }

    /// The whole START section of RAM: the block list, and with multifd the first ``RAMFlags/multifdFlush``.
    /// - Parameter advised: ``PostcopyCommand/advise(_:)`` was said before: then blocks tell page sizes other than the stream's.
    public mutating func ramSetup(
        id: UInt32, blocks: [RAMBlockDescription], flushesChannels: Bool = false,
        postcopyIsAdvised advised: Bool = false
    ) {
        ramSetupHead(id: id, blocks: blocks)
        for block in blocks {
            self.block(block)
            if advised, block.pageSize != Wire.pageSize { be64(block.pageSize) }
        }
        if flushesChannels { multifdFlush() }
        ramSectionEnd(id: id)
    }

    /// What comes before the blocks of the list.
    mutating func ramSetupHead(id: UInt32, blocks: [RAMBlockDescription]) {
        sectionHead(.start, id: id, name: Wire.ramSectionName, instance: 0, version: Wire.ramSectionVersion)
        be64(blocks.reduce(0) { $0 + $1.length } | RAMFlags.memorySize.rawValue)
    }

    /// One block of the list.
    mutating func block(_ block: RAMBlockDescription) {
        name(block.name)
        be64(block.length)
    }

    /// The head of a PART or END section of RAM; page records and ``ramSectionEnd(id:)`` follow.
    public mutating func ramRound(final: Bool, id: UInt32) {
        bytes.append(final ? SectionType.end.rawValue : SectionType.part.rawValue)
        be32(id)
    }

    /// The mark by which what the other channels brought is complete.
    public mutating func multifdFlush() { be64(RAMFlags.multifdFlush.rawValue) }

    /// EOS and the footer of a section of RAM.
    public mutating func ramSectionEnd(id: UInt32) {
        be64(RAMFlags.endOfSection.rawValue)
        sectionFooter(id: id)
    }
}

extension ConfigurationSubsection {
    var name: String {
        switch self {
        case .targetPageBits: "configuration/target-page-bits"
        case .capabilities: "configuration/capabilities"
        case .uuid: "configuration/uuid"
        }
    }
}
