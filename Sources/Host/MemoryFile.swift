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

    /// The first byte with data at or after `offset`, at page granularity; `nil` if only hole follows.
    ///
    /// Source: lseek(2), SEEK_DATA. A swapped-out page counts as data. The end of the data is not looked for here: SEEK_HOLE knows no
    /// limit and walks page by page (13 ms per GiB of 4 KiB pages).
    public func nextData(from offset: UInt64) throws(SystemError) -> UInt64? {
        guard offset < byteCount else { return nil }
        let start = lseek(descriptor.number, Int(offset), CInt(GW_SEEK_DATA))
        if start >= 0 { return UInt64(start) }
        if errno == ENXIO { return nil }
        throw .last("seek data", descriptor.name)
    }

    /// Copies bytes out; holes read as zeroes and stay holes.
    @unsafe public func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(SystemError) {
        var done = 0
        while done < buffer.count {
            // SAFETY: the rest of the caller's buffer, for the time of the call.
            let count = unsafe pread(
                descriptor.number, buffer.baseAddress! + done, buffer.count - done, Int(offset) + done)
            if count < 0, errno == EINTR { continue }
            guard count > 0 else {
                throw count < 0 ? .last("read", descriptor.name) : SystemError("read", descriptor.name, code: ERANGE)
            }
            done += count
        }
    }
}
