import CLinux
import Glibc

/// A memfd: memory with a descriptor. Never-touched ranges are holes, known without reading them.
public final class MemoryFile: Sendable {
    public let descriptor: Descriptor
    public let byteCount: UInt64

    /// Creates a memory file of holes. The kernel reserves nothing.
    public init(name: String, byteCount: UInt64) throws(SystemError) {
        descriptor = Descriptor(
            owning: try unsafe checked(gw_memfd_create(name), "memfd_create", name), name: "memfd \(name)")
        self.byteCount = byteCount
        try descriptor.truncate(to: byteCount)
    }

    /// The next range with data at or after `offset` and before `end`, cut at `end`; `nil` if all is hole.
    ///
    /// Source: lseek(2), SEEK_DATA and SEEK_HOLE. A swapped-out page counts as data.
    public func nextData(from offset: UInt64, to end: UInt64) throws(SystemError) -> Range<UInt64>? {
        guard offset < end else { return nil }
        let start = lseek(descriptor.number, Int(offset), CInt(GW_SEEK_DATA))
        if start < 0 {
            if errno == ENXIO { return nil }
            throw .last("seek data", descriptor.name)
        }
        guard UInt64(start) < end else { return nil }
        let hole = lseek(descriptor.number, start, CInt(GW_SEEK_HOLE))
        guard hole >= 0 else { throw .last("seek hole", descriptor.name) }
        return UInt64(start)..<min(UInt64(hole), end)
    }

    /// All ranges with data inside `range`, in order.
    public func dataRanges(in range: Range<UInt64>) throws(SystemError) -> [Range<UInt64>] {
        var ranges: [Range<UInt64>] = []
        var offset = range.lowerBound
        while let next = try nextData(from: offset, to: range.upperBound) {
            ranges.append(next)
            offset = next.upperBound
        }
        return ranges
    }
}
