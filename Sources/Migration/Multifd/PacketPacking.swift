import Compression
import GuestMemory
import Host
import MigrationStream

/// How the channels of an outgoing migration compress (`multifd-compression` and its level).
struct PacketPacking: Sendable {
    let method: CompressionMethod
    let level: Int

    /// The most bytes of pages in one packet.
    static let packetBytes = MultifdWire.packetPages * Wire.pageSize

    func packer() throws(CompressionError) -> PacketPacker {
        try PacketPacker(method, level: level, packetBytes: Self.packetBytes)
    }

    /// Pages of a packet as ranges of memory, joined where they are neighbours; in their order.
    static func ranges(_ offsets: [UInt64], in mapping: Mapping) -> [MemoryRange] {
        var ranges: [MemoryRange] = []
        for offset in offsets {
            let start = Int(offset)
            if let last = ranges.last, last.offset + last.count == start {
                ranges[ranges.count - 1] = MemoryRange(mapping, offset: last.offset, count: last.count + Wire.pageSize)
            } else {
                ranges.append(MemoryRange(mapping, offset: start, count: Wire.pageSize))
            }
        }
        return ranges
    }

    /// Neighbours in the list that are neighbours in memory, joined; the order stays.
    static func runs(_ offsets: [UInt64]) -> [Range<PageIndex>] {
        var runs: [Range<PageIndex>] = []
        for offset in offsets {
            let page = RAMOffset(offset).page
            if let last = runs.last, last.upperBound == page {
                runs[runs.count - 1] = last.lowerBound..<page.advanced(by: 1)
            } else {
                runs.append(page..<page.advanced(by: 1))
            }
        }
        return runs
    }
}

extension CompressionMethod {
    /// The number in a packet's flags.
    var onWire: MultifdCompression {
        switch self {
        case .zlib: .zlib
        case .zstd: .zstd
        }
    }

    init?(_ wire: MultifdCompression) {
        switch wire {
        case .none: return nil
        case .zlib: self = .zlib
        case .zstd: self = .zstd
        }
    }
}
