public import Host

/// Compresses the pages of packet after packet into one stream.
///
/// Pages may change while they are compressed, because the guest runs on. A stream made of two versions of a page is invalid; so where
/// the library does not read each byte once, each piece is copied first, and the library reads the copy alone.
public struct PageCompressor: ~Copyable, @unchecked Sendable {
    public let method: CompressionMethod
    // SAFETY of Sendable: the stream has no other owner, and the owner of this value is one thread at a time.
    private let stream: any CompressionStream
    private let copy: Mapping

    private static let pieceBytes = 16 << 10
    /// What zstd makes a block of.
    private static let directBytes = 128 << 10

    /// - Throws: `CompressionError` for a level that does not exist, or a library that is not here.
    public init(_ method: CompressionMethod, level: Int) throws(CompressionError) {
        let stream = try method.compressor(level: level)
        let copy: Mapping
        do throws(SystemError) { copy = try Mapping(anonymousByteCount: Self.pieceBytes) } catch {
            throw .failed(method, operation: "making a buffer", reason: error.description)
        }
        self.method = method
        self.stream = stream
        self.copy = copy
    }

    /// The room that pages of `byteCount` bytes take at most, whatever is in them.
    public static func bound(byteCount: Int) -> Int { byteCount + byteCount / 8 + 4096 }

    /// Compresses all ranges, in order, and flushes. - Returns: how many bytes there are now at the start of `buffer`.
    ///
    /// `buffer` must have room for the ``bound(byteCount:)`` of all ranges.
    public mutating func compress(
        _ ranges: some Sequence<MemoryRange>, into buffer: Mapping
    )
        throws(CompressionError) -> Int
    {
        var put = 0
        for range in ranges {
            var done = 0
            while done < range.count {
                let piece = min(range.count - done, stream.readsOnce ? Self.directBytes : Self.pieceBytes)
                if stream.readsOnce {
                    put = try run(range.mapping, range.offset + done, piece, into: buffer, at: put, flush: false)
                } else {
                    copy.copy(from: range.mapping, at: range.offset + done, count: piece)
                    put = try run(copy, 0, piece, into: buffer, at: put, flush: false)
                }
                done += piece
            }
        }
        return try run(copy, 0, 0, into: buffer, at: put, flush: true)
    }

    /// The next packet begins a new stream: what came before was not sent. The other end must do the same
    /// (``PageDecompressor/reset()``).
    public mutating func reset() throws(CompressionError) { try stream.reset() }

    private func run(
        _ source: Mapping, _ offset: Int, _ count: Int, into buffer: Mapping, at start: Int, flush: Bool
    ) throws(CompressionError) -> Int {
        var taken = 0
        var put = start
        while true {
            let step = try unsafe source.withBytes(at: offset + taken, count: count - taken) {
                source throws(CompressionError) in
                try unsafe buffer.withMutableBytes(at: put, count: buffer.byteCount - put) {
                    room throws(CompressionError) in
                    try unsafe stream.run(source, into: room, flush: flush)
                }
            }
            taken += step.taken
            put += step.put
            if taken == count, !flush || step.isFlushed { return put }
            precondition(put < buffer.byteCount, "PageCompressor: the buffer has room for the bound of its pages")
        }
    }
}
