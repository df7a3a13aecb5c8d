import GuestMemory
import Host
import TestSupport
import Testing

@Suite struct DirtyBitmapTests {
    private func pages(_ range: Range<UInt64>) -> Range<PageIndex> {
        PageIndex(range.lowerBound)..<PageIndex(range.upperBound)
    }

    @Test("runs come back in order, joined, and at most as long as asked")
    func runs() throws {
        let bitmap = try DirtyBitmap(pageCount: 1000)
        bitmap.set(pages(60..<70))
        bitmap.set(pages(64..<130))
        bitmap.set(pages(999..<1000))
        #expect(bitmap.count == 71)
        #expect(bitmap.nextRun(from: PageIndex(0), limit: 512) == pages(60..<130))
        #expect(bitmap.nextRun(from: PageIndex(0), limit: 5) == pages(60..<65))
        #expect(bitmap.nextRun(from: PageIndex(100), limit: 512) == pages(100..<130))
        #expect(bitmap.nextRun(from: PageIndex(130), limit: 512) == pages(999..<1000))
        bitmap.clear(pages(60..<130))
        #expect(bitmap.nextRun(from: PageIndex(0), limit: 512) == pages(999..<1000))
        #expect(bitmap.count == 1)
    }

    @Test("random sets and clears agree with a set of integers", arguments: [1, 2, 3] as [UInt64])
    func model(seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        let size: UInt64 = 20_000
        let bitmap = try DirtyBitmap(pageCount: size)
        var model: Set<UInt64> = []
        for _ in 0..<400 {
            let start = random.next() % size
            let end = min(size, start + 1 + random.next() % 300)
            if random.next() % 3 == 0 {
                bitmap.clear(pages(start..<end))
                model.subtract(start..<end)
            } else {
                bitmap.set(pages(start..<end))
                model.formUnion(start..<end)
            }
            #expect(bitmap.count == UInt64(model.count), "seed \(seed)")
        }
        var found: Set<UInt64> = []
        var position = PageIndex(0)
        while let run = bitmap.nextRun(from: position, limit: 100) {
            found.formUnion(run.lowerBound.value..<run.upperBound.value)
            position = run.upperBound
        }
        #expect(found == model, "seed \(seed)")
    }

    @Test("a page above 8 TiB is marked and found without a cost in memory")
    func beyondEightTebibytes() throws {
        let pageCount = (UInt64(16) << 40) >> 12
        let bitmap = try DirtyBitmap(pageCount: pageCount)
        bitmap.set(pages(pageCount - 2..<pageCount - 1))
        #expect(bitmap.nextRun(from: PageIndex(0), limit: 8) == pages(pageCount - 2..<pageCount - 1))
        #expect(bitmap.contains(PageIndex(pageCount - 2)))
    }

    @Test("a report merged word by word does not mark pages past the end of the block")
    func mergeTail() throws {
        let bitmap = try DirtyBitmap(pageCount: 70)
        let report: [UInt64] = [1 << 63, ~0]
        unsafe report.withUnsafeBufferPointer { unsafe bitmap.merge($0, at: PageIndex(0)) }
        #expect(bitmap.count == 7)
        #expect(bitmap.nextRun(from: PageIndex(0), limit: 100) == pages(63..<70))
    }
}

@Suite struct GuestMemoryTests {
    private func memory() throws -> GuestMemory {
        let block = try RAMBlock(name: "ram", byteCount: 4 << 20)
        return GuestMemory(
            blocks: [block],
            view: FlatView([
                FlatRange(
                    guestAddress: GuestPhysicalAddress(0), byteCount: 1 << 20, block: block, offset: RAMOffset(0)),
                FlatRange(
                    guestAddress: GuestPhysicalAddress(1 << 32), byteCount: 3 << 20, block: block,
                    offset: RAMOffset(1 << 20)),
            ]))
    }

    @Test("memory above the hole is the block's continuation")
    func hole() throws {
        let memory = try memory()
        try memory.write([1, 2, 3, 4], at: GuestPhysicalAddress(1 << 32))
        #expect(memory.blocks[0].mapping.read(at: 1 << 20, count: 4) == [1, 2, 3, 4])
        #expect(try memory.read(at: GuestPhysicalAddress((1 << 32) + 2), count: 2) == [3, 4])
    }

    @Test("a write that leaves RAM changes nothing and says where RAM ends")
    func outside() throws {
        let memory = try memory()
        #expect(throws: GuestMemory.AccessError(address: GuestPhysicalAddress(1 << 20), byteCount: 2)) {
            try memory.write([1, 2, 3, 4], at: GuestPhysicalAddress((1 << 20) - 2))
        }
        #expect(memory.blocks[0].mapping.read(at: (1 << 20) - 2, count: 2) == [0, 0])
    }

    @Test("only touched pages of a huge block are allocated runs", arguments: RAMBacking.unreserved)
    func holes(backing: RAMBacking) throws {
        let block = try RAMBlock(name: "ram", byteCount: 512 << 30, backing: backing)
        block.mapping.store(UInt64(7), at: 300 << 30)
        let page = PageIndex((300 << 30) >> 12)
        #expect(try block.allocatedRuns(in: block.pages) == [page..<page.advanced(by: 1)])
        _ = block.mapping.load(at: 100 << 30, as: UInt64.self)
        if backing == .anonymous {
            #expect(try block.allocatedRuns(in: block.pages).count == 1, "reading touches nothing")
        }
        #expect(try block.allocatedRuns(in: page.advanced(by: 1)..<PageIndex(block.pageCount)).isEmpty)
    }
}
