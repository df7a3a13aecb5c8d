/// The 16 bytes that name one migration, chosen by its source.
public struct MigrationIdentifier: Hashable, Sendable, CustomStringConvertible {
    public let high: UInt64
    public let low: UInt64

    public init(high: UInt64, low: UInt64) {
        self.high = high
        self.low = low
    }

    /// Thirty-two hexadecimal digits.
    public var description: String { hexadecimal(high, digits: 16) + hexadecimal(low, digits: 16) }
}

/// The 16 bytes that name one destination process, chosen when it starts.
public typealias InstanceIdentifier = MigrationIdentifier

/// A RAM block as both sides know it: blocks are matched by name, offsets are relative to the block.
public struct RAMBlockDescription: Hashable, Sendable {
    public let name: String
    /// Bytes, a multiple of ``Wire/pageSize``.
    public let length: UInt64
    /// Bytes of a page of the memory behind it, a power of two. On the wire only where postcopy was advised and it is not
    /// ``Wire/pageSize``.
    public let pageSize: UInt64

    /// As two Godwits see it, which move pages one by one whatever stands behind them.
    public var uniform: RAMBlockDescription { RAMBlockDescription(name: name, length: length) }

    public init(name: String, length: UInt64, pageSize: UInt64 = UInt64(Wire.pageSize)) {
        self.name = name
        self.length = length
        self.pageSize = pageSize
    }
}

/// The state of one device: opaque to the stream and to the protocol.
public struct DeviceSection: Hashable, Sendable {
    public let name: String
    public let instance: UInt32
    public let version: UInt32
    /// Without the length that may stand before it on the wire, see ``SectionCatalogue``.
    public let body: [UInt8]

    public init(name: String, instance: UInt32 = 0, version: UInt32, body: [UInt8]) {
        self.name = name
        self.instance = instance
        self.version = version
        self.body = body
    }
}

/// Pages of one block that lie side by side, all with data or all zero.
public struct PageRun: Hashable, Sendable {
    public let kind: PageRunKind
    /// Bytes from the block's start, page-aligned.
    public let offset: UInt64
    public let pages: UInt32

    public init(kind: PageRunKind, offset: UInt64, pages: UInt32) {
        self.kind = kind
        self.offset = offset
        self.pages = pages
    }

    /// Bytes of guest memory that the run covers.
    public var length: UInt64 { UInt64(pages) * UInt64(Wire.pageSize) }
}

/// What a number in ``DigestRange`` counts. Zero is invalid.
public enum DigestLevel: UInt8, Sendable {
    case invalid = 0
    /// Sums over the digests of 512 pages.
    case groups = 1
    case pages = 2
}

/// Digests of a block, or sums of them, that stand side by side (`x-verify`).
public struct DigestRange: Hashable, Sendable {
    public let level: DigestLevel
    public let block: UInt32
    public let first: UInt64
    public let count: UInt32

    public init(level: DigestLevel, block: UInt32, first: UInt64, count: UInt32) {
        self.level = level
        self.block = block
        self.first = first
        self.count = count
    }

    static let byteCount = 17
}

/// The head of a START or FULL section.
public struct SectionHead: Hashable, Sendable {
    public let type: SectionType
    public let id: UInt32
    public let name: String
    public let instance: UInt32
    public let version: UInt32

    public init(type: SectionType, id: UInt32, name: String, instance: UInt32, version: UInt32) {
        self.type = type
        self.id = id
        self.name = name
        self.instance = instance
        self.version = version
    }
}

/// What may follow the machine name.
public enum ConfigurationSubsection: Hashable, Sendable {
    case targetPageBits(UInt32)
    case capabilities([String])
    case uuid(MigrationIdentifier)
}

/// A command of the source.
public enum ForwardCommand: Hashable, Sendable {
    case openReturnPath
    case ping(UInt32)
    /// QEMU 10 announces its switch; nothing has to be done.
    case switchoverStart
    case begin(MigrationIdentifier, FeatureSet)
    case prepare
    case commit
    /// COMMIT that counts only so long after READY was said, on the destination's clock; `attempt` comes back in RETRACTED.
    case commitWithin(attempt: UInt32, nanoseconds: UInt64)
    /// Takes PREPARE back: the device state is void, RAM goes on.
    case retract(attempt: UInt32)
    case settle(MigrationIdentifier)
    /// On a new connection: that migration goes on here, with the features it had.
    case resume(MigrationIdentifier, FeatureSet)
    /// The sum over the digests of all pages as they were sent last.
    case root(UInt64)
    /// The answer to ``ReturnPathMessage/digestsWanted(_:)``; as many as the range says.
    case digests(DigestRange, [UInt64])
    case cancel(reason: String)
    /// Only from a decoder that ``StreamDecoder/allowsPostcopy``, or that describes streams.
    case postcopy(PostcopyCommand)
    /// Only from a decoder that describes streams instead of loading them.
    case other(type: UInt16, length: Int)
}

/// What the destination says.
public enum ReturnPathMessage: Hashable, Sendable {
    /// The end of the return path: zero when the destination runs the guest.
    case shut(UInt32)
    case pong(UInt32)
    case hello(version: UInt32, features: FeatureSet, instance: InstanceIdentifier)
    /// All state is loaded.
    case ready(nanoseconds: UInt64)
    /// The first vCPU entered the guest that long after COMMIT was received.
    case started(nanoseconds: UInt64)
    /// The destination gave up: the guest does not run there and never will.
    case failure(reason: String)
    case verdict(Verdict)
    /// The switchover of that number is void: the guest did not start, and RAM is awaited again.
    case retracted(attempt: UInt32)
    /// After RESUME: everything received so far is kept, RAM is awaited.
    case resumed
    /// The root differs: which digests does the source have?
    case digestsWanted(DigestRange)
    /// A message of QEMU that has no meaning without postcopy; it needs no answer.
    case switchoverAcknowledged
    /// Only from a decoder that knows the blocks: ``ReturnPathDecoder/init(postcopyOf:)``.
    case postcopy(PostcopyMessage)
}

/// What a ``StreamDecoder`` found. Page contents are not in it: see ``StreamDecoder/payloadBytes``.
public enum StreamItem: Hashable, Sendable {
    case header
    case configuration(machine: String)
    case configurationSubsection(ConfigurationSubsection)
    /// START of the RAM section with its whole block list. In a loading decoder the blocks are those expected.
    case ramSetup([RAMBlockDescription])
    /// A block of the list whose pages stand in the file. The bytes up to where the stream goes on follow as payload: bitmap, gap and
    /// pages, to be jumped over. `block` is an index into the list of `ramSetup`, which comes behind the last of these.
    case mappedBlock(MappedRegion)
    /// PART (a round) or END (the last round, `final`) of the RAM section begins: page records follow.
    case ramRound(final: Bool)
    /// ``Wire/pageSize`` payload bytes follow. `block` is an index into the decoder's blocks.
    case page(block: Int, offset: UInt64)
    case zeroPage(block: Int, offset: UInt64)
    /// A page as its difference to what the destination has of it: that many payload bytes follow, for ``XBZRLE``.
    case pageDelta(block: Int, offset: UInt64, byteCount: Int)
    /// The bytes of all data runs follow as payload, in the order of the runs.
    case pageBatch(block: Int, runs: [PageRun])
    /// Everything that the other channels brought before their next SYNC belongs before what follows here.
    case multifdFlush
    /// EOS: the footer may still be on its way, as QEMU sends it later. Only if ``StreamDecoder/tellsEndOfRecords``.
    case ramRecordsEnded
    /// A START, PART or END of the RAM section ended, footer included.
    case ramSectionEnded(SectionType)
    /// A whole FULL section, footer included.
    case device(SectionHead, body: [UInt8])
    /// A section of unknown layout, found by its footer. Only from a decoder that describes streams.
    case inferredSection(SectionHead, type: SectionType, bodyBytes: UInt64)
    case command(ForwardCommand)
    /// EOF: what a QEMU source says when everything has been sent.
    case endOfStream
    /// The JSON text follows as payload.
    case vmDescription(byteCount: Int)

    /// Contents of guest pages.
    public var isPages: Bool {
        switch self {
        case .page, .zeroPage, .pageDelta, .pageBatch: true
        default: false
        }
    }
}

func hexadecimal(_ value: UInt64, digits: Int = 0) -> String {
    let text = String(value, radix: 16)
    return String(repeating: "0", count: max(0, digits - text.count)) + text
}
