import MigrationStream
import Testing

/// One bad stream and what must be said about it.
struct BadStream: Sendable, CustomTestStringConvertible {
    let bytes: [UInt8]
    let cause: StreamError.Cause
    var testDescription: String { "\(cause)" }

    init(_ cause: StreamError.Cause, _ bytes: [UInt8]) {
        self.bytes = bytes
        self.cause = cause
    }

    /// After header and configuration.
    init(_ cause: StreamError.Cause, opened write: (inout StreamWriter) -> Void) {
        var writer = Sample.opening()
        write(&writer)
        self.init(cause, writer.bytes)
    }

    /// Inside a PART of the RAM section.
    init(_ cause: StreamError.Cause, records: [UInt8]) {
        self.init(cause, Sample.setup() + [2, 0, 0, 0, 2] + records)
    }

    /// As a page batch of block `ram`, agreed on.
    init(_ cause: StreamError.Cause, runs: [[UInt8]], count: UInt32? = nil, first: [UInt8] = be64(0x400)) {
        var writer = Sample.opening()
        writer.command(.begin(Sample.migration, .all))
        writer.ramSetup(id: 2, blocks: [Sample.low, Sample.high])
        let head = [2, 0, 0, 0, 2] + first + text("ram") + be32(count ?? UInt32(runs.count))
        self.init(cause, writer.bytes + head + runs.joined())
    }
}

func be32(_ value: UInt32) -> [UInt8] { (0..<4).map { UInt8(truncatingIfNeeded: value >> (24 - 8 * $0)) } }
func be64(_ value: UInt64) -> [UInt8] { be32(UInt32(value >> 32)) + be32(UInt32(truncatingIfNeeded: value)) }
func text(_ name: String) -> [UInt8] { [UInt8(name.utf8.count)] + Array(name.utf8) }
private func head(_ type: UInt8, _ id: UInt32, _ name: String, _ instance: UInt32, _ version: UInt32) -> [UInt8] {
    [type] + be32(id) + text(name) + be32(instance) + be32(version)
}
private func blockList(_ total: UInt64, _ blocks: [(String, UInt64)]) -> [UInt8] {
    Sample.opening().bytes + head(1, 2, "ram", 0, 4) + be64(total | 4) + blocks.flatMap { text($0.0) + be64($0.1) }
}
private func opened(_ bytes: [UInt8]) -> [UInt8] { Sample.opening().bytes + bytes }

private let frame: [BadStream] = [
    BadStream(.notAStream(0x4745_5420), Array("GET / HTTP/1.1".utf8)),
    BadStream(.streamVersion(2), be32(0x5145_564d) + be32(2)),
    BadStream(.misplacedConfiguration, opened([7, 0, 0, 0, 1, 65])),
    BadStream(
        .nameTooLong(what: "the machine", byteCount: 256, limit: 255), be64(0x5145_564d_0000_0003) + [7, 0, 0, 1, 0]),
    BadStream(.emptyName(what: "the machine"), be64(0x5145_564d_0000_0003) + [7, 0, 0, 0, 0]),
    BadStream(.nameNotText(what: "the machine"), be64(0x5145_564d_0000_0003) + [7, 0, 0, 0, 1, 0xff]),
    BadStream(.configurationSubsection(name: "configuration/x"), opened([5] + text("configuration/x") + be32(1))),
    BadStream(
        .configurationSubsectionVersion(name: "configuration/uuid", 9),
        opened([5] + text("configuration/uuid") + be32(9))),
    BadStream(
        .tooMany(what: "capabilities", count: 65, limit: 64),
        opened([5] + text("configuration/capabilities") + be32(1) + be32(65))),
    BadStream(.dataAfterEnd, opened([0, 9])),
    BadStream(.dataAfterEnd, opened([0, 6, 0, 0, 0, 1, 65, 66])),
    BadStream(.vmDescriptionTooLong(0xffff_ffff), opened([0, 6] + be32(0xffff_ffff))),
    BadStream(.truncated(inside: "its header"), [0x51]),
    BadStream(.truncated(inside: "page contents"), Sample.setup() + [2, 0, 0, 0, 2] + be64(8) + text("ram") + [1]),
]

private let sections: [BadStream] = [
    BadStream(.sectionType(0x55), opened([0x55])),
    BadStream(.sectionType(5), Sample.setup() + [5]),
    BadStream(.sectionType(6), opened([6])),
    BadStream(.unknownSection(name: "disk", instance: 1), opened(head(4, 9, "disk", 1, 1))),
    BadStream(.sectionVersion(name: "cpu", got: 8, known: 7), opened(head(4, 9, "cpu", 0, 8))),
    BadStream(.sectionInParts(name: "cpu"), opened(head(1, 9, "cpu", 0, 7))),
    BadStream(.sectionNotInParts(name: "ram"), opened(head(4, 9, "ram", 0, 4))),
    BadStream(.sectionVersion(name: "ram", got: 3, known: 4), opened(head(1, 9, "ram", 0, 3))),
    BadStream(.sectionInstance(name: "ram", 1), opened(head(1, 9, "ram", 1, 4))),
    BadStream(.repeatedSection(name: "ram"), Sample.setup() + head(1, 9, "ram", 0, 4)),
    BadStream(.repeatedSectionID(2, name: "cpu"), Sample.setup() + head(4, 2, "cpu", 0, 7)),
    BadStream(.unknownSectionID(77, type: .part), opened([2] + be32(77))),
    BadStream(
        .sectionAlreadyEnded(name: "ram"),
        Sample.setup() + [3] + be32(2) + be64(0x10) + [0x7e] + be32(2) + [2] + be32(2)),
    BadStream(.sectionNotEnded(name: "ram"), Sample.setup() + [0]),
    BadStream(
        .sectionTooLong(name: "cpu", byteCount: 0xffff_ffff, limit: 16 << 20),
        opened(head(4, 9, "cpu", 0, 7) + be32(0xffff_ffff))),
    BadStream(
        .subsection(section: "cpu", name: "cpu/fpu"),
        opened(head(4, 9, "cpu", 0, 7) + be32(1) + [0, 5] + text("cpu/fpu") + be32(1))),
    BadStream(.missingFooter(section: "cpu", got: 0), opened(head(4, 9, "cpu", 0, 7) + be32(1) + [0, 0])),
    BadStream(
        .missingFooter(section: "timer", got: 1), opened(head(4, 9, "timer", 0, 2) + [UInt8](repeating: 1, count: 40))),
    BadStream(
        .footerOfOther(section: "cpu", id: 9, got: 8), opened(head(4, 9, "cpu", 0, 7) + be32(0) + [0x7e] + be32(8))),
    BadStream(.missingFooter(section: "ram", got: 2), records: be64(0x10) + [2]),
    BadStream(.footerOfOther(section: "ram", id: 2, got: 3), records: be64(0x10) + [0x7e] + be32(3)),
    BadStream(.emptyName(what: "a section"), opened(head(4, 9, "", 0, 7))),
]

private let ram: [BadStream] = [
    BadStream(.blockListMissing(word: 0x10), opened(head(1, 2, "ram", 0, 4) + be64(0x10))),
    BadStream(.blockListMissing(word: 4), opened(head(1, 2, "ram", 0, 4) + be64(4))),
    BadStream(.unknownBlock(name: "vga"), blockList(4096, [("vga", 4096)])),
    BadStream(.blockLength(name: "ram", got: 4096, expected: 65536), blockList(4096, [("ram", 4096)])),
    BadStream(.blockLengthInvalid(name: "ram", 4097), blockList(65536, [("ram", 4097)])),
    BadStream(.blockLengthInvalid(name: "ram", 0), blockList(65536, [("ram", 0)])),
    BadStream(.blockLengthInvalid(name: "ram", 1 << 63), blockList(65536, [("ram", 1 << 63)])),
    BadStream(.repeatedBlock(name: "ram"), blockList(131072, [("ram", 65536), ("ram", 65536)])),
    BadStream(.totalLength(announced: 32768, listed: 65536), blockList(32768, [("ram", 65536)])),
    BadStream(.missingBlocks(["high"]), blockList(65536, [("ram", 65536)])),
    BadStream(.noBlockNamed(offset: 0x3000), records: be64(0x3028)),
    BadStream(.unknownBlock(name: "vga"), records: be64(0x08) + text("vga")),
    BadStream(.pageOutside(block: "ram", offset: 0x10000, length: 0x10000), records: be64(0x10008) + text("ram")),
    BadStream(.pageOutside(block: "high", offset: 0x8000, length: 0x8000), records: be64(0x8002) + text("high") + [0]),
    BadStream(.pageOutside(block: "ram", offset: ~0xfff, length: 0x10000), records: be64(~0xfff | 8) + text("ram")),
    BadStream(.zeroPageFill(block: "ram", offset: 0, 7), records: be64(2) + text("ram") + [7]),
    BadStream(.deltaKind(block: "ram", offset: 0x1000, 2), records: be64(0x1040) + text("ram") + [2, 0, 1]),
    BadStream(.deltaLength(block: "ram", offset: 0, 0), records: be64(0x40) + text("ram") + [1, 0, 0]),
    BadStream(.deltaLength(block: "ram", offset: 0, 4097), records: be64(0x40) + text("ram") + [1, 0x10, 1]),
    BadStream(
        .pageOutside(block: "high", offset: 0x8000, length: 0x8000), records: be64(0x8040) + text("high") + [1, 0, 1]),
    BadStream(.noBlockNamed(offset: 0x3000), records: be64(0x3060) + [1, 0, 1]),
    BadStream(.unsupportedRecord("RDMA", offset: 0), records: be64(0x80)),
    BadStream(.unknownFlags(0x200, offset: 0x1000), records: be64(0x1200)),
    BadStream(.unknownFlags(0x220, offset: 0), records: be64(0x220)),
    BadStream(.unsupportedRecord("a page of an abandoned format", offset: 0), records: be64(0x100)),
    BadStream(.unknownFlags(0x0a, offset: 0x2000), records: be64(0x200a)),
    BadStream(.unknownFlags(0, offset: 0), records: be64(0)),
    BadStream(.batchNotAgreed, records: be64(0x400) + text("ram")),
    BadStream(.batchOffset(0x1000), runs: [], first: be64(0x1400)),
    BadStream(.batchRuns(block: "ram", 0), runs: []),
    BadStream(.batchRuns(block: "ram", 513), runs: [], count: 513),
    BadStream(.batchRunKind(block: "ram", offset: 0x1000, 3), runs: [be64(0x1003) + be32(1)]),
    BadStream(.batchRunKind(block: "ram", offset: 0x1000, 0), runs: [be64(0x1000) + be32(1)]),
    BadStream(.batchRunKind(block: "ram", offset: 0x1000, 0x101), runs: [be64(0x1101) + be32(1)]),
    BadStream(.batchRunEmpty(block: "ram", offset: 0), runs: [be64(1) + be32(0)]),
    BadStream(
        .batchRunOutside(block: "ram", offset: 0xf000, pages: 2, length: 0x10000), runs: [be64(0xf001) + be32(2)]),
    BadStream(
        .batchRunOutside(block: "ram", offset: 0x1000, pages: .max, length: 0x10000),
        runs: [be64(0x1002) + be32(.max)]),
    BadStream(
        .batchTooLong(block: "ram", byteCount: 65 * 65536),
        runs: [[UInt8]](repeating: be64(1) + be32(16), count: 65)),
]

private let commands: [BadStream] = [
    BadStream(.unknownCommand(0), opened([8, 0, 0, 0, 0])),
    BadStream(.unknownCommand(0x7777), opened([8, 0x77, 0x77, 0, 0])),
    BadStream(.unsupportedCommand("POSTCOPY_ADVISE"), opened([8, 0, 3, 0, 0])),
    BadStream(.unsupportedCommand("PACKAGED"), opened([8, 0, 7, 0, 4, 0, 0, 0, 9])),
    BadStream(.commandLength("PING", got: 3), opened([8, 0, 2, 0, 3, 0, 0, 0])),
    BadStream(.commandLength("COMMIT", got: 1), opened([8, 0x47, 3, 0, 1, 0])),
    BadStream(.commandLength("CANCEL", got: 1025), opened([8, 0x47, 5, 4, 1])),
    BadStream(.reasonNotText("CANCEL"), opened([8, 0x47, 5, 0, 1, 0xff])),
]

@Suite("Bad streams")
struct StreamErrorTests {
    @Test(
        "each bad stream gives its own error, in one piece and byte by byte",
        arguments: frame + sections + ram + commands)
    func rejected(bad: BadStream) {
        #expect { try decode(bad.bytes) } throws: { ($0 as? StreamError)?.cause == bad.cause }
        #expect { try decode(bad.bytes) { 1 } } throws: { ($0 as? StreamError)?.cause == bad.cause }
    }

    @Test("an error names the byte, the object and the cause in one sentence")
    func sentence() {
        let bytes = Sample.setup() + [2, 0, 0, 0, 2] + be64(0x10008) + text("ram")
        #expect {
            try decode(bytes)
        } throws: { error in
            "\(error)"
                == "migration stream, byte \(Sample.setup().count + 5): a page at offset 0x10000 is outside RAM block 'ram' "
                + "of 0x10000 bytes"
        }
        for bad in frame + sections + ram + commands {
            let sentence = StreamError(bad.cause, position: 1).description
            #expect(sentence.count > 35 && !sentence.contains("invalid"), "\(sentence)")
        }
    }

    @Test("the first error is final")
    func final() {
        var decoder = Sample.decoder
        var buffer = ReceiveBuffer()
        buffer.append(Array("garbage!".utf8))
        let first = #expect(throws: StreamError.self) { try decoder.next(from: &buffer) }
        buffer.append(Sample.setup())
        let second = #expect(throws: StreamError.self) { try decoder.next(from: &buffer) }
        #expect(first == second)
    }

    @Test(
        "each bad return path message gives its own error",
        arguments: [
            ([0, 0, 0, 0], .unknownMessage(0)), ([0x47, 9, 0, 0], .unknownMessage(0x4709)),
            ([0, 4, 0, 12], .unsupportedMessage("REQ_PAGES")), ([0, 1, 0, 3], .messageLength("SHUT", got: 3)),
            ([0x47, 4, 4, 1], .messageLength("FAILURE", got: 1025)),
            ([0x47, 4, 0, 1, 0xfe], .reasonNotText("FAILURE")),
            ([0x47, 5, 0, 1, 4], .unknownVerdict(4)), ([0x47, 5, 0, 1, 0], .unknownVerdict(0)),
        ] as [([UInt8], StreamError.Cause)])
    func returnPath(bytes: [UInt8], cause: StreamError.Cause) {
        var decoder = ReturnPathDecoder()
        var buffer = ReceiveBuffer()
        buffer.append(bytes + [UInt8](repeating: 0, count: 20))
        #expect { try decoder.next(from: &buffer) } throws: { ($0 as? StreamError)?.cause == cause }
    }

    @Test("a peer's words come without what would steer a terminal")
    func words() throws {
        var writer = StreamWriter()
        writer.message(.failure(reason: "no\u{1b}[2J\u{9b}1m\n\u{7f}memory: ü"))
        var decoder = ReturnPathDecoder()
        var buffer = ReceiveBuffer()
        buffer.append(writer.bytes)
        let clean = "no\u{fffd}[2J\u{fffd}1m\u{fffd}\u{fffd}memory: ü"
        #expect(try decoder.next(from: &buffer) == .failure(reason: clean))
    }
}
