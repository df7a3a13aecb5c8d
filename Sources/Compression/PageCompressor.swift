public import Host

/// Compresses the pages of packet after packet into one stream.
///
/// Pages may change while they are compressed, because the guest runs on: each piece is copied first, and the library reads the copy
/// alone. (zlib does not promise to read each byte once, and a stream made of two versions of a page is invalid.)
public struct PageCompressor: ~Copyable, @unchecked Sendable {
    public let method: CompressionMethod
    // SAFETY of Sendable: the stream has no other owner, and the owner of this value is one thread at a time.
    private let stream: any CompressionStream
    private let copy: Mapping

    private static let pieceBytes = 16 << 10

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
                let piece = min(range.count - done, Self.pieceBytes)
                copy.copy(from: range.mapping, at: range.offset + done, count: piece)
                put = try run(piece, into: buffer, at: put, flush: false)
                done += piece
            }
        }
        return try run(0, into: buffer, at: put, flush: true)
    }

    /// The next packet begins a new stream: what came before was not sent. The other end must do the same
    /// (``PageDecompressor/reset()``).
    public mutating func reset() throws(CompressionError) { try stream.reset() }

    private func run(
        _ count: Int, into buffer: Mapping, at start: Int, flush: Bool
    )
        throws(CompressionError) -> Int
    {
        var taken = 0
        var put = start
        while true {
            let step = try unsafe copy.withBytes(at: taken, count: count - taken) { source throws(CompressionError) in
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
