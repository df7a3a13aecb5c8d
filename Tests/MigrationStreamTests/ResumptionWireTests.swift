import MigrationStream
import Testing

@Suite("RESUME and RESUMED on the wire")
struct ResumptionWireTests {
    @Test("RESUME survives the wire byte by byte, and is laid out as the wire file says")
    func resume() throws {
        var writer = Sample.opening()
        let before = writer.bytes.count
        writer.command(.resume(Sample.migration, FeatureSet(rawValue: 0x8000_0000_0000_0001)))
        let expected: [UInt8] =
            [8, 0x47, 0x20, 0, 24] + be64(Sample.migration.high) + be64(Sample.migration.low) + be64(1 << 63 | 1)
        #expect(Array(writer.bytes[before...]) == expected)
        writer.endOfStream()
        let items = try decode(writer.bytes, pieces: { 1 })
        #expect(items.contains(.command(.resume(Sample.migration, FeatureSet(rawValue: 1 << 63 | 1)))))
    }

    @Test("RESUME of another length is an error that names it", arguments: [0, 16, 23, 25, 1024, 65535])
    func resumeLength(length: Int) {
        let bytes = Sample.opening().bytes + [8, 0x47, 0x20, UInt8(length >> 8), UInt8(length & 255)]
        #expect {
            try decode(bytes + [UInt8](repeating: 0, count: length))
        } throws: {
            ($0 as? StreamError)?.cause == .commandLength("RESUME", got: length)
        }
    }

    @Test("RESUME that is cut off is incomplete, at every byte")
    func truncated() {
        var writer = Sample.opening()
        let before = writer.bytes.count
        writer.command(.resume(Sample.migration, .all))
        for length in (before + 1)..<writer.bytes.count {
            #expect(throws: StreamError.self, "\(length)") { try decode(Array(writer.bytes.prefix(length))) }
        }
    }

    @Test("the features of RESUME hold for what follows, as those of BEGIN do")
    func features() throws {
        for (features, isAllowed) in [(FeatureSet.all, true), ([.twoPhaseHandover, .resumption], false)] {
            var writer = Sample.opening()
            writer.command(.resume(Sample.migration, features))
            writer.ramSetup(id: 2, blocks: [Sample.low, Sample.high])
            writer.ramRound(final: false, id: 2)
            var bytes = writer.take()
            var records = RAMRecordEncoder(blocks: [Sample.low, Sample.high])
            records.batch(block: 0, runs: [PageRun(kind: .zero, offset: 0, pages: 2)], into: &bytes)
            writer.ramSectionEnd(id: 2)
            writer.ramRound(final: true, id: 2)
            writer.ramSectionEnd(id: 2)
            writer.endOfStream()
            bytes += writer.take()
            if isAllowed {
                #expect(try decode(bytes).contains { if case .pageBatch = $0 { true } else { false } })
            } else {
                #expect { try decode(bytes) } throws: { ($0 as? StreamError)?.cause == .batchNotAgreed }
            }
        }
        // With digests a page without one is refused behind RESUME, too.
        var writer = Sample.opening()
        writer.command(.resume(Sample.migration, FeatureSet.all.union(.verification)))
        writer.ramSetup(id: 2, blocks: [Sample.low, Sample.high])
        writer.ramRound(final: false, id: 2)
        var bytes = writer.take()
        var records = RAMRecordEncoder(blocks: [Sample.low, Sample.high])
        records.page(block: 0, offset: 4096, into: &bytes)
        #expect { try decode(bytes) } throws: { ($0 as? StreamError)?.cause == .pageWithoutDigest(offset: 4096) }
    }

    @Test("RESUMED is empty, and with a length an error that names it", arguments: [0, 1, 4, 1025])
    func resumed(length: Int) throws {
        var decoder = ReturnPathDecoder()
        var buffer = ReceiveBuffer()
        buffer.append([0x47, 0x20, UInt8(length >> 8), UInt8(length & 255)] + [UInt8](repeating: 0, count: length))
        if length == 0 {
            #expect(try decoder.next(from: &buffer) == .resumed)
            var writer = StreamWriter()
            writer.message(.resumed)
            #expect(writer.bytes == [0x47, 0x20, 0, 0])
        } else {
            #expect {
                try decoder.next(from: &buffer)
            } throws: {
                ($0 as? StreamError)?.cause == .messageLength("RESUMED", got: length)
            }
        }
    }

    @Test("marks count through 24 bits and over, and no other PONG is taken for one")
    func marks() {
        #expect(ResumptionMark(number: 5).pingValue == 0x4d00_0005)
        #expect(ResumptionMark(pong: 0x4d00_0005) == ResumptionMark(number: 5))
        #expect(ResumptionMark(number: 0xff_ffff).next == ResumptionMark(number: 0))
        for other in [0, 1, 2, 0x100, Wire.godwitPing, 0x4c00_0005, 0x4e00_0005, .max] as [UInt32] {
            #expect(ResumptionMark(pong: other) == nil, "\(other)")
        }
    }
}
