import CLinux
import Glibc

/// A memfd: memory with a descriptor. Never-touched ranges are holes, known without reading them.
public final class MemoryFile: Sendable {
    public let descriptor: Descriptor
    public let byteCount: UInt64

    /// Creates a memory file of holes. The kernel reserves nothing.
    ///
    /// - Parameter pageBytes: 4096, or the size of the host's huge pages (2 MiB, 1 GiB) that it is to be made of; `byteCount` is a
    ///   multiple. Huge pages come from the host's pool, at their first touch: without enough of them that ends the process.
    public init(name: String, byteCount: UInt64, pageBytes: Int = 4096) throws(SystemError) {
        precondition(pageBytes.nonzeroBitCount == 1, "pages are powers of two")
        let number = try unsafe checked(
            pageBytes == 4096
                ? gw_memfd_create(name) : gw_memfd_create_huge(name, UInt32(pageBytes.trailingZeroBitCount)),
            "memfd_create", name, remedy: pageBytes == 4096 ? nil : "the host may have no huge pages of that size")
        descriptor = Descriptor(owning: number, name: "memfd \(name)")
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
