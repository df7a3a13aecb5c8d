import MigrationStream
import Testing

@Suite("streams whose pages have places in a file (mapped-ram)")
struct MappedRAMTests {
    private static let ram = RAMBlockDescription(name: "ram", length: 16 * 4096)
    private static let high = RAMBlockDescription(name: "high", length: 65 * 4096)

    /// Worked out by hand from QEMU's docs/devel/migration/mapped-ram.rst.
    private static let opening: [UInt8] =
        be32(0x5145_564d) + be32(3) + [7] + be32(1) + Array("m".utf8) + [5] + text("configuration/capabilities")
        + be32(1)
        + be32(1) + text("mapped-ram")
    private static let head: [UInt8] = [1] + be32(2) + text("ram") + be32(0) + be32(4) + be64(0x10004) + text("ram")

    private static func header(
        version: UInt32 = 1, pageSize: UInt64 = 4096, bitmap: UInt64 = 126, pages: UInt64 = 1 << 20
    ) -> [UInt8] {
        be32(version) + be64(pageSize) + be64(bitmap) + be64(pages)
    }

    @Test("what is written is what the format says, to the byte")
    func bytes() {
        let setup = MappedRAMSetup(machine: "m", blocks: [Self.ram], ramSectionID: 2, at: 0)
        #expect(setup.opening == Self.opening && setup.opening.count == 61)
        #expect(setup.pieces[0].bytes == Self.head + be64(16 * 4096) + Self.header())
        #expect(setup.pieces[0].gap == 0x110000 - 126)
        #expect(setup.pieces[1].bytes == be64(0x10) + [0x7e] + be32(2) && setup.pieces[1].gap == 0)
        #expect(setup.regions == [MappedRegion(block: 0, length: 65536, bitmapOffset: 126, pagesOffset: 1 << 20)])
        #expect(setup.regions[0].bitmapBytes == 8)
    }

    @Test("what is written is read again, wherever the stream begins in its file", arguments: [0, 1, 4096, 5 << 30])
    func roundTrip(offset: UInt64) throws {
        let blocks = [Self.ram, Self.high]
        let setup = MappedRAMSetup(machine: "m", blocks: blocks, ramSectionID: 2, at: offset)
        #expect(setup.regions.allSatisfy { $0.pagesOffset % (1 << 20) == 0 && $0.bitmapOffset > offset })
        #expect(setup.regions[1].bitmapOffset > setup.regions[0].end && setup.regions[1].bitmapBytes == 16)
        var decoder = StreamDecoder(.load(blocks: blocks, catalogue: SectionCatalogue()))
        decoder.fileOffset = offset
        var buffer = ReceiveBuffer()
        buffer.append(setup.opening)
        var items: [StreamItem] = []
        for piece in setup.pieces {
            buffer.append(piece.bytes)
            while let item = try decoder.next(from: &buffer) {
                items.append(item)
                if case .mappedBlock = item {
                    #expect(decoder.payloadBytes == Int(piece.gap))
                    decoder.payloadConsumed(decoder.payloadBytes)
                }
            }
        }
        #expect(
            items == [
                .header, .configuration(machine: "m"), .configurationSubsection(.capabilities(["mapped-ram"])),
                .mappedBlock(setup.regions[0]), .mappedBlock(setup.regions[1]), .ramSetup(blocks),
                .ramSectionEnded(.start),
            ])
    }

    @Test("a summary counts the marks of each bitmap, and needs no page", arguments: [1, 4096, 10 << 20])
    func summary(piece: Int) throws {
        let blocks = [Self.ram, Self.high]
        let setup = MappedRAMSetup(machine: "m", blocks: blocks, ramSectionID: 2, at: 0)
        var bytes = setup.opening
        for (index, part) in setup.pieces.enumerated() {
            bytes += part.bytes
            guard part.gap > 0 else { continue }
            // Three marks in the first bitmap, ten in the second; what looks like marks behind it is pages.
            var place = [UInt8](repeating: 0xff, count: Int(part.gap))
            let marks: [UInt8] = index == 0 ? [7] : [0xff, 0, 0, 0, 0, 0, 0, 1, 1]
            let bitmap = Int(setup.regions[index].bitmapBytes)
            place.replaceSubrange(0..<bitmap, with: marks + [UInt8](repeating: 0, count: bitmap - marks.count))
            bytes += place
        }
        var writer = StreamWriter()
        writer.ramRound(final: true, id: 2)
        writer.ramSectionEnd(id: 2)
        writer.endOfStream()
        bytes += writer.bytes
        var summary = StreamSummary()
        var (start, skipped) = (0, 0)
        while start < bytes.count {
            let end = min(bytes.count, start + piece)
            try summary.feed(bytes[start..<end])
            let leap = Int(summary.skippableBytes)
            summary.skip(UInt64(leap))
            (start, skipped) = (end + leap, skipped + leap)
        }
        try summary.finish()
        #expect(summary.isComplete && summary.byteCount == UInt64(bytes.count))
        #expect(summary.blocks.map(\.markedPages) == [3, 10])
        #expect(summary.blocks.map(\.region) == setup.regions)
        #expect((skipped > 16 * 4096) == (piece < bytes.count))
        #expect(summary.text.contains("marked") && summary.text.contains("65536"))
    }

    @Test("a header cut off at any byte is waited for, and is no block")
    func cutOff() throws {
        let whole = Self.opening + Self.head + be64(16 * 4096) + Self.header()
        for count in 0..<whole.count {
            var decoder = StreamDecoder(.load(blocks: [Self.ram], catalogue: SectionCatalogue()))
            var buffer = ReceiveBuffer()
            buffer.append(whole[..<count])
            while let item = try decoder.next(from: &buffer) {
                if case .mappedBlock = item { Issue.record("a block out of \(count) bytes") }
            }
            #expect(throws: StreamError.self) { try decoder.checkEnd(buffer) }
        }
    }

    private static let hostile: [([UInt8], MappedRAMFault)] = [
        (header(version: 2), .version(2)), (header(version: 0), .version(0)),
        (header(pageSize: 0), .pageSize(0)), (header(pageSize: 65536), .pageSize(65536)),
        (header(bitmap: 125), .bitmapOffset(125)), (header(bitmap: 0), .bitmapOffset(0)),
        (header(bitmap: (1 << 20) - 7), .bitmapOffset((1 << 20) - 7)),
        (header(bitmap: 1 << 21), .bitmapOffset(1 << 21)), (header(bitmap: .max), .bitmapOffset(.max)),
        (header(pages: 0), .pagesOffset(0)), (header(pages: (1 << 20) + 1), .pagesOffset((1 << 20) + 1)),
        (header(pages: .max - 4095), .pagesOffset(.max - 4095)), (header(pages: 1 << 63), .pagesOffset(1 << 63)),
        (header(pages: (1 << 63) - 4096), .pagesOffset((1 << 63) - 4096)),
    ]

    @Test("a header that lies is refused by name", arguments: hostile.indices)
    func lies(index: Int) throws {
        let (header, fault) = Self.hostile[index]
        var decoder = StreamDecoder(.load(blocks: [Self.ram], catalogue: SectionCatalogue()))
        var buffer = ReceiveBuffer()
        buffer.append(Self.opening + Self.head + be64(16 * 4096) + header)
        let error = #expect(throws: StreamError.self) { while try decoder.next(from: &buffer) != nil {} }
        #expect(error?.cause == .mappedRAM(block: "ram", fault))
        #expect(error?.description.contains("RAM block 'ram'") == true)
    }

    @Test("a summary jumps over bitmap and pages")
    func summary() throws {
        let setup = MappedRAMSetup(machine: "m", blocks: [Self.ram, Self.high], ramSectionID: 2, at: 0)
        var bytes = setup.opening
        for piece in setup.pieces { bytes += piece.bytes + [UInt8](repeating: 0xee, count: Int(piece.gap)) }
        var writer = StreamWriter()
        writer.ramRound(final: true, id: 2)
        writer.ramSectionEnd(id: 2)
        writer.endOfStream()
        var summary = StreamSummary()
        try summary.feed(bytes + writer.bytes)
        try summary.finish()
        #expect(summary.isComplete && summary.blocks.map(\.name) == ["ram", "high"])
    }
}
