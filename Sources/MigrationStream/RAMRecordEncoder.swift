/// Encodes page records. It remembers the block of the last one, because a record of the same block does not repeat the
/// name, also across sections: use one encoder for a whole stream.
public struct RAMRecordEncoder: Sendable {
    private let names: [[UInt8]]
    private var lastBlock = -1

    /// - Parameter blocks: the block list of the stream's RAM section; records name blocks by their index in it.
    public init(blocks: [RAMBlockDescription]) {
        names = blocks.map { block in
            let text = Array(block.name.utf8)
            precondition(text.count <= 255, "RAMRecordEncoder: block name of more than 255 bytes")
            return [UInt8(text.count)] + text
        }
    }

    /// A page; its ``Wire/pageSize`` bytes must follow in the stream.
    public mutating func page(block: Int, offset: UInt64, into bytes: inout [UInt8]) {
        word(.page, block, offset, into: &bytes)
    }

    /// A page of zeros.
    public mutating func zeroPage(block: Int, offset: UInt64, into bytes: inout [UInt8]) {
        word(.zero, block, offset, into: &bytes)
        bytes.append(0)
    }

    /// A page as its difference to what was sent of it before; the `byteCount` bytes of the encoding (``XBZRLE``) must follow.
    /// - Parameter digest: of the whole page, where ``FeatureSet/verification`` was chosen.
    public mutating func pageDelta(
        block: Int, offset: UInt64, byteCount: Int, digest: UInt64? = nil, into bytes: inout [UInt8]
    ) {
        precondition((1...XBZRLE.longestEncoding).contains(byteCount), "RAMRecordEncoder: length of a delta")
        word(.xbzrle, block, offset, into: &bytes)
        bytes.append(XBZRLE.recordKind)
        bytes.append(UInt8(truncatingIfNeeded: byteCount >> 8))
        bytes.append(UInt8(truncatingIfNeeded: byteCount))
        if let digest { append64(digest, to: &bytes) }
    }

    /// A batch; the bytes of its data runs must follow in the stream, in their order. At most
    /// ``StreamLimit/batchRuns`` runs with ``StreamLimit/batchDataBytes`` of data.
    ///
    /// Where ``FeatureSet/verification`` was chosen, be64 digests of all pages of the data runs stand between them.
    public mutating func batch(block: Int, runs: some Collection<PageRun>, into bytes: inout [UInt8]) {
        precondition((1...StreamLimit.batchRuns).contains(runs.count), "RAMRecordEncoder: number of runs")
        word(.batch, block, 0, into: &bytes)
        append32(UInt32(runs.count), to: &bytes)
        for run in runs {
            append64(run.offset | UInt64(run.kind.rawValue), to: &bytes)
            append32(run.pages, to: &bytes)
        }
    }

    private mutating func word(_ flags: RAMFlags, _ block: Int, _ offset: UInt64, into bytes: inout [UInt8]) {
        if block == lastBlock {
            append64(offset | flags.rawValue | RAMFlags.sameBlock.rawValue, to: &bytes)
        } else {
            append64(offset | flags.rawValue, to: &bytes)
            bytes.append(contentsOf: names[block])
            lastBlock = block
        }
    }

    private func append64(_ value: UInt64, to bytes: inout [UInt8]) {
        append32(UInt32(truncatingIfNeeded: value >> 32), to: &bytes)
        append32(UInt32(truncatingIfNeeded: value), to: &bytes)
    }

    private func append32(_ value: UInt32, to bytes: inout [UInt8]) {
        bytes.append(UInt8(truncatingIfNeeded: value >> 24))
        bytes.append(UInt8(truncatingIfNeeded: value >> 16))
        bytes.append(UInt8(truncatingIfNeeded: value >> 8))
        bytes.append(UInt8(truncatingIfNeeded: value))
    }
}
