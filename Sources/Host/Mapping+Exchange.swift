import CLinux
import Glibc

// What stands behind a part of a mapping can be exchanged, at the same address: whoever touches it meanwhile finds the one or the other,
// KVM's vCPUs too (Documentation/mm/mmu_notifier.rst). Offsets and counts are in bytes, whole pages of both kinds of memory.

extension Mapping {
    /// Private memory of pages of 4 KiB that are not there yet, in place of whatever was shown.
    public func showNothing(at offset: Int, count: Int) throws(SystemError) {
        try exchange(
            offset, count, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0, "\(count) bytes of private memory")
        _ = unsafe madvise(base + offset, count, CInt(MADV_NOHUGEPAGE))
    }

    /// A part of a file, shared, with its pages in the page tables at once.
    public func share(_ file: Descriptor, fileOffset: UInt64, at offset: Int, count: Int) throws(SystemError) {
        guard let place = Int(exactly: fileOffset) else { throw SystemError("mmap", file.name, code: EOVERFLOW) }
        try exchange(offset, count, MAP_SHARED | MAP_POPULATE, file.number, place, file.name)
    }

    private func exchange(
        _ offset: Int, _ count: Int, _ flags: CInt, _ file: CInt, _ place: Int, _ object: String
    ) throws(SystemError) {
        check(offset, count)
        // SAFETY: the range lies inside this mapping, which stays as long; nobody holds references into it, only offsets.
        let address = unsafe mmap(base + offset, count, PROT_READ | PROT_WRITE, flags | MAP_FIXED, file, place)
        guard unsafe address != MAP_FAILED else {
            let remedy = errno == ENOMEM ? "raise vm.max_map_count, or the host has no memory left" : nil
            throw SystemError("mmap", object, code: errno, remedy: remedy)
        }
        _ = unsafe madvise(base + offset, count, CInt(MADV_DONTDUMP))
    }
}
