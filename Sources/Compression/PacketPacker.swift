public import Host

/// What the thread of a channel does with the pages of one packet after the other: compresses them, or lets them go plain.
///
/// Only a peer that begins a new stream after a plain packet (``PacketUnpacker``, so a Godwit) can be sent one; QEMU refuses it.
public struct PacketPacker: ~Copyable, Sendable {
    public enum Contents: Equatable, Sendable {
        /// The pages as they are.
        case plain
        /// That many bytes at the start of ``buffer``.
        case packed(byteCount: Int)
    }

    /// Where compressed contents stand, until the next packet.
    public let buffer: Mapping
    public let method: CompressionMethod
    private var compressor: PageCompressor
    private var watch = ShrinkWatch()

    /// - Parameter packetBytes: the most bytes of pages in one packet.
    /// - Throws: `CompressionError` for a level that does not exist, or a library that is not here.
    public init(_ method: CompressionMethod, level: Int, packetBytes: Int) throws(CompressionError) {
        let compressor = try PageCompressor(method, level: level)
        let buffer: Mapping
        do throws(SystemError) {
            buffer = try Mapping(anonymousByteCount: PageCompressor.bound(byteCount: packetBytes))
        } catch { throw .failed(method, operation: "making a buffer", reason: error.description) }
        self.method = method
        self.compressor = compressor
        self.buffer = buffer
    }

    /// The next packet.
    /// - Parameters:
    ///   - byteCount: bytes of all `pages` together.
    ///   - mayGoPlain: whether the peer takes plain packets among the others.
    public mutating func pack(
        _ pages: some Sequence<MemoryRange>, byteCount: Int, mayGoPlain: Bool
    ) throws(CompressionError) -> Contents {
        guard !mayGoPlain || watch.shouldTry() else { return .plain }
        let packed = try compressor.compress(pages, into: buffer)
        guard mayGoPlain, !watch.isWorth(packed: packed, plain: byteCount) else { return .packed(byteCount: packed) }
        // The peer never sees what the stream now remembers.
        try compressor.reset()
        return .plain
    }
}

/// The other end of ``PacketPacker``.
public struct PacketUnpacker: ~Copyable, Sendable {
    /// Where the bytes of a packet are received, before they are unpacked.
    public let buffer: Mapping
    private var decompressor: PageDecompressor
    private var isFresh = true

    public var method: CompressionMethod { decompressor.method }

    /// - Parameter packetBytes: the most bytes of pages in one packet; a compressed one is at most as long as ``buffer``.
    /// - Throws: `CompressionError` for a library that is not here.
    public init(_ method: CompressionMethod, packetBytes: Int) throws(CompressionError) {
        let decompressor = try PageDecompressor(method)
        let buffer: Mapping
        do throws(SystemError) {
            buffer = try Mapping(anonymousByteCount: Self.longest(packetBytes: packetBytes))
        } catch { throw .failed(method, operation: "making a buffer", reason: error.description) }
        self.decompressor = decompressor
        self.buffer = buffer
    }

    /// The longest contents of a packet that are accepted: as much as QEMU accepts, and more than either library makes.
    public static func longest(packetBytes: Int) -> Int { packetBytes * 2 }

    /// Unpacks `count` bytes that were put at the start of ``buffer`` into all of `pages`.
    ///
    /// - Throws: `CompressionError`, see ``PageDecompressor/decompress(_:at:count:into:)``.
    public mutating func unpack(count: Int, into pages: some Sequence<MemoryRange>) throws(CompressionError) {
        isFresh = false
        try decompressor.decompress(buffer, count: count, into: pages)
    }

    /// A packet came plain.
    public mutating func sawPlain() throws(CompressionError) {
        guard !isFresh else { return }
        try decompressor.reset()
        isFresh = true
    }
}
