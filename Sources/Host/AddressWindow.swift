import CLinux
import Glibc

/// Reserved address space of this process in which parts of memory files are shown, hidden and exchanged while others look at it.
///
/// A change of what stands behind a page is one system call, and atomic for everybody who touches the page meanwhile: a fault waits for
/// the call and finds what stands there afterwards. That holds for virtual CPUs as well: their faults end in this address space, and the
/// kernel takes from them what they had mapped before the call returns (Documentation/mm/mmu_notifier.rst).
///
/// Offsets and counts are in bytes, whole pages. Nothing is read or written through it by this process.
@safe public final class AddressWindow: Sendable {
    public let byteCount: Int
    private let reservedByteCount: Int
    /// SAFETY: immutable; reserved for `reservedByteCount` bytes as long as this object lives, and never dereferenced.
    nonisolated(unsafe) private let reserved: UnsafeMutableRawPointer
    nonisolated(unsafe) private let base: UnsafeMutableRawPointer

    /// Huge pages need it that guest and host addresses agree to this many bytes.
    private static let alignment = 2 << 20

    /// Reserves address space that shows nothing. - Throws: `SystemError` where there is not as much.
    public init(byteCount: Int) throws(SystemError) {
        self.byteCount = byteCount
        reservedByteCount = byteCount + Self.alignment
        // SAFETY: a fresh range chosen by the kernel; checked for MAP_FAILED before use.
        let address = unsafe mmap(
            nil, reservedByteCount, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        guard let address = unsafe address, unsafe address != MAP_FAILED else {
            throw .last("mmap", "\(byteCount) bytes of address space")
        }
        unsafe reserved = address
        unsafe base = address.alignedUp(toMultipleOf: Self.alignment)
    }

    deinit { _ = unsafe munmap(reserved, reservedByteCount) }

    private func check(_ offset: Int, _ count: Int) {
        precondition(
            offset >= 0 && count > 0 && offset <= byteCount && count <= byteCount - offset
                && (offset | count) % 4096 == 0,
            "whole pages inside the window")
    }

    /// The address in this process of a byte, for the kernel. Not to be dereferenced.
    public func hostAddress(at offset: Int) -> UInt {
        precondition(offset >= 0 && offset < byteCount, "inside the window")
        return unsafe UInt(bitPattern: base) + UInt(offset)
    }

    /// Shows a part of a file, whatever was there before. - Throws: `SystemError`; what was there stays.
    public func show(
        _ file: Descriptor, from fileOffset: UInt64, at offset: Int, byteCount count: Int, readOnly: Bool
    ) throws(SystemError) {
        check(offset, count)
        let protection = readOnly ? PROT_READ : PROT_READ | PROT_WRITE
        try replace(offset, count, protection, MAP_SHARED, file.number, Int(truncatingIfNeeded: fileOffset), file.name)
        // Without it a core dump would hold the guest's memory twice; a kernel that refuses only dumps more.
        _ = unsafe madvise(base + offset, count, CInt(MADV_DONTDUMP))
    }

    /// Shows nothing: an access is a fault.
    public func hide(at offset: Int, byteCount count: Int) throws(SystemError) {
        check(offset, count)
        try replace(offset, count, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, "\(count) bytes of nothing")
    }

    private func replace(
        _ offset: Int, _ count: Int, _ protection: CInt, _ flags: CInt, _ file: CInt, _ fileOffset: Int,
        _ object: String
    ) throws(SystemError) {
        // SAFETY: the range lies in what `init` reserved, so that nothing else of this process is replaced.
        let result = unsafe mmap(
            base + offset, count, protection, flags | MAP_FIXED | MAP_NORESERVE, file, fileOffset)
        guard unsafe result != MAP_FAILED else { throw .last("mmap", object) }
    }

    /// Changes whether what is shown can be written.
    public func protect(at offset: Int, byteCount count: Int, readOnly: Bool) throws(SystemError) {
        check(offset, count)
        guard unsafe mprotect(base + offset, count, readOnly ? PROT_READ : PROT_READ | PROT_WRITE) == 0 else {
            throw .last("mprotect", "\(count) bytes")
        }
    }
}
