public import Host

/// What stands behind guest RAM.
public enum RAMBacking: String, Sendable, CaseIterable {
    /// Private memory, with transparent huge pages. The default: the first touch costs a sixth of that of a memory file, because
    /// kernels come with huge pages for shared memory turned off (`shmem_enabled` is `never`).
    case anonymous
    /// A memfd: memory with a descriptor, which another process can be given.
    case memfd
}

/// One block of guest RAM. The migration stream names it; guest-physical ranges show parts of it.
public final class RAMBlock: Sendable {
    /// The name by which both sides of a migration know the block, 1 to 255 bytes.
    public let name: String
    public let byteCount: UInt64
    public let mapping: Mapping
    /// `nil` for anonymous memory.
    public let file: MemoryFile?
    private let pageMap: PageMap

    /// Allocates a block of holes. - Throws: `SystemError` when the host has no address space or descriptor left.
    public init(name: String, byteCount: UInt64, backing: RAMBacking = .anonymous) throws(SystemError) {
        precondition(byteCount > 0 && byteCount % GuestPage.byteCount == 0, "whole pages")
        self.name = name
        self.byteCount = byteCount
        pageMap = try PageMap()
        switch backing {
        case .anonymous:
            file = nil
            mapping = try Mapping(anonymousByteCount: Int(byteCount))
            // Only where all of it could be backed: a guest that touches a page here and there costs 2 MiB for each.
            if byteCount <= HostMemory.byteCount { try? mapping.advise(.hugePages) }
        case .memfd:
            let file = try MemoryFile(name: "godwit-\(name)", byteCount: byteCount)
            self.file = file
            mapping = try Mapping(file.descriptor, byteCount: Int(byteCount))
        }
        try mapping.advise(.dontDump)
    }

    public var pageCount: UInt64 { byteCount >> GuestPage.shift }

    /// All pages of the block.
    public var pages: Range<PageIndex> { PageIndex(0)..<PageIndex(pageCount) }

    /// The runs of allocated pages inside a range, in order; never-touched pages are in none.
    ///
    /// Costs what was touched, and nothing for what is outside the range.
    public func allocatedRuns(in pages: Range<PageIndex>) throws(SystemError) -> [Range<PageIndex>] {
        guard file == nil else { return try runsOfFile(in: pages) }
        var runs: [Range<PageIndex>] = []
        var position = Int(pages.lowerBound.offset.value)
        let end = Int(pages.upperBound.offset.value)
        while position < end {
            let found = try pageMap.touched(in: mapping, position..<end)
            for range in found.ranges {
                let run = RAMOffset(UInt64(range.lowerBound)).page..<RAMOffset(UInt64(range.upperBound)).page
                if let last = runs.last, last.upperBound == run.lowerBound {
                    runs[runs.count - 1] = last.lowerBound..<run.upperBound
                } else {
                    runs.append(run)
                }
            }
            guard found.searchedTo > position else { break }
            position = found.searchedTo
        }
        return runs
    }

    /// Whether anything inside a range is allocated.
    public func isAllocated(in pages: Range<PageIndex>) throws(SystemError) -> Bool {
        guard let file else {
            let range = Int(pages.lowerBound.offset.value)..<Int(pages.upperBound.offset.value)
            return try !pageMap.touched(in: mapping, range, limit: 1).ranges.isEmpty
        }
        guard let start = try file.nextData(from: pages.lowerBound.offset.value) else { return false }
        return start < pages.upperBound.offset.value
    }

    private func runsOfFile(in pages: Range<PageIndex>) throws(SystemError) -> [Range<PageIndex>] {
        var runs: [Range<PageIndex>] = []
        var position = pages.lowerBound.offset.value
        let end = pages.upperBound.offset.value
        while position < end, let start = try file?.nextData(from: position), start < end {
            position = start
            while position < end {
                position += UInt64(try mapping.residentPrefix(at: Int(position), count: Int(end - position)))
                // What is not resident may be swapped out: then it is no hole.
                guard position < end, try file?.nextData(from: position) == position else { break }
                position += GuestPage.byteCount
            }
            position = min(position, end)
            runs.append(RAMOffset(start).page..<RAMOffset(position).page)
        }
        return runs
    }

    /// Copies bytes out; holes read as zeroes and stay holes.
    @unsafe public func copy(at offset: Int, into buffer: UnsafeMutableRawBufferPointer) throws(SystemError) {
        if let file { return try unsafe file.read(at: UInt64(offset), into: buffer) }
        // Reading private memory maps the kernel's zero page and allocates nothing.
        unsafe mapping.withBytes(at: offset, count: buffer.count) { unsafe buffer.copyMemory(from: $0) }
    }

    /// Bytes of the block; holes read as zeroes and stay holes.
    public func read(at offset: Int, count: Int) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        // SAFETY: the buffer is the array's own storage.
        let failed = unsafe bytes.withUnsafeMutableBytes { (try? unsafe copy(at: offset, into: $0)) == nil }
        // A memory file that cannot be read as a file can be read as memory: that only allocates.
        return failed ? mapping.read(at: offset, count: count) : bytes
    }
}
