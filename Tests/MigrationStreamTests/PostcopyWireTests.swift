import MigrationStream
import Testing

/// Postcopy's words, written by hand as QEMU lays them out, and what they decode to.
enum PostcopySample {
    static var decoder: StreamDecoder {
        var decoder = Sample.decoder
        decoder.allowsPostcopy = true
        return decoder
    }

    static let messages = ReturnPathDecoder(postcopyOf: [Sample.low, Sample.high])

    static let commands: [(PostcopyCommand, [UInt8])] = [
        (.advise(nil), [8, 0, 3, 0, 0]),
        (
            .advise(PostcopyAdvice(blockPageSizes: 0x4020_1000)),
            [8, 0, 3, 0, 16] + be64(0x4020_1000) + be64(4096)
        ),
        (
            .discard(
                RAMDiscard(
                    block: "high",
                    ranges: [
                        RAMDiscard.ByteRange(offset: 0, length: 0x8000),
                        RAMDiscard.ByteRange(offset: 0x7000, length: 0x1000),
                    ])),
            [8, 0, 6, 0, 39, 0, 4] + Array("high".utf8) + [0] + be64(0) + be64(0x8000) + be64(0x7000) + be64(0x1000)
        ),
        (.listen, [8, 0, 4, 0, 0]), (.run, [8, 0, 5, 0, 0]), (.resume, [8, 0, 9, 0, 0]),
        (.receiveBitmap(block: "ram"), [8, 0, 10, 0, 4, 3] + Array("ram".utf8)),
    ]

    /// Header, block list, and the section's end.
    static var opening: [UInt8] { Sample.setup() }

    static func package() -> [UInt8] {
        var writer = StreamWriter()
        writer.command(.postcopy(.listen))
        writer.deviceSection(Sample.cpu, id: 4, layout: .lengthPrefixed())
        writer.command(.ping(3))
        writer.command(.postcopy(.run))
        return writer.bytes
    }

    /// All that `decoder` finds in `bytes`, the payload left out, fed in pieces of that size.
    static func hear(
        _ bytes: [UInt8], with decoder: ReturnPathDecoder = messages, piece: Int = .max
    ) throws(StreamError) -> (messages: [ReturnPathMessage], payload: [UInt8]) {
        var (decoder, buffer, fed) = (decoder, ReceiveBuffer(), 0)
        var (messages, payload): ([ReturnPathMessage], [UInt8]) = ([], [])
        while fed < bytes.count {
            let end = fed + min(piece, bytes.count - fed)
            buffer.append(bytes[fed..<end])
            fed = end
            while true {
                while decoder.payloadBytes > 0, !buffer.isEmpty {
                    payload.append(buffer.bytes.unsafeFirstByte)
                    buffer.consume(1)
                    decoder.payloadConsumed(1)
                }
                guard decoder.payloadBytes == 0, let message = try decoder.next(from: &buffer) else { break }
                messages.append(message)
            }
        }
        return (messages, payload)
    }
}

extension RawSpan {
    var unsafeFirstByte: UInt8 { unsafe unsafeLoad(fromByteOffset: 0, as: UInt8.self) }
}

@Suite("Postcopy on the wire")
struct PostcopyWireTests {
    @Test("each command has QEMU's layout, and survives the wire byte by byte")
    func commands() throws {
        for (command, expected) in PostcopySample.commands {
            var writer = StreamWriter()
            writer.command(.postcopy(command))
            #expect(writer.bytes == expected, "\(command)")
            let stream = PostcopySample.opening + expected + [1]
            for piece in [1, Int.max] {
                var (decoder, buffer, items) = (PostcopySample.decoder, ReceiveBuffer(), [StreamItem]())
                for start in stride(from: 0, to: stream.count - 1, by: min(piece, stream.count)) {
                    buffer.append(stream[start..<min(stream.count - 1, start + min(piece, stream.count))])
                    while let item = try decoder.next(from: &buffer) { items.append(item) }
                }
                #expect(items.last == .command(.postcopy(command)))
                #expect(buffer.isEmpty)
            }
        }
    }

    @Test("a decoder that was not told of postcopy refuses every command of it by name")
    func refused() {
        for (command, bytes) in PostcopySample.commands {
            let cause = #expect(throws: StreamError.self) { try decode(PostcopySample.opening + bytes) }?.cause
            guard case .unsupportedCommand(let name) = cause else {
                Issue.record("\(command): \(String(describing: cause))")
                continue
            }
            #expect(!name.isEmpty)
        }
    }

    @Test("a package is payload of the stream, and its own decoder finds state and RUN in it")
    func package() throws {
        let package = PostcopySample.package()
        var writer = StreamWriter()
        writer.command(.postcopy(.packaged(byteCount: UInt32(package.count))))
        #expect(writer.bytes == [8, 0, 7, 0, 4, 0, 0, 0, UInt8(package.count)])
        var buffer = ReceiveBuffer()
        buffer.append(PostcopySample.opening + writer.bytes + package)
        var decoder = PostcopySample.decoder
        while decoder.payloadBytes == 0 { _ = try #require(try decoder.next(from: &buffer)) }
        #expect(decoder.payloadBytes == package.count)
        var inner = decoder.packageDecoder()
        var items: [StreamItem] = []
        while let item = try inner.next(from: &buffer) { items.append(item) }
        let head = SectionHead(type: .full, id: 4, name: "cpu", instance: 3, version: 7)
        #expect(
            items == [
                .command(.postcopy(.listen)), .device(head, body: Sample.cpu.body), .command(.ping(3)),
                .command(.postcopy(.run)),
            ])
        try inner.checkEnd(buffer)
        #expect(inner.position == decoder.position + UInt64(package.count))
        // The stream goes on behind it.
        decoder.payloadConsumed(package.count)
        writer = StreamWriter()
        writer.command(.ping(4))
        writer.ramRound(final: true, id: 2)
        writer.ramSectionEnd(id: 2)
        writer.endOfStream()
        buffer.append(writer.bytes)
        items = []
        while let item = try decoder.next(from: &buffer) { items.append(item) }
        #expect(items == [.command(.ping(4)), .ramRound(final: true), .ramSectionEnded(.end), .endOfStream])
        try decoder.checkEnd(buffer)
    }

    @Test("a channel for requested pages has records from its first byte, and EOS as its last word")
    func requestedPages() throws {
        var records = RAMRecordEncoder(blocks: [Sample.low, Sample.high])
        var bytes: [UInt8] = []
        records.page(block: 1, offset: 0x7000, into: &bytes)
        bytes += Sample.page(7)
        records.zeroPage(block: 1, offset: 0x1000, into: &bytes)
        records.page(block: 0, offset: 0, into: &bytes)
        bytes += Sample.page(8)
        let found: [StreamItem] = [
            .page(block: 1, offset: 0x7000), .zeroPage(block: 1, offset: 0x1000), .page(block: 0, offset: 0),
        ]
        let decoder = StreamDecoder.requestedPages(of: [Sample.low, Sample.high])
        for pieces in [{ 1 }, { Int.max }] as [() -> Int] {
            // QEMU since 8.0 just closes it.
            #expect(try decode(bytes, with: decoder, pieces: pieces) == found)
            #expect(try decode(bytes + be64(0x10), with: decoder, pieces: pieces) == found + [.ramRecordsEnded])
        }
        let behind = #expect(throws: StreamError.self) { try decode(be64(0x10) + [0], with: decoder) }
        #expect(behind?.cause == .dataAfterEnd)
        let cut = #expect(throws: StreamError.self) { try decode(bytes.dropLast(), with: decoder) }
        #expect(cut?.isTruncation == true)
    }

    @Test("batches come on a channel for requested pages only where they were agreed on")
    func requestedBatches() throws {
        var records = RAMRecordEncoder(blocks: [Sample.low])
        var bytes: [UInt8] = []
        let runs = [PageRun(kind: .data, offset: 0x1000, pages: 1), PageRun(kind: .zero, offset: 0x4000, pages: 2)]
        records.batch(block: 0, runs: runs, into: &bytes)
        bytes += Sample.page(1)
        let agreed = StreamDecoder.requestedPages(of: [Sample.low], batches: true)
        #expect(try decode(bytes, with: agreed) == [.pageBatch(block: 0, runs: runs)])
        let error = #expect(throws: StreamError.self) {
            try decode(bytes, with: StreamDecoder.requestedPages(of: [Sample.low]))
        }
        #expect(error?.cause == .batchNotAgreed)
    }

    @Test("behind a broken connection sections go on where they were, and records name their block again")
    func replacedConnection() throws {
        var decoder = PostcopySample.decoder
        var buffer = ReceiveBuffer()
        var records = RAMRecordEncoder(blocks: [Sample.low, Sample.high])
        var bytes = PostcopySample.opening + [2, 0, 0, 0, 2]
        records.page(block: 1, offset: 0, into: &bytes)
        buffer.append(bytes + [1, 2, 3])
        while decoder.payloadBytes == 0 { _ = try decoder.next(from: &buffer) }
        decoder.connectionReplaced()
        buffer = ReceiveBuffer()
        let command = PostcopyCommand.receiveBitmap(block: "high")
        var writer = StreamWriter()
        writer.command(.postcopy(command))
        writer.command(.postcopy(.resume))
        writer.ramRound(final: false, id: 2)
        buffer.append(writer.bytes)
        #expect(try decoder.next(from: &buffer) == .command(.postcopy(command)))
        #expect(try decoder.next(from: &buffer) == .command(.postcopy(.resume)))
        #expect(try decoder.next(from: &buffer) == .ramRound(final: false))
        buffer.append(be64(0x1000 | RAMFlags.page.rawValue | RAMFlags.sameBlock.rawValue))
        let error = #expect(throws: StreamError.self) { try decoder.next(from: &buffer) }
        #expect(error?.cause == .noBlockNamed(offset: 0x1000))
        // Also an error is no end of a migration that goes on elsewhere.
        decoder.connectionReplaced()
        buffer = ReceiveBuffer()
        buffer.append([8, 0, 9, 0, 0])
        #expect(try decoder.next(from: &buffer) == .command(.postcopy(.resume)))
    }

    @Test("requests are decoded with the block of the last one where they name none")
    func requests() throws {
        let named: [UInt8] = [0, 3, 0, 17] + be64(0x3000) + [0, 0, 0x20, 0, 4] + Array("high".utf8)
        let same: [UInt8] = [0, 4, 0, 12] + be64(0x7000) + [0, 0, 0x10, 0]
        let first = PageRequest(block: "high", offset: 0x3000, length: 0x2000)
        var writer = StreamWriter()
        writer.message(.postcopy(.requestPages(first)))
        #expect(writer.bytes == named)
        for piece in [1, 7, Int.max] {
            let heard = try PostcopySample.hear(named + same + [0, 6, 0, 4, 0, 0, 0, 1], piece: piece)
            #expect(
                heard.messages == [
                    .postcopy(.requestPages(first)),
                    .postcopy(.requestPages(PageRequest(block: "high", offset: 0x7000, length: 0x1000))),
                    .postcopy(.resumeAcknowledged),
                ])
        }
        writer = StreamWriter()
        writer.message(.postcopy(.resumeAcknowledged))
        #expect(writer.bytes == [0, 6, 0, 4, 0, 0, 0, 1])
    }

    @Test("a bitmap of received pages is payload, in whole words, and its mark stands behind it")
    func bitmap() throws {
        let big = RAMBlockDescription(name: "ram", length: 65 * 4096)
        #expect(ReceivedBitmap.byteCount(of: big) == 16)
        #expect(ReceivedBitmap.byteCount(of: Sample.low) == 8)
        let bits = (0..<16).map { UInt8($0) }
        let bytes: [UInt8] =
            [0, 5, 0, 4, 3] + Array("ram".utf8) + be64(16) + bits + be64(0x0123_4567_89ab_cdef) + [
                0, 2, 0, 4, 0, 0, 0, 9,
            ]
        var writer = StreamWriter()
        writer.message(.postcopy(.receivedBitmap(block: "ram", byteCount: 16)))
        writer.append(bits)
        writer.message(.postcopy(.bitmapEnded(block: "ram")))
        writer.message(.pong(9))
        #expect(writer.bytes == bytes)
        for piece in [1, 5, Int.max] {
            let heard = try PostcopySample.hear(bytes, with: ReturnPathDecoder(postcopyOf: [big]), piece: piece)
            #expect(
                heard.messages == [
                    .postcopy(.receivedBitmap(block: "ram", byteCount: 16)), .postcopy(.bitmapEnded(block: "ram")),
                    .pong(9),
                ])
            #expect(heard.payload == bits)
        }
    }

    @Test("a stream with postcopy can be described, the package like any other part of it")
    func summary() throws {
        var writer = StreamWriter()
        for (command, _) in PostcopySample.commands.prefix(3) { writer.command(.postcopy(command)) }
        let package = PostcopySample.package()
        writer.command(.postcopy(.packaged(byteCount: UInt32(package.count))))
        writer.append(package)
        writer.ramRound(final: true, id: 2)
        writer.ramSectionEnd(id: 2)
        writer.endOfStream()
        var summary = StreamSummary()
        try summary.feed(PostcopySample.opening + writer.bytes)
        try summary.finish()
        #expect(summary.isComplete)
        #expect(summary.sections.map(\.name) == ["ram", "cpu"])
        for words in [
            "POSTCOPY_ADVISE without RAM", "POSTCOPY_ADVISE pages of 0x40201000 bytes in units of 4096",
            "POSTCOPY_RAM_DISCARD 2 ranges of high", "PACKAGED \(package.count) bytes", "POSTCOPY_LISTEN",
            "POSTCOPY_RUN",
        ] {
            #expect(summary.text.contains(words), "\(words)")
        }
    }

    @Test("behind ADVISE a block of huge pages tells their size, and only there; one of another size is refused")
    func pageSizes() throws {
        let huge = RAMBlockDescription(name: "huge", length: 4 << 21, pageSize: 1 << 21)
        let blocks = [Sample.low, huge]
        func stream(advised: Bool, _ blocks: [RAMBlockDescription]) -> [UInt8] {
            var writer = Sample.opening()
            if advised { writer.command(.postcopy(.advise(PostcopyAdvice(blockPageSizes: 0x20_1000)))) }
            writer.ramSetup(id: 2, blocks: blocks, postcopyIsAdvised: advised)
            return writer.bytes
        }
        func setup(_ bytes: [UInt8], _ decoder: StreamDecoder, piece: Int) throws(StreamError) -> StreamItem? {
            var (decoder, buffer) = (decoder, ReceiveBuffer())
            decoder.allowsPostcopy = true
            for start in stride(from: 0, to: bytes.count, by: piece) {
                buffer.append(bytes[start..<min(start + piece, bytes.count)])
                while let item = try decoder.next(from: &buffer) { if case .ramSetup = item { return item } }
            }
            return nil
        }
        let loading = StreamDecoder(.load(blocks: blocks, catalogue: Sample.catalogue))
        let describing = StreamDecoder(.describe(catalogue: Sample.catalogue))
        let (plain, advised) = (stream(advised: false, blocks), stream(advised: true, blocks))
        #expect(advised.count == plain.count + 21 + 8)
        for piece in [1, 7, .max / 2] {
            #expect(try setup(advised, loading, piece: piece) == .ramSetup(blocks))
            #expect(try setup(advised, describing, piece: piece) == .ramSetup(blocks))
        }
        #expect(
            try setup(plain, describing, piece: 5) == .ramSetup(blocks.map { .init(name: $0.name, length: $0.length) }))
        // Two Godwits move pages one by one, whatever stands behind blocks.
        var begun = Sample.opening()
        begun.command(.begin(MigrationIdentifier(high: 1, low: 2), [.pageBatches, .twoPhaseHandover]))
        begun.command(.postcopy(.advise(PostcopyAdvice(blockPageSizes: 4096))))
        begun.ramSetup(id: 2, blocks: blocks.map(\.uniform), postcopyIsAdvised: true)
        #expect(try setup(begun.bytes, loading, piece: 3) == .ramSetup(blocks.map(\.uniform)))
        let other = stream(advised: true, [Sample.low, .init(name: "huge", length: huge.length, pageSize: 1 << 30)])
        let refusal = #expect(throws: StreamError.self) { try setup(other, loading, piece: 3) }
        #expect(
            refusal?.description.contains("'huge' has pages of 0x40000000 bytes") == true,
            "\(String(describing: refusal))")
    }
}
