// Streams whose pages stand at places of their own in a file (capability mapped-ram).
//
// Source: QEMU's docs/devel/migration/mapped-ram.rst. Behind the name and length of each block in the list stands a header of 28 bytes,
// then the block's bitmap (a bit per page, in 64-bit words of the machine: little-endian), a gap up to the next 1 MiB, and the block's
// pages, each at its own offset. The stream goes on behind the pages: with the next block, or the end of the list. Pages whose bit is
// clear are zero, whatever stands in their place. All offsets count from the start of the file, wherever the stream begins in it.

/// Where the pages of one RAM block stand in a file; bytes from the start of the file.
public struct MappedRegion: Hashable, Sendable {
    /// Index into the stream's blocks.
    public let block: Int
    /// Of the block, and of the place for its pages.
    public let length: UInt64
    public let bitmapOffset: UInt64
    public let pagesOffset: UInt64

    public init(block: Int, length: UInt64, bitmapOffset: UInt64, pagesOffset: UInt64) {
        self.block = block
        self.length = length
        self.bitmapOffset = bitmapOffset
        self.pagesOffset = pagesOffset
    }

    public var pageCount: UInt64 { length / UInt64(Wire.pageSize) }
    /// Whole words of 64 bits.
    public var bitmapBytes: UInt64 { Self.bitmapBytes(of: length) }
    /// Where the stream goes on.
    public var end: UInt64 { pagesOffset + length }

    static func bitmapBytes(of length: UInt64) -> UInt64 { (length / UInt64(Wire.pageSize) + 63) / 64 * 8 }
}

/// What is wrong with a block's header in such a file.
public enum MappedRAMFault: Hashable, Sendable {
    case version(UInt32)
    case pageSize(UInt64)
    case bitmapOffset(UInt64)
    case pagesOffset(UInt64)

    var sentence: String {
        switch self {
        case .version(let version): "version \(version) is not supported, only \(MappedRAM.version)"
        case .pageSize(let size): "its pages have \(size) bytes, this machine's \(Wire.pageSize)"
        case .bitmapOffset(let offset):
            "its bitmap would be at 0x\(hexadecimal(offset)), which is not behind its header and before its pages"
        case .pagesOffset(let offset):
            "its pages would be at 0x\(hexadecimal(offset)), which is not a multiple of the page size that a file can have"
        }
    }
}

/// The layout of such a file.
public enum MappedRAM {
    public static let capability = "mapped-ram"
    static let version: UInt32 = 1
    static let headerBytes: UInt64 = 28
    /// Pages begin at a multiple of that in the file, as QEMU has them: enough for any direct I/O.
    static let alignment: UInt64 = 1 << 20
    /// No file is longer.
    static let fileLimit = UInt64(Int64.max)

    /// Checks a header that ends at `position` in the file.
    static func region(
        block: Int, length: UInt64, version: UInt32, pageSize: UInt64, bitmap: UInt64, pages: UInt64,
        behind position: UInt64
    ) -> Result<MappedRegion, Fault> {
        guard version == Self.version else { return .failure(Fault(.version(version))) }
        guard pageSize == UInt64(Wire.pageSize) else { return .failure(Fault(.pageSize(pageSize))) }
        guard pages % UInt64(Wire.pageSize) == 0, pages <= fileLimit, length <= fileLimit - pages, pages >= position
        else {
            return .failure(Fault(.pagesOffset(pages)))
        }
        guard bitmap >= position, bitmap <= pages, MappedRegion.bitmapBytes(of: length) <= pages - bitmap else {
            return .failure(Fault(.bitmapOffset(bitmap)))
        }
        return .success(MappedRegion(block: block, length: length, bitmapOffset: bitmap, pagesOffset: pages))
    }

    struct Fault: Error {
        let fault: MappedRAMFault
        init(_ fault: MappedRAMFault) { self.fault = fault }
    }
}

/// What a source writes before the first page: where everything stands follows from the blocks.
public struct MappedRAMSetup: Hashable, Sendable {
    /// The header of the stream and its configuration.
    public let opening: [UInt8]
    /// The START section of RAM in pieces; behind each but the last comes a gap of so many bytes, for bitmap and pages.
    public let pieces: [(bytes: [UInt8], gap: UInt64)]
    public let regions: [MappedRegion]

    /// - Parameter offset: where the stream begins in its file.
    public init(
        machine: String, uuid: MigrationIdentifier? = nil, blocks: [RAMBlockDescription], ramSectionID id: UInt32,
        at offset: UInt64
    ) {
        var writer = StreamWriter()
        writer.header()
        // QEMU refuses a file of which it is not said.
        let capabilities = ConfigurationSubsection.capabilities([MappedRAM.capability])
        writer.configuration(machine: machine, subsections: [capabilities] + (uuid.map { [.uuid($0)] } ?? []))
        let opening = writer.take()
        var position = offset + UInt64(opening.count)
        var pieces: [(bytes: [UInt8], gap: UInt64)] = []
        var regions: [MappedRegion] = []
        writer.ramSetupHead(id: id, blocks: blocks)
        for (index, block) in blocks.enumerated() {
            writer.block(block)
            let bitmap = position + UInt64(writer.bytes.count) + MappedRAM.headerBytes
            let bitmapEnd = bitmap + MappedRegion.bitmapBytes(of: block.length)
            let pages = (bitmapEnd + MappedRAM.alignment - 1) / MappedRAM.alignment * MappedRAM.alignment
            let region = MappedRegion(block: index, length: block.length, bitmapOffset: bitmap, pagesOffset: pages)
            writer.mappedRAMHeader(region)
            pieces.append((writer.take(), region.end - bitmap))
            regions.append(region)
            position = region.end
        }
        writer.ramSectionEnd(id: id)
        pieces.append((writer.take(), 0))
        self.opening = opening
        self.pieces = pieces
        self.regions = regions
    }

    public static func == (left: MappedRAMSetup, right: MappedRAMSetup) -> Bool {
        left.opening == right.opening && left.regions == right.regions
    }

    public func hash(into hasher: inout Hasher) {
        hasher.combine(opening)
        hasher.combine(regions)
    }
}

extension StreamWriter {
    fileprivate mutating func mappedRAMHeader(_ region: MappedRegion) {
        be32(MappedRAM.version)
        be64(UInt64(Wire.pageSize))
        be64(region.bitmapOffset)
        be64(region.pagesOffset)
    }
}

extension StreamDecoder {
    /// The header behind a block of the list. - Returns: `nil` when bytes are missing.
    mutating func mappedRAMHeader(
        of block: RAMBlockDescription, headEnd: Int, _ buffer: inout ReceiveBuffer
    ) throws(StreamError) -> MappedRegion? {
        let end = headEnd + Int(MappedRAM.headerBytes)
        guard buffer.count >= end else { return nil }
        // Of a stream that is told to begin far behind, no place in a file can be right.
        let (behind, overflow) = fileOffset.addingReportingOverflow(position + UInt64(end))
        let found = MappedRAM.region(
            block: listed.count, length: block.length, version: buffer.be32(headEnd),
            pageSize: buffer.be64(headEnd + 4),
            bitmap: buffer.be64(headEnd + 12), pages: buffer.be64(headEnd + 20), behind: overflow ? .max : behind)
        switch found {
        case .failure(let wrong): throw error(.mappedRAM(block: block.name, wrong.fault))
        case .success(let region):
            payloadBytes = Int(region.end - behind)
            return region
        }
    }
}
