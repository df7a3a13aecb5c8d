public import Host

/// Unpacks what a ``PageCompressor`` of either program made, packet by packet, straight into guest memory.
///
/// The bytes come from outside. What does not fill exactly the pages announced is refused; no more memory is taken than the library needs
/// for its window: 32 KiB with zlib, with zstd what the peer's level asks for, at most 32 MiB (level 20).
public struct PageDecompressor: ~Copyable, @unchecked Sendable {
    public let method: CompressionMethod
    // SAFETY of Sendable: as in PageCompressor.
    private let stream: any CompressionStream
    private let probe: Mapping

    /// - Throws: `CompressionError` for a library that is not here.
    public init(_ method: CompressionMethod) throws(CompressionError) {
        let stream = try method.decompressor()
        let probe: Mapping
        do throws(SystemError) { probe = try Mapping(anonymousByteCount: 4096) } catch {
            throw .failed(method, operation: "making a buffer", reason: error.description)
        }
        self.method = method
        self.stream = stream
        self.probe = probe
    }

    /// Unpacks `count` bytes of `packed`, from `offset` on, into all of `ranges`.
    ///
    /// - Throws: `CompressionError` for bytes that are no packet of these pages. The stream is of no use afterwards, and the pages hold
    ///   what was unpacked until then.
    public mutating func decompress(
        _ packed: Mapping, at offset: Int = 0, count: Int, into ranges: some Sequence<MemoryRange>
    ) throws(CompressionError) {
        var taken = 0
        var missing = 0
        for range in ranges {
            var done = 0
            // Once something is missing nothing more can come: the rest is only counted.
            while done < range.count, missing == 0 {
                let step = try run(
                    packed, offset + taken, count - taken, into: range.mapping, range.offset + done, range.count - done)
                taken += step.taken
                done += step.put
                if step.put == 0, step.taken == 0 || taken == count { break }
            }
            missing += range.count - done
        }
        guard missing == 0 else {
            throw taken < count
                ? .damaged(method, reason: "they cannot be read beyond byte \(taken)")
                : .tooShort(method, missing: missing)
        }
        // The pages are full: what is left may be the mark of the flush, but no contents, neither unread nor kept by the library.
        while true {
            let step = try run(packed, offset + taken, count - taken, into: probe, 0, 1)
            taken += step.taken
            guard step.put == 0 else { throw .tooLong(method) }
            if taken == count { return }
            guard step.taken > 0 else { throw .tooLong(method) }
        }
    }

    /// The next packet begins a new stream.
    public mutating func reset() throws(CompressionError) { try stream.reset() }

    private func run(
        _ packed: Mapping, _ offset: Int, _ count: Int, into mapping: Mapping, _ start: Int, _ room: Int
    ) throws(CompressionError) -> StreamStep {
        try unsafe packed.withBytes(at: offset, count: count) { source throws(CompressionError) in
            try unsafe mapping.withMutableBytes(at: start, count: room) { room throws(CompressionError) in
                try unsafe stream.run(source, into: room, flush: false)
            }
        }
    }
}
