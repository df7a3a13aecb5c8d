/// Why a stream was rejected: one sentence with the object, the cause and the byte position.
public struct StreamError: Error, Hashable, Sendable, CustomStringConvertible {
    public let cause: Cause
    /// Bytes of the stream before the record that was rejected.
    public let position: UInt64

    public init(_ cause: Cause, position: UInt64) {
        self.cause = cause
        self.position = position
    }

    /// Whether nothing is wrong but that the stream ends too early.
    public var isTruncation: Bool { if case .truncated = cause { true } else { false } }

    public var description: String { "migration stream, byte \(position): \(cause.sentence)" }

    public enum Cause: Hashable, Sendable {
        // The frame.
        case notAStream(UInt32)
        case streamVersion(UInt32)
        case misplacedConfiguration
        case configurationSubsection(name: String)
        case configurationSubsectionVersion(name: String, UInt32)
        case emptyName(what: String)
        case nameTooLong(what: String, byteCount: UInt64, limit: Int)
        case nameNotText(what: String)
        case tooMany(what: String, count: UInt64, limit: Int)
        case truncated(inside: String)
        case dataAfterEnd
        case vmDescriptionTooLong(UInt32)
        // Sections.
        case sectionType(UInt8)
        case unknownSection(name: String, instance: UInt32)
        case sectionVersion(name: String, got: UInt32, known: UInt32)
        case sectionInParts(name: String)
        case sectionNotInParts(name: String)
        case sectionInstance(name: String, UInt32)
        case repeatedSection(name: String)
        case repeatedSectionID(UInt32, name: String)
        case unknownSectionID(UInt32, type: SectionType)
        case sectionAlreadyEnded(name: String)
        case sectionNotEnded(name: String)
        case sectionTooLong(name: String, byteCount: UInt64, limit: Int)
        case subsection(section: String, name: String)
        case missingFooter(section: String, got: UInt8)
        case footerOfOther(section: String, id: UInt32, got: UInt32)
        case footerNotFound(section: String, limit: Int)
        // RAM.
        case blockListMissing(word: UInt64)
        case unknownBlock(name: String)
        case repeatedBlock(name: String)
        case blockLength(name: String, got: UInt64, expected: UInt64)
        case blockLengthInvalid(name: String, UInt64)
        case missingBlocks([String])
        case totalLength(announced: UInt64, listed: UInt64)
        case noBlockNamed(offset: UInt64)
        case pageOutside(block: String, offset: UInt64, length: UInt64)
        case zeroPageFill(block: String, offset: UInt64, UInt8)
        case unsupportedRecord(String, offset: UInt64)
        case pageWithoutDigest(offset: UInt64)
        case deltaKind(block: String, offset: UInt64, UInt8)
        case deltaLength(block: String, offset: UInt64, Int)
        case deltaDamaged(block: String, offset: UInt64, XBZRLE.Damage)
        case deltaWithoutPage(block: String, offset: UInt64)
        case unknownFlags(UInt64, offset: UInt64)
        case batchNotAgreed
        case batchOffset(UInt64)
        case batchRuns(block: String, UInt32)
        case batchRunKind(block: String, offset: UInt64, UInt64)
        case batchRunEmpty(block: String, offset: UInt64)
        case batchRunOutside(block: String, offset: UInt64, pages: UInt32, length: UInt64)
        case batchTooLong(block: String, byteCount: UInt64)
        case multifd(MultifdFault)
        case mappedRAM(block: String, MappedRAMFault)
        case postcopy(PostcopyFault)
        case epoch(EpochFault)
        // Commands and the return path.
        case unknownCommand(UInt16)
        case unsupportedCommand(String)
        case commandLength(String, got: Int)
        case unknownMessage(UInt16)
        case unsupportedMessage(String)
        case messageLength(String, got: Int)
        case unknownVerdict(UInt8)
        case reasonNotText(String)
    }
}

extension StreamError.Cause {
    var sentence: String {
        switch self {
        case .notAStream(let magic):
            "the first bytes are 0x\(hexadecimal(UInt64(magic), digits: 8)), not \"QEVM\": this is no migration stream"
        case .streamVersion(let version):
            "version \(version) of the stream format is not supported, only \(Wire.version)"
        case .misplacedConfiguration: "a configuration section stands behind other sections; it may only come first"
        case .configurationSubsection(let name): "the configuration's subsection '\(name)' is unknown"
        case .configurationSubsectionVersion(let name, let version):
            "the configuration's subsection '\(name)' has version \(version), only 1 is known"
        case .emptyName(let what): "the name of \(what) is empty"
        case .nameTooLong(let what, let count, let limit): "the name of \(what) has \(count) bytes, more than \(limit)"
        case .nameNotText(let what): "the name of \(what) is not UTF-8 text"
        case .tooMany(let what, let count, let limit): "\(count) \(what), more than \(limit)"
        case .truncated(let inside): "the stream ends inside \(inside)"
        case .dataAfterEnd: "data follows the end of the stream"
        case .vmDescriptionTooLong(let count):
            "the machine description has \(count) bytes, more than \(StreamLimit.vmDescriptionBytes)"
        case .unknownCommand, .unsupportedCommand, .commandLength, .unknownMessage, .unsupportedMessage, .messageLength,
            .unknownVerdict, .reasonNotText:
            messageSentence
        case .sectionType, .unknownSection, .sectionVersion, .sectionInParts, .sectionNotInParts, .sectionInstance,
            .repeatedSection, .repeatedSectionID, .unknownSectionID, .sectionAlreadyEnded, .sectionNotEnded,
            .sectionTooLong, .subsection,
            .missingFooter, .footerOfOther, .footerNotFound:
            sectionSentence
        default: ramSentence
        }
    }

    private var sectionSentence: String {
        switch self {
        case .sectionType(let byte):
            "0x\(hexadecimal(UInt64(byte), digits: 2)) begins no known section"
        case .unknownSection(let name, let instance):
            "section '\(name)' instance \(instance) is unknown to this machine"
        case .sectionVersion(let name, let got, let known):
            "section '\(name)' has version \(got), only version \(known) is known"
        case .sectionInParts(let name): "section '\(name)' comes in parts, which only 'ram' does"
        case .sectionNotInParts(let name): "section '\(name)' comes whole, but it must come in parts"
        case .sectionInstance(let name, let instance): "section '\(name)' has instance \(instance), only 0 is known"
        case .repeatedSection(let name): "section '\(name)' starts twice"
        case .repeatedSectionID(let id, let name): "section '\(name)' uses section id \(id), which is taken"
        case .unknownSectionID(let id, let type):
            "a \(type) section has id \(id), but no section of that id was started"
        case .sectionAlreadyEnded(let name): "section '\(name)' goes on after its end"
        case .sectionNotEnded(let name): "the stream says it is complete, but section '\(name)' has not ended"
        case .sectionTooLong(let name, let count, let limit):
            "section '\(name)' has \(count) bytes, more than \(limit)"
        case .subsection(let section, let name): "section '\(section)' has the subsection '\(name)', which is unknown"
        case .missingFooter(let section, let got):
            "section '\(section)' is followed by 0x\(hexadecimal(UInt64(got), digits: 2)) where its footer should be: "
                + "its length differs from what this machine knows"
        case .footerOfOther(let section, let id, let got):
            "the footer of section '\(section)' names section id \(got) instead of \(id)"
        case .footerNotFound(let section, let limit): "no footer of section '\(section)' within \(limit) bytes"
        default: "invalid section"
        }
    }

    private var ramSentence: String {
        switch self {
        case .blockListMissing(let word):
            "the RAM section starts with 0x\(hexadecimal(word)), not with its block list"
        case .unknownBlock(let name): "RAM block '\(name)' does not exist on this machine"
        case .repeatedBlock(let name): "RAM block '\(name)' is listed twice"
        case .blockLength(let name, let got, let expected):
            "RAM block '\(name)' has \(got) bytes in the stream and \(expected) bytes on this machine; "
                + "start both with the same memory size"
        case .blockLengthInvalid(let name, let length):
            "RAM block '\(name)' has \(length) bytes, which is no positive multiple of \(Wire.pageSize) in range"
        case .missingBlocks(let names):
            "the stream does not bring RAM block \(names.map { "'\($0)'" }.joined(separator: ", ")) of this machine"
        case .totalLength(let announced, let listed):
            "RAM is announced with \(announced) bytes, but the blocks listed reach \(listed)"
        case .noBlockNamed(let offset): "the page at offset 0x\(hexadecimal(offset)) belongs to no block named before"
        case .pageOutside(let block, let offset, let length):
            "a page at offset 0x\(hexadecimal(offset)) is outside RAM block '\(block)' of 0x\(hexadecimal(length)) bytes"
        case .zeroPageFill(let block, let offset, let byte):
            "the zero page at offset 0x\(hexadecimal(offset)) of RAM block '\(block)' is filled with \(byte), not 0"
        case .unsupportedRecord(let what, let offset):
            "\(what) is not supported yet (RAM record at offset 0x\(hexadecimal(offset)))"
        case .pageWithoutDigest(let offset):
            "a page came without its digest, which was agreed on (RAM record at offset 0x\(hexadecimal(offset)))"
        case .deltaKind, .deltaLength, .deltaDamaged, .deltaWithoutPage: deltaSentence
        case .unknownFlags(let flags, let offset):
            "a RAM record at offset 0x\(hexadecimal(offset)) has unknown flags 0x\(hexadecimal(flags))"
        case .batchNotAgreed: "a page batch came, but page batches were not agreed on"
        case .batchOffset(let offset): "a page batch has the offset 0x\(hexadecimal(offset)) in its first word, not 0"
        case .batchRuns(let block, let count):
            "a page batch of RAM block '\(block)' has \(count) runs, not 1 to \(StreamLimit.batchRuns)"
        case .batchRunKind(let block, let offset, let kind):
            "a page batch run at offset 0x\(hexadecimal(offset)) of RAM block '\(block)' is of unknown kind \(kind)"
        case .batchRunEmpty(let block, let offset):
            "a page batch run at offset 0x\(hexadecimal(offset)) of RAM block '\(block)' has no pages"
        case .batchRunOutside(let block, let offset, let pages, let length):
            "a page batch run of \(pages) pages at offset 0x\(hexadecimal(offset)) reaches outside RAM block '\(block)' "
                + "of 0x\(hexadecimal(length)) bytes"
        case .batchTooLong(let block, let count):
            "a page batch of RAM block '\(block)' carries \(count) bytes, more than \(StreamLimit.batchDataBytes)"
        case .multifd(let fault): fault.sentence
        case .postcopy(let fault): fault.sentence
        case .epoch(let fault): fault.sentence
        case .mappedRAM(let block, let fault): "the file's header of RAM block '\(block)' is wrong: \(fault.sentence)"
        default: "invalid RAM record"
        }
    }

    private var deltaSentence: String {
        switch self {
        case .deltaKind(let block, let offset, let kind):
            "the delta of the page at offset 0x\(hexadecimal(offset)) of RAM block '\(block)' has the unknown encoding "
                + "\(kind)"
        case .deltaLength(let block, let offset, let count):
            "the delta of the page at offset 0x\(hexadecimal(offset)) of RAM block '\(block)' has \(count) bytes, not 1 to "
                + "\(XBZRLE.longestEncoding)"
        case .deltaDamaged(let block, let offset, let damage):
            "the delta of the page at offset 0x\(hexadecimal(offset)) of RAM block '\(block)' is damaged: "
                + damage.sentence
        case .deltaWithoutPage(let block, let offset):
            "a delta came for the page at offset 0x\(hexadecimal(offset)) of RAM block '\(block)', which was not sent before"
        default: "invalid delta"
        }
    }

    private var messageSentence: String {
        switch self {
        case .unknownCommand(let type): "command 0x\(hexadecimal(UInt64(type))) is unknown"
        case .unsupportedCommand(let name): "command \(name) is not supported yet"
        case .commandLength(let name, let got): "command \(name) has \(got) bytes of data, which does not fit it"
        case .unknownMessage(let type): "return path message 0x\(hexadecimal(UInt64(type))) is unknown"
        case .unsupportedMessage(let name): "return path message \(name) is not supported yet"
        case .messageLength(let name, let got):
            "return path message \(name) has \(got) bytes of data, which does not fit it"
        case .unknownVerdict(let value): "the verdict \(value) is unknown"
        case .reasonNotText(let name): "the reason in \(name) is not UTF-8 text"
        default: "invalid message"
        }
    }
}
