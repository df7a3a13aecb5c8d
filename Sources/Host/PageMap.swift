import CLinux
import Glibc

/// Which pages of this process's private memory were ever touched, as the kernel's page tables know it.
///
/// Source: the kernel's Documentation/admin-guide/mm/pagemap.rst. With PAGEMAP_SCAN (Linux 6.7) a scan costs what was touched and
/// skips what was not; on older kernels every page of the range costs eight bytes of reading.
public final class PageMap: Sendable {
    private let file: Descriptor
    private let canScan: Bool

    public init() throws(SystemError) {
        file = try Descriptor.open("/proc/self/pagemap", O_RDONLY)
        var probe = gw_pm_scan_arg()
        probe.size = UInt64(MemoryLayout<gw_pm_scan_arg>.size)
        probe.return_mask = UInt64(GW_PAGE_IS_PRESENT)
        canScan = unsafe gw_pagemap_scan(file.number, &probe) >= 0
    }

    /// Ranges of touched memory inside a range of a mapping, in order, at most `limit` of them; offsets and counts in bytes.
    ///
    /// Pages that were only read (the kernel's common zero page) are not touched; pages swapped out are.
    /// - Returns: the ranges, and up to where the search came.
    public func touched(
        in mapping: Mapping, _ range: Range<Int>, limit: Int = 512
    ) throws(SystemError)
        -> (ranges: [Range<Int>], searchedTo: Int)
    {
        mapping.check(range.lowerBound, range.count)
        guard !range.isEmpty else { return ([], range.upperBound) }
        return canScan ? try scan(mapping, range, limit) : try read(mapping, range, limit)
    }

    private func scan(_ mapping: Mapping, _ range: Range<Int>, _ limit: Int) throws(SystemError) -> ([Range<Int>], Int)
    {
        let base = UInt64(mapping.hostAddress(at: 0))
        var regions = [gw_page_region](repeating: gw_page_region(), count: limit)
        var request = gw_pm_scan_arg()
        request.size = UInt64(MemoryLayout<gw_pm_scan_arg>.size)
        request.start = base + UInt64(range.lowerBound)
        request.end = base + UInt64(range.upperBound)
        request.vec_len = UInt64(limit)
        request.category_anyof_mask = UInt64(GW_PAGE_IS_PRESENT | GW_PAGE_IS_SWAPPED)
        request.category_mask = UInt64(GW_PAGE_IS_PFNZERO)
        request.category_inverted = UInt64(GW_PAGE_IS_PFNZERO)
        // Only this bit is reported, and it is never set: so neighbours always join.
        request.return_mask = UInt64(GW_PAGE_IS_PFNZERO)
        // SAFETY: the kernel writes at most `limit` regions into the array, for the time of the call.
        let count = unsafe regions.withUnsafeMutableBufferPointer { buffer in
            request.vec = UInt64(UInt(bitPattern: buffer.baseAddress!))
            return unsafe gw_pagemap_scan(file.number, &request)
        }
        try checked(count, "PAGEMAP_SCAN")
        let ranges = regions[..<Int(count)].map { Int($0.start - base)..<Int($0.end - base) }
        return (ranges, Int(request.walk_end - base))
    }

    private func read(_ mapping: Mapping, _ range: Range<Int>, _ limit: Int) throws(SystemError) -> ([Range<Int>], Int)
    {
        let pageBytes = 4096
        var ranges: [Range<Int>] = []
        var entries = [UInt64](repeating: 0, count: 8192)
        var position = range.lowerBound / pageBytes * pageBytes
        while position < range.upperBound {
            let count = min(entries.count, (range.upperBound - position + pageBytes - 1) / pageBytes)
            let place = (Int(mapping.hostAddress(at: 0)) + position) / pageBytes * 8
            let status = unsafe entries.withUnsafeMutableBytes {
                unsafe pread(file.number, $0.baseAddress!, count * 8, place)
            }
            guard status == count * 8 else { throw .last("read", file.name) }
            for entry in entries[..<count] {
                // Bit 63: present, bit 62: swapped.
                if entry >> 62 != 0 {
                    if let last = ranges.last, last.upperBound == position {
                        ranges[ranges.count - 1] = last.lowerBound..<position + pageBytes
                    } else {
                        if ranges.count == limit { return (ranges, position) }
                        ranges.append(position..<position + pageBytes)
                    }
                }
                position += pageBytes
            }
        }
        return (ranges, range.upperBound)
    }
}
