/// What a source says of postcopy: guests that run at the destination before their memory is there.
///
/// In the order of a stream:
///
///     source                                                     destination
///       ADVISE page sizes                                           |  before START ram: is postcopy possible here?
///       START ram, PART ram ...                                     |  as many rounds of precopy as are wanted, or none
///       --- the guest stops on the source ---                       |
///       DISCARD block ranges ...                             ------>|  what was sent and written since is forgotten
///       PACKAGED { LISTEN, FULL device sections, RUN }       ------>|  memory faults from LISTEN on, the guest starts at RUN
///       |<----------------------------------  REQ_PAGES block, range
///       PART ram: pages, wanted or not ... END ram, EOF      ------>|
///       |<-------------------------------------------------   SHUT 0
///
/// After a broken connection, on a new one without header:
///
///       RECV_BITMAP block, for each                          ------>|
///       |<-----------------------------  RECV_BITMAP block, bitmap
///       RESUME                                               ------>|
///       |<------------------------  RESUME_ACK, REQ_PAGES once more
///       PART ram ...                                         ------>|
public enum PostcopyCommand: Hashable, Sendable {
    /// There may be postcopy. `nil`: of something else than RAM.
    case advise(PostcopyAdvice?)
    /// Pages may come at any time from now on, and accesses to missing ones must wait.
    case listen
    /// The guest runs.
    case run
    case discard(RAMDiscard)
    /// So many bytes of sections follow, to be read whole before they are loaded: ``StreamDecoder/packageDecoder()``.
    case packaged(byteCount: UInt32)
    /// All received bitmaps were heard: the migration goes on here.
    case resume
    /// Which pages of the block arrived?
    case receiveBitmap(block: String)
}

/// What must be equal on both sides.
public struct PostcopyAdvice: Hashable, Sendable {
    /// The page sizes of all RAM blocks, in bytes, each a power of two, joined by OR.
    public let blockPageSizes: UInt64
    /// The unit of the stream: ``Wire/pageSize``.
    public let targetPageSize: UInt64

    public init(blockPageSizes: UInt64, targetPageSize: UInt64 = UInt64(Wire.pageSize)) {
        self.blockPageSizes = blockPageSizes
        self.targetPageSize = targetPageSize
    }
}

/// Ranges of a block whose contents at the destination are out of date.
public struct RAMDiscard: Hashable, Sendable {
    public let block: String
    public let ranges: [ByteRange]

    public init(block: String, ranges: [ByteRange]) {
        self.block = block
        self.ranges = ranges
    }

    /// Whole pages of a block.
    public struct ByteRange: Hashable, Sendable {
        /// Bytes from the block's start.
        public let offset: UInt64
        public let length: UInt64

        public init(offset: UInt64, length: UInt64) {
            self.offset = offset
            self.length = length
        }
    }
}

/// What a destination says of postcopy.
public enum PostcopyMessage: Hashable, Sendable {
    case requestPages(PageRequest)
    /// Which pages of the block arrived: that many bytes follow as payload (``ReturnPathDecoder/payloadBytes``), bit 0 of the first byte
    /// for the first page. Believed only at ``bitmapEnded(block:)``.
    case receivedBitmap(block: String, byteCount: UInt64)
    /// The bitmap came whole.
    case bitmapEnded(block: String)
    /// The answer to ``PostcopyCommand/resume``.
    case resumeAcknowledged
}

/// Pages that a guest waits for.
public struct PageRequest: Hashable, Sendable {
    public let block: String
    /// Bytes from the block's start, page-aligned.
    public let offset: UInt64
    /// Bytes, whole pages.
    public let length: UInt32

    public init(block: String, offset: UInt64, length: UInt32) {
        self.block = block
        self.offset = offset
        self.length = length
    }
}

/// Which pages of a block arrived, on the wire.
public enum ReceivedBitmap {
    /// A bit for each page, in whole words of 64.
    public static func byteCount(of block: RAMBlockDescription) -> UInt64 {
        (block.length / UInt64(Wire.pageSize) + 63) / 64 * 8
    }

    /// What stands behind the bitmap.
    static let endMark: UInt64 = 0x0123_4567_89ab_cdef
}

/// Why something of postcopy was rejected.
public enum PostcopyFault: Hashable, Sendable {
    case advice(PostcopyAdvice)
    case discardVersion(UInt8)
    case discardTerminator(block: String, UInt8)
    case rangeEmpty(block: String, offset: UInt64)
    case rangeUnaligned(block: String, offset: UInt64, length: UInt64)
    case rangeOutside(block: String, offset: UInt64, length: UInt64, blockLength: UInt64)
    case blockPageSize(block: String, got: UInt64, expected: UInt64)
    case packageLength(UInt32)
    case packageItems
    case commandInPackage(CommandType)
    case sectionInPackage(SectionType)
    case recordOutOfPlace(String)
    case requestWithoutBlock
    case requestTooLong(block: String, offset: UInt64, length: UInt32)
    case bitmapLength(block: String, got: UInt64, expected: UInt64)
    case bitmapEnd(block: String, UInt64)
    case resumeAcknowledgement(UInt32)

    var sentence: String {
        switch self {
        case .advice(let advice):
            "POSTCOPY_ADVISE names pages of 0x\(hexadecimal(advice.blockPageSizes)) and 0x\(hexadecimal(advice.targetPageSize)) "
                + "bytes, which no machine of 4096-byte pages has"
        case .discardVersion(let version): "version \(version) of POSTCOPY_RAM_DISCARD is not supported, only 0"
        case .discardTerminator(let block, let byte):
            "the name of RAM block '\(block)' in POSTCOPY_RAM_DISCARD is followed by \(byte), not 0"
        case .rangeEmpty(let block, let offset):
            "a range at offset 0x\(hexadecimal(offset)) of RAM block '\(block)' is empty"
        case .rangeUnaligned(let block, let offset, let length):
            "a range of 0x\(hexadecimal(length)) bytes at offset 0x\(hexadecimal(offset)) of RAM block '\(block)' is not made of "
                + "whole pages"
        case .rangeOutside(let block, let offset, let length, let blockLength):
            "a range of 0x\(hexadecimal(length)) bytes at offset 0x\(hexadecimal(offset)) reaches outside RAM block '\(block)' "
                + "of 0x\(hexadecimal(blockLength)) bytes"
        case .blockPageSize(let block, let got, let expected):
            "RAM block '\(block)' has pages of 0x\(hexadecimal(got)) bytes at the source and of 0x\(hexadecimal(expected)) bytes on "
                + "this machine; postcopy needs the same on both sides"
        case .packageLength(let count): "a package has \(count) bytes, not 1 to \(StreamLimit.packageBytes)"
        case .packageItems: "a package holds more than \(StreamLimit.packageItems) sections and commands"
        case .commandInPackage(let type): "command \(type.name) stands in a package, where it has no place"
        case .sectionInPackage(let type):
            "a \(type) section stands in a package, where only whole device sections have a place"
        case .recordOutOfPlace(let what): "\(what) came on a channel for requested pages"
        case .requestWithoutBlock: "pages were requested of the block requested last, but none was"
        case .requestTooLong(let block, let offset, let length):
            "\(length) bytes are requested at once at offset 0x\(hexadecimal(offset)) of RAM block '\(block)', more than "
                + "\(StreamLimit.requestBytes)"
        case .bitmapLength(let block, let got, let expected):
            "the bitmap of the pages received of RAM block '\(block)' has \(got) bytes instead of \(expected)"
        case .bitmapEnd(let block, let got):
            "the bitmap of the pages received of RAM block '\(block)' ends with 0x\(hexadecimal(got)) instead of its mark"
        case .resumeAcknowledgement(let value): "RESUME_ACK says \(value), not 1"
        }
    }
}

extension RAMBlockDescription {
    /// What is wrong with a range of it that came from outside; nil if nothing is.
    func fault(of offset: UInt64, _ length: UInt64) -> PostcopyFault? {
        guard length > 0 else { return .rangeEmpty(block: name, offset: offset) }
        guard (offset | length) % UInt64(Wire.pageSize) == 0 else {
            return .rangeUnaligned(block: name, offset: offset, length: length)
        }
        guard offset < self.length, length <= self.length - offset else {
            return .rangeOutside(block: name, offset: offset, length: length, blockLength: self.length)
        }
        return nil
    }
}
