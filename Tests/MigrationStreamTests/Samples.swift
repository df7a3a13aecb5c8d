import MigrationStream

enum Sample {
    static let low = RAMBlockDescription(name: "ram", length: 16 * 4096)
    static let high = RAMBlockDescription(name: "high", length: 8 * 4096)
    static let migration = MigrationIdentifier(high: 0x0102_0304_0506_0708, low: 0x1112_1314_1516_1718)
    static let cpu = DeviceSection(name: "cpu", instance: 3, version: 7, body: [1, 2, 3, 4, 5])
    static let state = GlobalState(runState: "running").section

    static var catalogue: SectionCatalogue {
        var catalogue = SectionCatalogue()
        catalogue.add("cpu", version: 7)
        return catalogue
    }

    static var decoder: StreamDecoder { StreamDecoder(.load(blocks: [low, high], catalogue: catalogue)) }

    static func page(_ byte: UInt8) -> [UInt8] { [UInt8](repeating: byte, count: Wire.pageSize) }

    /// Header, configuration and RAM's START section.
    static func opening(machine: String = "godwit") -> StreamWriter {
        var writer = StreamWriter()
        writer.header()
        writer.configuration(machine: machine)
        return writer
    }

    static func setup() -> [UInt8] {
        var writer = opening()
        writer.ramSetup(id: 2, blocks: [low, high])
        return writer.bytes
    }

    /// A stream with one of everything, and the items it must decode to.
    static func everything() -> (bytes: [UInt8], items: [StreamItem]) {
        var writer = StreamWriter()
        writer.header()
        writer.configuration(
            machine: "godwit",
            subsections: [.targetPageBits(12), .capabilities(["a", "bc"]), .uuid(migration)])
        let commands: [ForwardCommand] = [
            .openReturnPath, .ping(Wire.godwitPing), .begin(migration, .all), .switchoverStart,
            .retract(attempt: 0x0102_0304), .commitWithin(attempt: 3, nanoseconds: .max), .root(0x0102_0304_0506_0708),
            .digests(DigestRange(level: .pages, block: 1, first: 1 << 40, count: 2), [1, .max]),
        ]
        for command in commands { writer.command(command) }
        writer.ramSetup(id: 2, blocks: [low, high])
        writer.ramRound(final: false, id: 2)
        var bytes = writer.take()
        var records = RAMRecordEncoder(blocks: [low, high])
        records.page(block: 0, offset: 0, into: &bytes)
        bytes += page(1)
        records.zeroPage(block: 0, offset: 4096, into: &bytes)
        records.zeroPage(block: 1, offset: 7 * 4096, into: &bytes)
        records.page(block: 1, offset: 0, into: &bytes)
        bytes += page(2)
        let runs = [
            PageRun(kind: .data, offset: 0, pages: 2), PageRun(kind: .zero, offset: 4 * 4096, pages: 12),
            PageRun(kind: .data, offset: 3 * 4096, pages: 1),
        ]
        records.batch(block: 0, runs: runs, into: &bytes)
        bytes += page(3) + page(4) + page(5)
        records.pageDelta(block: 0, offset: 0x2000, byteCount: 3, into: &bytes)
        bytes += [9, 1, 0xaa]
        writer.ramSectionEnd(id: 2)
        writer.ramRound(final: true, id: 2)
        writer.ramSectionEnd(id: 2)
        writer.deviceSection(cpu, id: 4, layout: .lengthPrefixed())
        writer.deviceSection(state, id: 5, layout: .fixed(byteCount: GlobalState.byteCount))
        writer.command(.prepare)
        writer.command(.commit)
        writer.endOfStream()
        let json = VMDescription.json(for: [
            (cpu, .lengthPrefixed()), (state, .fixed(byteCount: GlobalState.byteCount)),
        ])
        writer.vmDescription(json)
        bytes += writer.take()
        let items: [StreamItem] =
            [
                .header, .configuration(machine: "godwit"), .configurationSubsection(.targetPageBits(12)),
                .configurationSubsection(.capabilities(["a", "bc"])), .configurationSubsection(.uuid(migration)),
            ] + commands.map { .command($0) } + [
                .ramSetup([low, high]), .ramSectionEnded(.start),
                .ramRound(final: false), .page(block: 0, offset: 0), .zeroPage(block: 0, offset: 4096),
                .zeroPage(block: 1, offset: 7 * 4096), .page(block: 1, offset: 0), .pageBatch(block: 0, runs: runs),
                .pageDelta(block: 0, offset: 0x2000, byteCount: 3),
                .ramSectionEnded(.part), .ramRound(final: true), .ramSectionEnded(.end),
                .device(
                    SectionHead(type: .full, id: 4, name: "cpu", instance: 3, version: 7), body: cpu.body),
                .device(
                    SectionHead(type: .full, id: 5, name: "globalstate", instance: 0, version: 1), body: state.body),
                .command(.prepare), .command(.commit), .endOfStream, .vmDescription(byteCount: json.utf8.count),
            ]
        return (bytes, items)
    }
}

/// Decodes all of `bytes`, fed in pieces of the sizes that `pieces` returns.
func decode(
    _ bytes: [UInt8], with decoder: StreamDecoder = Sample.decoder, pieces: () -> Int = { Int.max }
) throws(StreamError) -> [StreamItem] {
    var decoder = decoder
    var buffer = ReceiveBuffer()
    var items: [StreamItem] = []
    var fed = 0
    while fed < bytes.count {
        let end = fed + min(bytes.count - fed, max(1, pieces()))
        buffer.append(bytes[fed..<end])
        fed = end
        while true {
            if decoder.payloadBytes > 0 {
                let taken = min(decoder.payloadBytes, buffer.count)
                buffer.consume(taken)
                decoder.payloadConsumed(taken)
                if decoder.payloadBytes > 0 { break }
            }
            guard let item = try decoder.next(from: &buffer) else { break }
            items.append(item)
        }
    }
    try decoder.checkEnd(buffer)
    return items
}
