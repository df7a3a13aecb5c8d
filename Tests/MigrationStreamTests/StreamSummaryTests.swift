import MigrationStream
import Testing

@Suite("Stream summary")
struct StreamSummaryTests {
    @Test("a summary counts pages per block, rounds, device bytes and commands")
    func counts() throws {
        let sample = Sample.everything()
        var summary = StreamSummary(catalogue: Sample.catalogue)
        try summary.feed(sample.bytes)
        try summary.finish()
        #expect(summary.machine == "godwit")
        #expect(summary.isComplete)
        #expect(summary.byteCount == UInt64(sample.bytes.count))
        #expect(summary.blocks.map(\.dataPages) == [4, 1])
        #expect(summary.blocks.map(\.zeroPages) == [13, 1])
        #expect(summary.sections.map(\.name) == ["ram", "cpu", "globalstate"])
        #expect(summary.sections.map(\.rounds) == [2, 0, 0])
        #expect(summary.sections.map(\.bodyBytes).dropFirst() == [5, 104])
        #expect(summary.sections.allSatisfy { !$0.inferred && $0.ended })
        #expect(summary.commands.map(\.command).last == .commit)
        #expect(summary.commandCount == 10)
        #expect(summary.vmDescription?.contains("\"name\": \"cpu\", \"instance_id\": 3") == true)
        #expect(summary.text.contains("cpu"))
    }

    @Test("a section of unknown layout is measured by its footer, and marked")
    func inferred() throws {
        var writer = Sample.opening()
        // The body holds a byte that looks like a footer, and its own footer followed by nonsense.
        let body: [UInt8] = [1, 0x7e, 0, 0, 0x7e, 0, 0, 0, 9, 0xaa, 5]
        writer.sectionHead(.full, id: 9, name: "mystery", instance: 1, version: 12)
        var bytes = writer.take() + body
        writer.sectionFooter(id: 9)
        writer.deviceSection(Sample.state, id: 10, layout: .fixed(byteCount: 104))
        writer.endOfStream()
        bytes += writer.take()
        for piece in [1, 7, bytes.count] {
            var summary = StreamSummary()
            for start in stride(from: 0, to: bytes.count, by: piece) {
                try summary.feed(bytes[start..<min(bytes.count, start + piece)])
            }
            try summary.finish()
            #expect(summary.sections.map(\.name) == ["mystery", "globalstate"])
            #expect(summary.sections.map(\.bodyBytes) == [UInt64(body.count), 104])
            #expect(summary.sections.map(\.inferred) == [true, false])
            #expect(summary.isComplete)
        }
    }

    @Test("a name with control characters does not reach the terminal as it is")
    func controlCharacters() throws {
        var summary = StreamSummary()
        try summary.feed(Sample.opening(machine: "a\u{1b}[2Jb").bytes)
        #expect(summary.text.contains("a\u{fffd}[2Jb"))
        #expect(throws: StreamError.self) { try summary.finish() }
    }
}
