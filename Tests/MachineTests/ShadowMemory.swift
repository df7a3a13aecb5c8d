import Accelerator
import Glibc
import GuestMemory
import GuestPrograms
import Host
import Machine
import TestSupport

/// A copy of a machine's memory that is kept up by dirty tracking alone, as a migration's destination is.
@safe final class ShadowMemory {
    let machine: VirtualMachine
    let tracker: any DirtyTracker
    let bitmap: any DirtyPages
    let block: RAMBlock
    private(set) var reported: UInt64 = 0
    /// Every page that was ever reported.
    let everReported: DirtyBitmap
    /// Skips one range of the next copy, as a broken sender would.
    var losesOneRange = false
    private(set) var lost: Range<PageIndex>?

    private var source: RAMBlock { machine.memory.blocks[0] }
    /// What is watched afresh at a time, as migration has it.
    private static let chunkPages: UInt64 = 1 << 14

    init(of machine: VirtualMachine, client: DirtyClient = .migration) throws {
        self.machine = machine
        tracker = machine.accelerator!.dirtyTracker(for: client)
        let source = machine.memory.blocks[0]
        bitmap = try tracker.makePages()[0]
        everReported = try DirtyBitmap(pageCount: source.pageCount)
        block = try RAMBlock(name: "shadow", byteCount: source.byteCount, backing: .memfd)
    }

    /// - Returns: how many pages the tracker reports.
    @discardableResult
    func collect() throws -> UInt64 {
        try tracker.collect(into: [bitmap])
        reported += bitmap.count
        return bitmap.count
    }

    /// Copies what was collected: each chunk is watched afresh just before its pages are read.
    func copy() throws {
        var position = PageIndex(0)
        var watched: UInt64?
        while let run = bitmap.nextRun(from: position, limit: 512) {
            let chunk = run.lowerBound.value / Self.chunkPages
            if watched != chunk {
                let first = PageIndex(chunk * Self.chunkPages)
                let end = PageIndex(min((chunk + 1) * Self.chunkPages, bitmap.pageCount))
                try tracker.willSend(first..<end, of: 0, marked: bitmap)
                watched = chunk
            }
            let end = min(run.upperBound, PageIndex((chunk + 1) * Self.chunkPages))
            copy(run.lowerBound..<end)
            position = end
        }
    }

    private func copy(_ pages: Range<PageIndex>) {
        bitmap.clear(pages)
        everReported.set(pages)
        if losesOneRange {
            losesOneRange = false
            lost = pages
            return
        }
        let offset = Int(pages.lowerBound.offset.value)
        let count = Int(pages.upperBound.offset.value) - offset
        unsafe source.mapping.withBytes(at: offset, count: count) { from in
            unsafe block.mapping.withMutableBytes(at: offset, count: count) { unsafe $0.copyMemory(from: from) }
        }
    }

    /// One round of a migration.
    @discardableResult
    func round() throws -> UInt64 {
        let pages = try collect()
        try copy()
        return pages
    }

    /// The pages that differ from guest memory, holes read as zeroes. Call while the guest is stopped.
    func differences() throws -> [PageIndex] {
        var found: [PageIndex] = []
        for (one, other) in [(source, block), (block, source)] {
            try one.forEachAllocatedRun { pages in
                for page in pages where !isEqual(one, other, page) { found.append(page) }
            }
        }
        return found
    }

    private func isEqual(_ one: RAMBlock, _ other: RAMBlock, _ page: PageIndex) -> Bool {
        let offset = Int(page.offset.value)
        // A hole is not read through the mapping: that would allocate it.
        guard (try? other.isAllocated(in: page..<page.advanced(by: 1))) == true else {
            return one.mapping.isZero(at: offset, count: 4096)
        }
        return unsafe one.mapping.withBytes(at: offset, count: 4096) { left in
            unsafe other.mapping.withBytes(at: offset, count: 4096) { right in
                unsafe memcmp(left.baseAddress!, right.baseAddress!, 4096) == 0
            }
        }
    }

    /// What the checker of built-in guests says of the copy.
    func check() throws -> GuestCheck {
        let view = machine.memory.view.ranges.map {
            FlatRange(guestAddress: $0.guestAddress, byteCount: $0.byteCount, block: block, offset: $0.offset)
        }
        return try unsafe GuestChecker(read: GuestMemory(blocks: [block], view: FlatView(view)).guestReader).check()
    }

    /// Stops the guest, copies what is left, and ends the test unless the copy is guest memory.
    func finish(checks: Bool = true) throws {
        machine.pause()
        try round()
        let wrong = try differences()
        claim(wrong.isEmpty, "\(wrong.count) pages of the copy are not guest memory, the first is \(wrong.first!)")
        guard checks else { return }
        let check = try check()
        claim(check.isVerified, "the copy is \(check)")
    }
}

extension RAMBlock {
    func allocatedPages() throws -> UInt64 {
        try allocatedRuns(in: pages).reduce(0) { $0 + $1.upperBound.value - $1.lowerBound.value }
    }

    /// Pages that take memory, by the page tables: present (bit 63) or swapped (bit 62), the kernel's zero pages left out.
    ///
    /// Counted independently of `allocatedRuns`; costs eight bytes for every page there is.
    func pagesByPageTables() throws -> UInt64 {
        let map = try Descriptor.open("/proc/self/pagemap", O_RDONLY)
        let flags = try? Descriptor.open("/proc/kpageflags", O_RDONLY)
        var entries = [UInt64](repeating: 0, count: Int(pageCount))
        let place = Int(mapping.hostAddress(at: 0)) / 4096 * 8
        let count = unsafe entries.withUnsafeMutableBytes { unsafe pread(map.number, $0.baseAddress!, $0.count, place) }
        guard count == entries.count * 8 else { throw SystemError.last("read", "/proc/self/pagemap") }
        let isZeroPage: UInt64 = 1 << 24
        return UInt64(
            entries.count { entry in
                guard entry >> 62 != 0 else { return false }
                var word: UInt64 = 0
                guard entry >> 63 != 0, let flags else { return true }
                let offset = Int(entry & (1 << 55 - 1)) * 8
                let read = unsafe withUnsafeMutableBytes(of: &word) {
                    unsafe pread(flags.number, $0.baseAddress!, 8, offset)
                }
                return read != 8 || word & isZeroPage == 0
            })
    }
}
