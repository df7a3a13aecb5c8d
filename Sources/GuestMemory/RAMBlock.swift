import Glibc
public import Host
import Synchronization

/// What stands behind guest RAM.
public enum RAMBacking: String, Sendable, CaseIterable {
    /// Private memory, with transparent huge pages. The default: the first touch costs a sixth of that of a memory file, because
    /// kernels come with huge pages for shared memory turned off (`shmem_enabled` is `never`).
    case anonymous
    /// A memfd: memory with a descriptor, which another process can be given.
    case memfd
    /// A memfd of the host's huge pages, which must be reserved there (`nr_hugepages`, or `nr_overcommit_hugepages`).
    case hugetlb2M = "hugetlb=2M"
    case hugetlb1G = "hugetlb=1G"

    /// Those for which nothing has to be reserved.
    public static let unreserved: [RAMBacking] = [.anonymous, .memfd]

    /// Bytes of a page of it; RAM is a multiple.
    public var pageBytes: UInt64 {
        switch self {
        case .anonymous, .memfd: GuestPage.byteCount
        case .hugetlb2M: 2 << 20
        case .hugetlb1G: 1 << 30
        }
    }
}

/// Pages of a block that are on their way to it: who touches one waits until it is there (postcopy).
public protocol AwaitedPages: Sendable {
    /// Runs of such pages inside a range. Those that arrive meanwhile, or that page tables did not show for a moment, may be among them.
    func awaitedRuns(in pages: Range<PageIndex>) -> [Range<PageIndex>]
}

/// One block of guest RAM. The migration stream names it; guest-physical ranges show parts of it.
public final class RAMBlock: Sendable {
    /// The name by which both sides of a migration know the block, 1 to 255 bytes.
    public let name: String
    public let byteCount: UInt64
    public let mapping: Mapping
    /// `nil` for anonymous memory.
    public let file: MemoryFile?
    /// Bytes of a page of what stands behind it.
    public let pageBytes: UInt64
    let pageMap: PageMap
    /// Pages that show a file until they are written, in order: allocated, whether or not somebody touched them.
    private let shown = Mutex<[Range<PageIndex>]>([])
    private let awaited = Mutex<(any AwaitedPages)?>(nil)
    private let isForsaken = Atomic<Bool>(false)
    /// The kernel is asked to back it with transparent huge pages.
    public let wantsHugePages: Bool

    /// Allocates a block of holes. - Throws: `SystemError` when the host has no address space or descriptor left.
    public init(name: String, byteCount: UInt64, backing: RAMBacking = .anonymous) throws(SystemError) {
        precondition(byteCount > 0 && byteCount % GuestPage.byteCount == 0, "whole pages")
        self.name = name
        self.byteCount = byteCount
        pageBytes = backing.pageBytes
        pageMap = try PageMap()
        switch backing {
        case .anonymous:
            file = nil
            mapping = try Mapping(anonymousByteCount: Int(byteCount))
            // Only where all of it could be backed: a guest that touches a page here and there costs 2 MiB for each.
            wantsHugePages = byteCount <= HostMemory.byteCount
            if wantsHugePages { try? mapping.advise(.hugePages) }
        case .memfd:
            wantsHugePages = false
            let file = try MemoryFile(name: "godwit-\(name)", byteCount: byteCount)
            self.file = file
            mapping = try Mapping(file.descriptor, byteCount: Int(byteCount))
        case .hugetlb2M, .hugetlb1G:
            wantsHugePages = false
            let (file, mapping) = try Self.hugetlb(name, byteCount, backing)
            (self.file, self.mapping) = (file, mapping)
        }
        try mapping.advise(.dontDump)
    }

    public var pageCount: UInt64 { byteCount >> GuestPage.shift }

    /// The file knows what was never touched. One of huge pages does not: there page tables are asked, as of private memory.
    private var tellsHoles: Bool { file != nil && pageBytes == GuestPage.byteCount }

    /// KVM shows it through windows of its own, which can be exchanged page by page.
    public var hasWindows: Bool { file != nil && pageBytes == GuestPage.byteCount }

    /// All pages of the block.
    public var pages: Range<PageIndex> { PageIndex(0)..<PageIndex(pageCount) }

    /// The runs of allocated pages inside a range, in order; never-touched pages are in none.
    ///
    /// Costs what was touched, and nothing for what is outside the range. Awaited pages are allocated: their contents exist elsewhere.
    public func allocatedRuns(in pages: Range<PageIndex>) throws(SystemError) -> [Range<PageIndex>] {
        guard let awaited = awaited.withLock({ $0 }) else { return try runsHere(in: pages) }
        // Asked before: a page that arrives meanwhile is in one of both; and behind: one may have been away just now.
        let coming = awaited.awaitedRuns(in: pages)
        let here = try runsHere(in: pages)
        return Self.union(coming + awaited.awaitedRuns(in: pages), here)
    }

    private func runsHere(in pages: Range<PageIndex>) throws(SystemError) -> [Range<PageIndex>] {
        guard !tellsHoles else { return try runsOfFile(in: pages) }
        let touched = try touchedRuns(in: pages)
        let shown = shown.withLock { $0 }
        return shown.isEmpty
            ? touched : Self.union(touched, shown.filter { $0.overlaps(pages) }.map { $0.clamped(to: pages) })
    }

    /// Two lists of runs in order as one.
    private static func union(_ first: [Range<PageIndex>], _ second: [Range<PageIndex>]) -> [Range<PageIndex>] {
        var all: [Range<PageIndex>] = []
        for run in (first + second).sorted(by: { $0.lowerBound < $1.lowerBound }) {
            if let last = all.last, last.upperBound >= run.lowerBound {
                all[all.count - 1] = last.lowerBound..<max(last.upperBound, run.upperBound)
            } else {
                all.append(run)
            }
        }
        return all
    }

    /// A range that large is worth more than one thread: each touched page costs 2 to 16 ns.
    private static let scanPiecePages: UInt64 = (256 << 20) >> 12
    private static let fewestPieces = 4

    private func touchedRuns(in pages: Range<PageIndex>) throws(SystemError) -> [Range<PageIndex>] {
        let count = pages.upperBound.value - pages.lowerBound.value
        let pieces = Int((count + Self.scanPiecePages - 1) / Self.scanPiecePages)
        guard pieces >= Self.fewestPieces else { return try touchedRuns(inPiece: pages) }
        let results = Mutex<[Result<[Range<PageIndex>], SystemError>]>(Array(repeating: .success([]), count: pieces))
        HostThread.forEach(in: pieces, atLeast: Self.fewestPieces / 2) { [self] index in
            let start = pages.lowerBound.value + UInt64(index) * Self.scanPiecePages
            let end = min(start + Self.scanPiecePages, pages.upperBound.value)
            do throws(SystemError) {
                let runs = try touchedRuns(inPiece: PageIndex(start)..<PageIndex(end))
                if !runs.isEmpty { results.withLock { $0[index] = .success(runs) } }
            } catch { results.withLock { $0[index] = .failure(error) } }
        }
        var all: [Range<PageIndex>] = []
        for result in results.withLock({ $0 }) {
            for run in try result.get() { Self.join(run, to: &all) }
        }
        return all
    }

    private static func join(_ run: Range<PageIndex>, to runs: inout [Range<PageIndex>]) {
        if let last = runs.last, last.upperBound == run.lowerBound {
            runs[runs.count - 1] = last.lowerBound..<run.upperBound
        } else {
            runs.append(run)
        }
    }

    private func touchedRuns(inPiece pages: Range<PageIndex>) throws(SystemError) -> [Range<PageIndex>] {
        let range = Int(pages.lowerBound.offset.value)..<Int(pages.upperBound.offset.value)
        return try pageMap.allTouched(in: mapping, range).map {
            RAMOffset(UInt64($0.lowerBound)).page..<RAMOffset(UInt64($0.upperBound)).page
        }
    }

    /// Whether anything inside a range is allocated.
    public func isAllocated(in pages: Range<PageIndex>) throws(SystemError) -> Bool {
        let awaited = awaited.withLock { $0 }
        if awaited?.awaitedRuns(in: pages).isEmpty == false { return true }
        if try isHere(in: pages) { return true }
        return awaited?.awaitedRuns(in: pages).isEmpty == false
    }

    private func isHere(in pages: Range<PageIndex>) throws(SystemError) -> Bool {
        guard let file, tellsHoles else {
            if shown.withLock({ $0.contains { $0.overlaps(pages) } }) { return true }
            let range = Int(pages.lowerBound.offset.value)..<Int(pages.upperBound.offset.value)
            return try !pageMap.touched(in: mapping, range, limit: 1).ranges.isEmpty
        }
        guard let start = try file.nextData(from: pages.lowerBound.offset.value) else { return false }
        return start < pages.upperBound.offset.value
    }

    /// Whether `show` is possible: private memory alone can show what is in a file without changing it.
    public var canShowFiles: Bool { file == nil }

    /// Shows runs of pages, given in order, as they stand in a file whose page 0 is at `fileOffset`. They are read when they are first
    /// touched, and what is written to them stays in memory. - Throws: `SystemError`; runs shown before it remain so.
    public func show(_ runs: [Range<PageIndex>], of source: Descriptor, at fileOffset: UInt64) throws(SystemError) {
        precondition(canShowFiles, "private memory")
        for run in runs {
            let (start, end) = (run.lowerBound.offset.value, run.upperBound.offset.value)
            try mapping.show(source, fileOffset: fileOffset + start, at: Int(start), count: Int(end - start))
            shown.withLock { $0.append(run) }
        }
    }

    // MARK: Pages that come later

    /// From now on these pages are on their way; `nil`: all are here.
    public func expect(_ pages: (any AwaitedPages)?) { awaited.withLock { $0 = pages } }

    /// Awaited pages will never come, and are about to read as zeroes: whoever reads from here on, or waits now, is told.
    public func forsake() { isForsaken.store(true, ordering: .sequentiallyConsistent) }

    /// Call behind a look at memory. - Throws: `SystemError`: it may have seen zeroes in the place of pages that never came.
    public func checkIsKept() throws(SystemError) {
        guard isForsaken.load(ordering: .sequentiallyConsistent) else { return }
        throw SystemError(
            "read", "RAM block '\(name)'", code: EIO,
            remedy: "pages of it were waited for, and do not come any more")
    }

    /// Gives a range back to the host: it is a hole, and its contents are gone. - Throws: `SystemError`.
    public func discard(_ pages: Range<PageIndex>) throws(SystemError) {
        let (start, end) = (Int(pages.lowerBound.offset.value), Int(pages.upperBound.offset.value))
        try mapping.advise(file == nil ? .forget : .forgetShared, at: start, count: end - start)
    }

    /// Gives all memory back to the host: the block is a hole, and its contents are gone. - Throws: `SystemError`.
    public func release() throws(SystemError) { try mapping.advise(file == nil ? .forget : .forgetShared) }

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

    /// Copies bytes out; holes read as zeroes and stay holes, and awaited pages are waited for.
    /// - Throws: `SystemError`, also when they turned out never to come.
    @unsafe public func copy(at offset: Int, into buffer: UnsafeMutableRawBufferPointer) throws(SystemError) {
        try checkIsKept()
        // A file knows nothing of pages on their way.
        if let file, awaited.withLock({ $0 }) == nil { return try unsafe file.read(at: UInt64(offset), into: buffer) }
        // Reading private memory maps the kernel's zero page and allocates nothing.
        unsafe mapping.withBytes(at: offset, count: buffer.count) { unsafe buffer.copyMemory(from: $0) }
        try checkIsKept()
    }

    /// Bytes of the block; holes read as zeroes and stay holes, and awaited pages are waited for.
    public func read(at offset: Int, count: Int) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        // SAFETY: the buffer is the array's own storage.
        let failed = unsafe bytes.withUnsafeMutableBytes { (try? unsafe copy(at: offset, into: $0)) == nil }
        // A memory file that cannot be read as a file can be read as memory: that only allocates.
        return failed ? mapping.read(at: offset, count: count) : bytes
    }
}
