/// The first 64 bytes of a channel besides the main one (QEMU's multifd): who is there, and which channel it is.
///
///     be32 magic 0x11223344, be32 version 1, uuid of the machine (16 bytes), u8 channel, reserved (39 bytes)
///
/// A Godwit source writes its ``Mark`` into the reserved bytes from byte 32 on, which QEMU neither sets nor reads:
///
///     be32 0x474F4457, be32 number of channels, identifier of the migration (16 bytes), u8 kind
public struct MultifdGreeting: Hashable, Sendable {
    /// What a Godwit's channel is for.
    public enum Kind: UInt8, Hashable, Sendable {
        /// Packets of pages (multifd).
        case pages = 0
        /// Requests of a guest that moved before its memory, and the pages (postcopy).
        case urgent = 1

        var most: Int { self == .pages ? StreamLimit.multifdChannels : StreamLimit.urgentChannels }
    }

    /// What a Godwit source says of its migration, so that its destination need not be told what to expect.
    public struct Mark: Hashable, Sendable {
        /// The one that BEGIN will name on the main channel.
        public let migration: MigrationIdentifier
        /// How many channels of this kind there will be.
        public let channels: Int
        public let kind: Kind

        public init(migration: MigrationIdentifier, channels: Int, kind: Kind = .pages) {
            self.migration = migration
            self.channels = channels
            self.kind = kind
        }
    }

    /// From 0 up.
    public let channel: UInt8
    /// QEMU's `-uuid`: it wants its own at the other end; zero where none was given.
    public let uuid: MigrationIdentifier
    /// `nil`: the source is no Godwit.
    public let mark: Mark?

    public static let byteCount = 64
    static let markOffset = 32

    public init(
        channel: UInt8, uuid: MigrationIdentifier = MigrationIdentifier(high: 0, low: 0), mark: Mark? = nil
    ) {
        self.channel = channel
        self.uuid = uuid
        self.mark = mark
    }

    /// Whether a connection's first bytes announce a channel; `nil` as long as they are fewer than four.
    public static func isAnnounced(by bytes: [UInt8]) -> Bool? {
        bytes.count < 4 ? nil : bytes.be32(0) == MultifdWire.magic
    }

    /// Reads a greeting. - Returns: `nil` when the buffer does not hold a whole one.
    public init?(from buffer: inout ReceiveBuffer) throws(StreamError) {
        guard buffer.count >= Self.byteCount else { return nil }
        try MultifdWire.checkOpening(buffer, position: 0)
        channel = buffer[24]
        uuid = MigrationIdentifier(high: buffer.be64(8), low: buffer.be64(16))
        let mark = Self.markOffset
        if buffer.be32(mark) == Wire.godwitPing {
            let count = buffer.be32(mark + 4)
            guard let kind = Kind(rawValue: buffer[mark + 24]) else {
                throw StreamError(.multifd(.kind(buffer[mark + 24])), position: 0)
            }
            guard (1...UInt32(kind.most)).contains(count) else {
                throw StreamError(.multifd(.channelCount(count, most: kind.most)), position: 0)
            }
            self.mark = Mark(
                migration: MigrationIdentifier(high: buffer.be64(mark + 8), low: buffer.be64(mark + 16)),
                channels: Int(count), kind: kind)
        } else {
            self.mark = nil
        }
        guard Int(channel) < self.mark?.channels ?? StreamLimit.multifdChannels else {
            throw StreamError(
                .multifd(.channel(channel, of: self.mark?.channels ?? StreamLimit.multifdChannels)), position: 0)
        }
        buffer.consume(Self.byteCount)
    }

    /// The 64 bytes.
    public var bytes: [UInt8] {
        var writer = StreamWriter()
        writer.be32(MultifdWire.magic)
        writer.be32(MultifdWire.version)
        writer.identifier(uuid)
        writer.append([channel])
        writer.append(repeating: 0, count: Self.markOffset - writer.bytes.count)
        if let mark {
            writer.be32(Wire.godwitPing)
            writer.be32(UInt32(mark.channels))
            writer.identifier(mark.migration)
            writer.append([mark.kind.rawValue])
        }
        writer.append(repeating: 0, count: Self.byteCount - writer.bytes.count)
        return writer.bytes
    }
}
