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

    // MARK: Few ranges

    private func scan(_ mapping: Mapping, _ range: Range<Int>, _ limit: Int) throws(SystemError) -> ([Range<Int>], Int)
    {
        var regions = [gw_page_region](repeating: gw_page_region(), count: limit)
        let (count, searchedTo) = try scan(mapping, range, for: .touched, .max, &regions)
        return (regions[..<count].map { $0.range(in: mapping) }, searchedTo)
    }

    // MARK: All of them

    /// All ranges of touched memory inside a range of a mapping, in order, none joined with the next; offsets and counts in bytes.
    ///
    /// What a scan costs are the pages it reports, not those it passes over. So where memory was touched throughout, it is asked for the
    /// pages that were not, and where next to nothing was, for those that were.
    public func allTouched(in mapping: Mapping, _ range: Range<Int>) throws(SystemError) -> [Range<Int>] {
        mapping.check(range.lowerBound, range.count)
        var found = TouchedRanges()
        var position = range.lowerBound
        var regions = [gw_page_region](repeating: gw_page_region(), count: Self.regionsAtOnce)
        var sought = Sought.touched
        while position < range.upperBound {
            let rest = position..<range.upperBound
            let searchedTo: Int
            if canScan {
                let count: Int
                (count, searchedTo) = try scan(mapping, rest, for: sought, sought.pagesAtOnce, &regions)
                let ranges = regions[..<count].lazy
                switch sought {
                case .touched, .huge: for region in ranges { found.append(region.range(in: mapping)) }
                case .untouched:
                    let holes = ranges.filter { $0.categories & UInt64(GW_PAGE_IS_SWAPPED) == 0 }
                    found.append(position..<searchedTo, without: holes.map { $0.range(in: mapping) })
                }
                let reported = ranges.reduce(0) { $0 + Int($1.end - $1.start) }
                sought = sought.next(
                    passed: searchedTo - position, reported: reported, lastRun: found.all.last?.count ?? 0)
            } else {
                let part = try read(mapping, rest, Self.regionsAtOnce)
                for range in part.0 { found.append(range) }
                searchedTo = part.1
            }
            guard searchedTo > position else { throw SystemError("search", file.name, code: EIO) }
            position = searchedTo
        }
        return found.all
    }

    private static let regionsAtOnce = 512

    /// The pages that a scan reports.
    private enum Sought {
        case touched
        /// Among them those that were swapped out, with that category.
        case untouched
        /// Those of huge pages.
        case huge

        /// After so many pages it is decided anew.
        var pagesAtOnce: Int { self == .untouched ? 64 : 512 }

        /// - Parameters: bytes, and those of the last touched run that is known.
        func next(passed: Int, reported: Int, lastRun: Int) -> Sought {
            switch self {
            case .huge: .huge
            case .touched: lastRun >= 256 * 4096 ? .untouched : .touched
            // A call costs as much as some pages.
            case .untouched: passed - reported >= 2 * reported ? .untouched : .touched
            }
        }
    }

    private struct TouchedRanges {
        var all: [Range<Int>] = []

        mutating func append(_ range: Range<Int>) {
            guard !range.isEmpty else { return }
            if let last = all.last, last.upperBound == range.lowerBound {
                all[all.count - 1] = last.lowerBound..<range.upperBound
            } else {
                all.append(range)
            }
        }

        mutating func append(_ range: Range<Int>, without holes: some Sequence<Range<Int>>) {
            var start = range.lowerBound
            for hole in holes {
                append(start..<hole.lowerBound)
                start = hole.upperBound
            }
            append(start..<range.upperBound)
        }
    }

    /// - Returns: how many regions there are now, and up to where the search came.
    private func scan(
        _ mapping: Mapping, _ range: Range<Int>, for sought: Sought, _ pages: Int, _ regions: inout [gw_page_region]
    ) throws(SystemError) -> (Int, Int) {
        let base = UInt64(mapping.hostAddress(at: 0))
        var request = gw_pm_scan_arg()
        request.size = UInt64(MemoryLayout<gw_pm_scan_arg>.size)
        request.start = base + UInt64(range.lowerBound)
        request.end = base + UInt64(range.upperBound)
        request.vec_len = UInt64(regions.count)
        request.max_pages = UInt64(pages)
        switch sought {
        case .touched:
            request.category_anyof_mask = UInt64(GW_PAGE_IS_PRESENT | GW_PAGE_IS_SWAPPED)
            request.category_mask = UInt64(GW_PAGE_IS_PFNZERO)
            request.category_inverted = UInt64(GW_PAGE_IS_PFNZERO)
            // Only this bit is reported, and it is never set: so neighbours always join.
            request.return_mask = UInt64(GW_PAGE_IS_PFNZERO)
        case .untouched:
            request.category_anyof_mask = UInt64(GW_PAGE_IS_PRESENT | GW_PAGE_IS_PFNZERO)
            request.category_inverted = UInt64(GW_PAGE_IS_PRESENT)
            request.return_mask = UInt64(GW_PAGE_IS_SWAPPED)
        case .huge:
            request.category_mask = UInt64(GW_PAGE_IS_HUGE | GW_PAGE_IS_PRESENT)
            request.return_mask = UInt64(GW_PAGE_IS_HUGE)
        }
        // SAFETY: the kernel writes at most as many regions as the array has, for the time of the call.
        let count = unsafe regions.withUnsafeMutableBufferPointer { buffer in
            request.vec = UInt64(UInt(bitPattern: buffer.baseAddress!))
            return unsafe gw_pagemap_scan(file.number, &request)
        }
        try checked(count, "PAGEMAP_SCAN")
        return (Int(count), Int(request.walk_end - base))
    }

    /// Bytes of a mapping, or a part of it, that huge pages stand behind, transparent ones and hugetlb's.
    /// - Returns: `nil` where the kernel has no PAGEMAP_SCAN.
    public func hugeBytes(in mapping: Mapping, _ part: Range<Int>? = nil) throws(SystemError) -> Int? {
        guard canScan else { return nil }
        let range = part ?? 0..<mapping.byteCount
        var regions = [gw_page_region](repeating: gw_page_region(), count: Self.regionsAtOnce)
        var (position, bytes) = (range.lowerBound, 0)
        while position < range.upperBound {
            let (count, searchedTo) = try scan(mapping, position..<range.upperBound, for: .huge, .max, &regions)
            bytes += regions[..<count].reduce(0) { $0 + Int($1.end - $1.start) }
            guard searchedTo > position else { throw SystemError("search", file.name, code: EIO) }
            position = searchedTo
        }
        return bytes
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

extension gw_page_region {
    fileprivate func range(in mapping: Mapping) -> Range<Int> {
        let base = UInt64(mapping.hostAddress(at: 0))
        return Int(start - base)..<Int(end - base)
    }
}
