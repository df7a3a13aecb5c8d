/// The wire: QEMU's migration stream, version 3, encoded and decoded without any I/O. All integers are big-endian.
///
/// Sequence between two Godwits (lines marked `x` are Godwit's extension and appear only after HELLO):
///
///     source                                                     destination
///       header "QEVM" 3, CONFIGURATION machine                        |
///       COMMAND OPEN_RETURN_PATH, COMMAND PING 0x474F4457  ---------->|
///       |<----------------------------------------  x HELLO version, features, instance
///       |<----------------------------------------    PONG 0x474F4457
///     x COMMAND BEGIN migration, chosen features           ---------->|
///       START ram: block list, EOS, FOOTER                 ---------->|
///       PART ram: page records (x batches), EOS, FOOTER    ---------->|  once per round, the guest runs on
///       --- the guest stops on the source ---                         |
///       PART ram: page records, EOS, FOOTER                ---------->|  the last round
///       FULL device sections, each with a FOOTER           ---------->|
///     x COMMAND PREPARE                                    ---------->|  checks and loads all state
///       |<----------------------------------------  x READY nanoseconds
///     x COMMAND COMMIT_WITHIN  (the source may not run any more) ---->|  the guest starts
///       |<----------------------------------------  x STARTED nanoseconds
///       |<----------------------------------------    SHUT 0
///       END ram: EOS, FOOTER, EOF, VMDESCRIPTION json      ---------->|
///
/// A standstill that would take longer than its limit is taken back: instead of COMMIT_WITHIN the source says `x` RETRACT, or
/// COMMIT_WITHIN arrives when its time has passed. The destination forgets the device state, says `x` RETRACTED, and PART ram
/// follows, with the guest running on the source. (Peers without ``FeatureSet/retraction`` get END ram before the device
/// sections, COMMIT instead of COMMIT_WITHIN, and EOF right behind it.)
///
/// With ``FeatureSet/resumption`` a connection lost before COMMIT_WITHIN ends nothing: the destination keeps what it received, and a
/// later connection takes the migration up. Sections and records begin afresh on it:
///
///       header, CONFIGURATION, OPEN_RETURN_PATH, PING 0x474F4457  --->|
///       |<----------------------------------------  x HELLO, PONG 0x474F4457
///     x COMMAND RESUME migration, the features chosen      ---------->|  lets go of the old connection
///       |<----------------------------------------  x RESUMED
///       START ram: block list, EOS, FOOTER, PART ram ...   ---------->|
///
/// So that the source knows what was placed, it ends a PART now and then, says PING 0x4Dxxxxxx (a ``ResumptionMark``), and begins another.
///
/// With ``FeatureSet/verification`` a digest travels with each page, `x` ROOT stands before PREPARE, and a destination whose root is another
/// asks by `x` DIGESTS_WANTED, is answered by `x` DIGESTS, and says FAILURE with the pages that differ; no READY comes.
///
/// A QEMU destination answers PONG without HELLO: then nothing of Godwit's is sent, EOF alone tells it to start, and
/// SHUT tells how it went. A connection lost after COMMIT is settled on a new one: header, `x` COMMAND SETTLE migration;
/// the answer is `x` VERDICT.
///
/// With multifd the source opens further channels before it says anything, each with a ``MultifdGreeting``; pages go over these, in
/// a ``MultifdPacket`` each 128, and the main channel keeps everything else:
///
///     main                                                       each channel
///       header ...                                                 greeting
///       START ram: block list, MULTIFD_FLUSH, EOS, FOOTER          SYNC
///       PART ram: (zero pages for an old QEMU)                     packets
///                 MULTIFD_FLUSH, EOS, FOOTER                       SYNC      once per round
///
/// At MULTIFD_FLUSH the destination's main channel waits until every channel is at its SYNC, and each channel waits at its SYNC for the
/// main one. QEMU 8.0 and older know no MULTIFD_FLUSH: there each EOS of the RAM section means it.
///
/// The receiver (``StreamDecoder``) as a state machine:
///
///     header -> between sections
///     between sections -> configuration (only first) | command              -> between sections
///                      -> START ram: block list    -> records
///                      -> PART or END ram          -> records
///                      -> FULL section: body       -> footer
///                      -> EOF -> trailer -> VMDESCRIPTION -> ended
///     records          -> page | zero page | page delta | page batch (payload goes around the decoder) -> records
///                      -> MULTIFD_FLUSH -> records
///                      -> EOS -> footer
///     footer           -> between sections
///     any of them      -> failed (for good, with one ``StreamError``)
public enum Wire {
    /// "QEVM", the first four bytes of a stream.
    public static let magic: UInt32 = 0x5145_564d
    /// The only stream version that is spoken.
    public static let version: UInt32 = 3
    /// The value of the opening PING by which a Godwit destination knows a Godwit source ("GODW").
    public static let godwitPing: UInt32 = 0x474f_4457
    /// Bytes of one page record's payload.
    public static let pageSize = 4096
    /// The name of the RAM section, and the only version of it that is spoken.
    public static let ramSectionName = "ram"
    public static let ramSectionVersion: UInt32 = 4
}

/// What begins at a section boundary: the first byte. QEMU uses zero for the end of the stream.
public enum SectionType: UInt8, Sendable {
    case endOfStream = 0x00
    case start = 0x01
    case part = 0x02
    case end = 0x03
    case full = 0x04
    case subsection = 0x05
    case vmDescription = 0x06
    case configuration = 0x07
    case command = 0x08
    case footer = 0x7e
}

/// The flags in the low twelve bits of a RAM record's first word.
public struct RAMFlags: OptionSet, Sendable {
    public let rawValue: UInt64
    public init(rawValue: UInt64) { self.rawValue = rawValue }

    public static let zero = RAMFlags(rawValue: 0x02)
    public static let memorySize = RAMFlags(rawValue: 0x04)
    public static let page = RAMFlags(rawValue: 0x08)
    public static let endOfSection = RAMFlags(rawValue: 0x10)
    public static let sameBlock = RAMFlags(rawValue: 0x20)
    /// A page as its difference to what was sent of it before, see ``XBZRLE``.
    public static let xbzrle = RAMFlags(rawValue: 0x40)
    public static let hook = RAMFlags(rawValue: 0x80)
    public static let multifdFlush = RAMFlags(rawValue: 0x200)
    /// Godwit's page batch, only after ``FeatureSet/pageBatches`` was chosen.
    public static let batch = RAMFlags(rawValue: 0x400)

    /// The bits of a record's first word that hold flags; the others are the page's offset in its block.
    public static let mask: UInt64 = 0xfff
}

/// The numbers of forward commands. Zero is invalid.
public enum CommandType: UInt16, Sendable {
    case invalid = 0
    case openReturnPath = 1
    case ping = 2
    case postcopyAdvise = 3
    case postcopyListen = 4
    case postcopyRun = 5
    case postcopyRAMDiscard = 6
    case packaged = 7
    case enableCOLO = 8
    case postcopyResume = 9
    case receiveBitmap = 10
    case switchoverStart = 11
    case begin = 0x4701
    case prepare = 0x4702
    case commit = 0x4703
    case settle = 0x4704
    case cancel = 0x4705
    case retract = 0x4710
    case commitWithin = 0x4711
    case resume = 0x4720
    case root = 0x4730
    case digests = 0x4731
}

/// The numbers of return path messages. Zero is invalid.
public enum ReturnPathType: UInt16, Sendable {
    case invalid = 0
    case shut = 1
    case pong = 2
    case requestPagesWithName = 3
    case requestPages = 4
    case receivedBitmap = 5
    case resumeAcknowledged = 6
    case switchoverAcknowledged = 7
    case hello = 0x4701
    case ready = 0x4702
    case started = 0x4703
    case failure = 0x4704
    case verdict = 0x4705
    case retracted = 0x4710
    case resumed = 0x4720
    case digestsWanted = 0x4730
}

/// What a run of a page batch holds: the low bits of its first word. Zero is invalid.
public enum PageRunKind: UInt8, Sendable {
    case invalid = 0
    case data = 1
    case zero = 2
}

/// What a destination knows about a migration that was committed on a lost connection. Zero is invalid.
public enum Verdict: UInt8, Sendable {
    case invalid = 0
    /// The guest started there: it must never run on the source again.
    case started = 1
    /// The guest did not start there and never will: the source may run it.
    case neverStarted = 2
    /// The destination has never heard of that migration.
    case unknown = 3
}

/// Abilities that two Godwits agree on with HELLO and BEGIN.
public struct FeatureSet: OptionSet, Hashable, Sendable {
    public let rawValue: UInt64
    public init(rawValue: UInt64) { self.rawValue = rawValue }

    /// PREPARE, READY, COMMIT, STARTED.
    public static let twoPhaseHandover = FeatureSet(rawValue: 1 << 0)
    /// RAM records that carry many pages, ``RAMFlags/batch``.
    public static let pageBatches = FeatureSet(rawValue: 1 << 1)
    /// Pages go over further channels, whose greetings name the migration: ``MultifdGreeting``.
    public static let multifd = FeatureSet(rawValue: 1 << 2)
    /// RETRACT, RETRACTED, COMMIT_WITHIN: a switchover that takes too long is taken back. Only with ``twoPhaseHandover``.
    public static let retraction = FeatureSet(rawValue: 1 << 8)

    /// A digest travels with each page, and both sides' records of them are compared before READY: ROOT, DIGESTS, DIGESTS_WANTED. Only with
    /// ``twoPhaseHandover`` and ``pageBatches``, and chosen only by a source that was told to.
    public static let verification = FeatureSet(rawValue: 1 << 9)
    /// RESUME, RESUMED: a connection lost before the handover is replaced by another. Only with ``twoPhaseHandover``.
    public static let resumption = FeatureSet(rawValue: 1 << 10)

    /// The guest may move before its memory (``PostcopyCommand``): the package stands before PREPARE, RUN in it starts nothing, COMMIT does.
    /// Only with ``twoPhaseHandover`` and ``retraction``; offered and chosen only by who was told to.
    public static let postcopy = FeatureSet(rawValue: 1 << 11)

    /// Until all memory has followed its guest the source can take it back: epochs (``EpochMessage``) go over the last of the channels for
    /// requested pages, which there are in any case. Only with ``postcopy``; offered and chosen only by who was told to.
    public static let safetyNet = FeatureSet(rawValue: 1 << 12)

    /// All that this program uses without being told to.
    public static let all: FeatureSet = [.twoPhaseHandover, .pageBatches, .multifd, .retraction, .resumption]
}

/// Upper bounds of everything that a stream may announce. What exceeds one is an error, never memory.
public enum StreamLimit {
    public static let machineNameBytes = 255
    public static let ramBlocks = 256
    public static let blockBytes: UInt64 = 1 << 52
    public static let sections = 4096
    public static let sectionBodyBytes = 16 << 20
    public static let capabilities = 64
    public static let batchRuns = 512
    public static let batchDataBytes = 4 << 20
    public static let reasonBytes = 1024
    /// Digests, or sums of them, in one answer.
    public static let digests = 4096
    public static let multifdChannels = 64
    /// Between two Godwits, for requested pages.
    public static let urgentChannels = 16
    /// Compressed contents of one packet.
    public static let multifdContentBytes = 1 << 20
    public static let vmDescriptionBytes = 64 << 20
    /// What stands between LISTEN and RUN of postcopy.
    public static let packageBytes = 64 << 20
    /// Sections and commands in it.
    public static let packageItems = 16384
    /// As many as fit one command whatever the block is called.
    public static let discardRanges = 4079
    /// Pages asked for at once: the largest page there is.
    public static let requestBytes: UInt32 = 1 << 30
}
