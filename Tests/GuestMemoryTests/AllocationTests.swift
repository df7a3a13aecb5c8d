import GuestMemory
import Host
import TestSupport
import Testing

@Suite struct AllocationTests {
    private func pages(_ range: Range<UInt64>) -> Range<PageIndex> {
        PageIndex(range.lowerBound)..<PageIndex(range.upperBound)
    }

    private func memory(_ pageCount: UInt64, _ backing: RAMBacking) throws -> GuestMemory {
        let block = try RAMBlock(name: "ram", byteCount: pageCount * 4096, backing: backing)
        return GuestMemory(
            blocks: [block],
            view: FlatView([
                FlatRange(
                    guestAddress: GuestPhysicalAddress(0), byteCount: block.byteCount, block: block,
                    offset: RAMOffset(0))
            ]))
    }

    @Test("runs are cut to the range asked about; a page at either end of the block is seen")
    func edges() throws {
        // A memory file: there a touched page is one page, whatever the host's huge pages.
        let block = try RAMBlock(name: "ram", byteCount: 64 * 4096, backing: .memfd)
        for page in [0, 1, 2, 30, 31, 63] { block.mapping.store(UInt8(1), at: page * 4096 + 4095) }
        #expect(try block.allocatedRuns(in: block.pages) == [pages(0..<3), pages(30..<32), pages(63..<64)])
        #expect(try block.allocatedRuns(in: pages(1..<31)) == [pages(1..<3), pages(30..<31)])
        #expect(try block.allocatedRuns(in: pages(3..<30)).isEmpty)
        #expect(try block.allocatedRuns(in: pages(5..<5)).isEmpty)
        #expect(try block.isAllocated(in: pages(63..<64)))
        #expect(try !block.isAllocated(in: pages(32..<63)))
        #expect(try !block.isAllocated(in: pages(64..<64)))
    }

    @Test("a large block is searched in pieces, and runs across their borders stay whole")
    func pieces() throws {
        // Larger than this host's memory: no huge pages.
        let host = HostMemory.byteCount / 4096
        let block = try RAMBlock(name: "ram", byteCount: (host + (1 << 20)) * 4096)
        let piece: UInt64 = 65_536
        let runs = [
            0..<1, piece - 3..<piece + 2, 5 * piece..<5 * piece + 1, 7 * piece - 1..<7 * piece,
            block.pageCount - 1..<block.pageCount,
        ].map(pages)
        for run in runs { for page in run { block.mapping.store(UInt8(1), at: Int(page.offset.value)) } }
        #expect(try block.allocatedRuns(in: block.pages) == runs)
        let part = pages(piece - 2..<5 * piece + 1)
        #expect(try block.allocatedRuns(in: part) == [pages(piece - 2..<piece + 2), runs[2]])
    }

    @Test("memory taken beforehand has no holes left, on both kinds of memory", arguments: RAMBacking.unreserved)
    func preallocated(backing: RAMBacking) throws {
        // Not a multiple of what a thread takes at a time.
        let block = try RAMBlock(name: "ram", byteCount: (130 << 20) + 4096, backing: backing)
        #expect(try !block.isAllocated(in: block.pages))
        try block.mapping.populate()
        #expect(try block.allocatedRuns(in: block.pages) == [block.pages])
    }

    @Test("more memory than the host has to give is refused before any of it is taken")
    func preallocatedTooMuch() throws {
        let block = try RAMBlock(name: "ram", byteCount: HostMemory.byteCount + (1 << 30))
        #expect { try block.mapping.populate() } throws: { "\($0)".hasPrefix("preallocate \(block.byteCount) bytes") }
        #expect(try !block.isAllocated(in: block.pages))
    }

    @Test("random touches are found as they are, on both kinds of memory", arguments: RAMBacking.unreserved)
    func model(backing: RAMBacking) throws {
        var random = SeededRandom(seed: 9)
        // More than there is host memory: such a block has no huge pages, so that touched pages are single ones.
        let block = try RAMBlock(name: "ram", byteCount: 4 << 40, backing: backing)
        var touched: Set<UInt64> = []
        for _ in 0..<60 {
            let page = random.next() % block.pageCount
            for near in page..<min(page + 1 + random.next() % 3, block.pageCount) {
                block.mapping.store(UInt8(0), at: Int(near * 4096))
                touched.insert(near)
            }
        }
        // Looking at memory is no touch.
        for _ in 0..<20 {
            #expect(block.read(at: Int(random.next() % block.byteCount / 4096 * 4096), count: 8).count == 8)
        }
        var found: Set<UInt64> = []
        for run in try block.allocatedRuns(in: block.pages) {
            found.formUnion(run.lowerBound.value..<run.upperBound.value)
        }
        #expect(found == touched)
    }

    @Test(
        "memory touched throughout is found as it is, with holes of all sizes in it and pages that were only read",
        arguments: [3, 8, 21] as [UInt64])
    func dense(seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        // Larger than this host's memory: no huge pages.
        let block = try RAMBlock(name: "ram", byteCount: HostMemory.byteCount + (1 << 30))
        var runs: [Range<PageIndex>] = []
        var page = random.next() % 3
        for _ in 0..<300 {
            let touched = random.next() % 4 == 0 ? 256 + random.next() % 600 : 1 + random.next() % 4
            let hole = random.next() % 8 == 0 ? 60 + random.next() % 100_000 : 1 + random.next() % 4
            for touched in page..<page + touched { block.mapping.store(UInt8(0), at: Int(touched * 4096)) }
            runs.append(pages(page..<page + touched))
            page += touched
            if random.next() % 3 == 0 { #expect(block.read(at: Int(page * 4096), count: 8).count == 8) }
            page += hole
        }
        #expect(try block.allocatedRuns(in: block.pages) == runs, "seed \(seed)")
        // From inside a run to inside another.
        let (first, last) = (runs[20].lowerBound, runs[280].upperBound.advanced(by: -1))
        let part = runs[20...280].map { $0.clamped(to: first.advanced(by: 1)..<last) }.filter { !$0.isEmpty }
        #expect(try block.allocatedRuns(in: first.advanced(by: 1)..<last) == part, "seed \(seed)")
    }

    @Test("making memory zero clears what was there and leaves holes holes", arguments: RAMBacking.unreserved)
    func zero(backing: RAMBacking) throws {
        let memory = try memory(4 << 28, backing)
        let block = memory.blocks[0]
        try memory.write([UInt8](repeating: 7, count: 3 * 4096), at: GuestPhysicalAddress(100 * 4096))
        let before = try block.allocatedRuns(in: block.pages)
        // From inside one page to inside the last, then a range of holes, then nothing.
        try memory.zero(at: GuestPhysicalAddress(100 * 4096 + 10), byteCount: 3 * 4096 - 20)
        try memory.zero(at: GuestPhysicalAddress(1 << 40), byteCount: 1 << 30)
        try memory.zero(at: GuestPhysicalAddress(0), byteCount: 0)
        #expect(try block.allocatedRuns(in: block.pages) == before)
        let bytes = try memory.read(at: GuestPhysicalAddress(100 * 4096), count: 3 * 4096)
        #expect(bytes.prefix(10).allSatisfy { $0 == 7 } && bytes.suffix(10).allSatisfy { $0 == 7 })
        #expect(bytes.dropFirst(10).dropLast(10).allSatisfy { $0 == 0 })
        #expect(throws: GuestMemory.AccessError.self) {
            try memory.zero(at: GuestPhysicalAddress(block.byteCount - 4096), byteCount: 8192)
        }
    }

    @Test("what the monitor writes is recorded by page while recording is on, and told once")
    func hostWrites() throws {
        let memory = try memory(64, .memfd)
        let block = memory.blocks[0]
        let bitmap = try DirtyBitmap(pageCount: 64)
        try memory.write([1], at: GuestPhysicalAddress(0))
        memory.hostWrites.collect(memory.blocks, into: [bitmap])
        #expect(bitmap.isEmpty)
        memory.hostWrites.setRecording(true)
        try memory.write([1, 2], at: GuestPhysicalAddress(2 * 4096 - 1))
        try memory.zero(at: GuestPhysicalAddress(10 * 4096), byteCount: 4096)
        memory.hostWrites.record(block, offset: 63 * 4096, count: 4096)
        memory.hostWrites.record(block, offset: 20 * 4096, count: 0)
        memory.hostWrites.collect(memory.blocks, into: [bitmap])
        for page in 0..<UInt64(64) {
            #expect(bitmap.contains(PageIndex(page)) == [1, 2, 10, 63].contains(page), "page \(page)")
        }
        bitmap.clear(pages(0..<64))
        memory.hostWrites.collect(memory.blocks, into: [bitmap])
        #expect(bitmap.isEmpty)
        memory.hostWrites.record(block, offset: 0, count: 1)
        memory.hostWrites.setRecording(false)
        memory.hostWrites.collect(memory.blocks, into: [bitmap])
        #expect(bitmap.isEmpty)
    }

    @Test("words of a range, merged into another bitmap, mark the same pages", arguments: [4, 5] as [UInt64])
    func words(seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        for size in [1, 63, 64, 65, 4096 * 64 + 1] as [UInt64] {
            let one = try DirtyBitmap(pageCount: size)
            for _ in 0..<50 {
                let start = random.next() % size
                one.set(pages(start..<min(size, start + 1 + random.next() % 200)))
            }
            let first = random.next() % ((size + 63) / 64) * 64
            let other = try DirtyBitmap(pageCount: size)
            unsafe one.withWords(of: pages(first..<size)) { unsafe other.merge($0, at: PageIndex(first)) }
            for page in 0..<min(size, 5000) {
                #expect(other.contains(PageIndex(page)) == (page >= first && one.contains(PageIndex(page))))
            }
            one.clear(pages(0..<first))
            #expect(one.count == other.count, "seed \(seed), size \(size)")
        }
    }
}
