import MigrationStream
import TestSupport
import Testing

private func discard(_ ranges: [UInt8], name: String = "ram", version: UInt8 = 0, terminator: UInt8 = 0) -> [UInt8] {
    let body = [version, UInt8(name.utf8.count)] + Array(name.utf8) + [terminator] + ranges
    return [8, 0, 6, UInt8(body.count >> 8), UInt8(body.count & 255)] + body
}

private func request(_ offset: UInt64, _ length: UInt32, name: String = "ram") -> [UInt8] {
    [0, 3, 0, UInt8(13 + name.utf8.count)] + be64(offset) + be64(UInt64(length)).suffix(4)
        + [UInt8(name.utf8.count)] + Array(name.utf8)
}

/// Sample.low is called "ram" and has 0x10000 bytes.
@Suite("Bad words of postcopy")
struct PostcopyErrorTests {
    @Test(
        "each bad command gives its own error",
        arguments: [
            (.commandLength("POSTCOPY_ADVISE", got: 15), [8, 0, 3, 0, 15]),
            (.commandLength("POSTCOPY_LISTEN", got: 1), [8, 0, 4, 0, 1]),
            (.commandLength("POSTCOPY_RUN", got: 65535), [8, 0, 5, 255, 255]),
            (.commandLength("POSTCOPY_RESUME", got: 4), [8, 0, 9, 0, 4]),
            (.commandLength("PACKAGED", got: 3), [8, 0, 7, 0, 3]),
            (.postcopy(.packageLength(0)), [8, 0, 7, 0, 4, 0, 0, 0, 0]),
            (.postcopy(.packageLength(.max)), [8, 0, 7, 0, 4, 255, 255, 255, 255]),
            (.postcopy(.packageLength(0x0400_0001)), [8, 0, 7, 0, 4, 4, 0, 0, 1]),
            (
                .postcopy(.advice(PostcopyAdvice(blockPageSizes: 4096, targetPageSize: 65536))),
                [8, 0, 3, 0, 16] + be64(4096) + be64(65536)
            ),
            (
                .postcopy(.advice(PostcopyAdvice(blockPageSizes: 4097))),
                [8, 0, 3, 0, 16] + be64(4097) + be64(4096)
            ),
            (.postcopy(.advice(PostcopyAdvice(blockPageSizes: 0))), [8, 0, 3, 0, 16] + be64(0) + be64(4096)),
            (.commandLength("RECV_BITMAP", got: 0), [8, 0, 10, 0, 0]),
            (.commandLength("RECV_BITMAP", got: 1), [8, 0, 10, 0, 1, 0]),
            (.commandLength("RECV_BITMAP", got: 4), [8, 0, 10, 0, 4, 200, 1, 2, 3]),
            (.unknownBlock(name: "rom"), [8, 0, 10, 0, 4, 3] + Array("rom".utf8)),
            (.nameNotText(what: "a RAM block"), [8, 0, 10, 0, 4, 3, 0xff, 0xfe, 0xfd]),
            (.unsupportedCommand("ENABLE_COLO"), [8, 0, 8, 0, 0]),
            (.commandLength("POSTCOPY_RAM_DISCARD", got: 0), [8, 0, 6, 0, 0]),
            (.commandLength("POSTCOPY_RAM_DISCARD", got: 19), [8, 0, 6, 0, 19]),
            (.commandLength("POSTCOPY_RAM_DISCARD", got: 21), discard(be64(0) + be64(0).dropLast())),
            (.commandLength("POSTCOPY_RAM_DISCARD", got: 23), discard(be64(0) + be64(0) + [0])),
            (.commandLength("POSTCOPY_RAM_DISCARD", got: 22), [8, 0, 6, 0, 22, 0, 200]),
            (.commandLength("POSTCOPY_RAM_DISCARD", got: 22), [8, 0, 6, 0, 22, 0, 0]),
            (.postcopy(.discardVersion(1)), discard(be64(0) + be64(4096), version: 1)),
            (.postcopy(.discardTerminator(block: "ram", 1)), discard(be64(0) + be64(4096), terminator: 1)),
            (.unknownBlock(name: "rom"), discard(be64(0) + be64(4096), name: "rom")),
            (.postcopy(.rangeEmpty(block: "ram", offset: 0x1000)), discard(be64(0x1000) + be64(0))),
            (.postcopy(.rangeUnaligned(block: "ram", offset: 1, length: 4096)), discard(be64(1) + be64(4096))),
            (.postcopy(.rangeUnaligned(block: "ram", offset: 0, length: 4095)), discard(be64(0) + be64(4095))),
            (
                .postcopy(.rangeOutside(block: "ram", offset: 0x10000, length: 4096, blockLength: 0x10000)),
                discard(be64(0x10000) + be64(4096))
            ),
            (
                .postcopy(.rangeOutside(block: "ram", offset: 0, length: 0x11000, blockLength: 0x10000)),
                discard(be64(0) + be64(0x11000))
            ),
            // A sum that wraps around.
            (
                .postcopy(.rangeOutside(block: "ram", offset: 0x1000, length: 0 &- 0x1000, blockLength: 0x10000)),
                discard(be64(0x1000) + be64(0 &- 0x1000))
            ),
            // A good range before a bad one is no excuse.
            (
                .postcopy(.rangeEmpty(block: "ram", offset: 0)),
                discard(be64(0) + be64(4096) + be64(0) + be64(0))
            ),
        ] as [(StreamError.Cause, [UInt8])])
    func commands(cause: StreamError.Cause, bytes: [UInt8]) {
        let padding = [UInt8](repeating: 0, count: 65536)
        for piece in [Int.max, 3] {
            let error = #expect(throws: StreamError.self) {
                try decode(PostcopySample.opening + bytes + padding, with: PostcopySample.decoder) { piece }
            }
            #expect(error?.cause == cause)
            #expect(error?.description.hasPrefix("migration stream, byte ") == true)
        }
    }

    @Test("a package holds device sections, LISTEN, PING and RUN, and nothing behind RUN")
    func package() throws {
        func outcome(_ bytes: [UInt8]) -> StreamError.Cause? {
            var outer = PostcopySample.decoder
            var buffer = ReceiveBuffer()
            var writer = StreamWriter()
            writer.command(.postcopy(.packaged(byteCount: UInt32(bytes.count))))
            buffer.append(PostcopySample.opening + writer.bytes + bytes)
            do throws(StreamError) {
                while outer.payloadBytes == 0 { _ = try outer.next(from: &buffer) }
                var inner = outer.packageDecoder()
                while try inner.next(from: &buffer) != nil {}
                try inner.checkEnd(buffer)
                return nil
            } catch { return error.cause }
        }
        let good = PostcopySample.package()
        #expect(outcome(good) == nil)
        #expect(outcome(good + [0]) == .dataAfterEnd)
        for length in 1..<good.count {
            guard case .truncated = outcome(Array(good.prefix(length))) else {
                Issue.record("cut at \(length): \(String(describing: outcome(Array(good.prefix(length)))))")
                continue
            }
        }
        for type in [SectionType.endOfStream, .start, .part, .end, .configuration, .vmDescription, .footer] {
            #expect(outcome([type.rawValue, 0, 0, 0, 2]) == .postcopy(.sectionInPackage(type)))
        }
        for (type, bytes) in [
            (CommandType.packaged, [8, 0, 7, 0, 4, 0, 0, 0, 9]), (.postcopyAdvise, [8, 0, 3, 0, 0]),
            (.postcopyResume, [8, 0, 9, 0, 0]), (.openReturnPath, [8, 0, 1, 0, 0]), (.prepare, [8, 0x47, 2, 0, 0]),
        ] as [(CommandType, [UInt8])] {
            #expect(outcome(bytes) == .postcopy(.commandInPackage(type)))
        }
        var ram = StreamWriter()
        ram.sectionHead(.full, id: 9, name: "ram", instance: 0, version: 4)
        #expect(outcome(ram.bytes) == .sectionNotInParts(name: "ram"))
    }

    @Test("a channel for requested pages takes pages only, and only inside blocks")
    func requestedPages() {
        let decoder = StreamDecoder.requestedPages(of: [Sample.low, Sample.high])
        let named: [UInt8] = [3] + Array("ram".utf8)
        for (cause, bytes) in [
            (.noBlockNamed(offset: 0), be64(0x28)), (.unknownBlock(name: "rom"), be64(0x08) + [3] + Array("rom".utf8)),
            (.pageOutside(block: "ram", offset: 0x10000, length: 0x10000), be64(0x10008) + named),
            (.postcopy(.recordOutOfPlace("MULTIFD_FLUSH")), be64(0x200)),
            (.postcopy(.recordOutOfPlace("the delta of a page")), be64(0x40) + named + [1, 0, 1, 0]),
            (.unknownFlags(0x04, offset: 0x1000), be64(0x1004)), (.unsupportedRecord("RDMA", offset: 0), be64(0x80)),
            (.unknownFlags(0x45, offset: 0x5145_5645_4d00_0000 & ~0xfff), be64(0x5145_5645_4d00_0045)),
        ] as [(StreamError.Cause, [UInt8])] {
            let error = #expect(throws: StreamError.self) { try decode(bytes, with: decoder) }
            #expect(error?.cause == cause)
        }
    }

    @Test(
        "each bad message gives its own error",
        arguments: [
            (.postcopy(.requestWithoutBlock), [0, 4, 0, 12] + be64(0) + [0, 0, 0x10, 0]),
            (.messageLength("REQ_PAGES", got: 11), [0, 4, 0, 11]),
            (.messageLength("REQ_PAGES_ID", got: 13), [0, 3, 0, 13]),
            (.messageLength("REQ_PAGES_ID", got: 17), [0, 3, 0, 17] + be64(0) + [0, 0, 0x10, 0, 200]),
            (.messageLength("REQ_PAGES_ID", got: 1025), [0, 3, 4, 1]),
            (.unknownBlock(name: "rom"), request(0, 4096, name: "rom")),
            (.nameNotText(what: "a RAM block"), [0, 3, 0, 14] + be64(0) + [0, 0, 0x10, 0, 1, 0xff]),
            (.postcopy(.rangeEmpty(block: "ram", offset: 0)), request(0, 0)),
            (.postcopy(.rangeUnaligned(block: "ram", offset: 8, length: 4096)), request(8, 4096)),
            (.postcopy(.rangeUnaligned(block: "ram", offset: 0, length: 1)), request(0, 1)),
            (
                .postcopy(.rangeOutside(block: "ram", offset: 0xf000, length: 0x2000, blockLength: 0x10000)),
                request(0xf000, 0x2000)
            ),
            (
                .postcopy(
                    .rangeOutside(block: "ram", offset: 0 &- 0x1000, length: 0x1000, blockLength: 0x10000)),
                request(0 &- 0x1000, 0x1000)
            ),
            (
                .postcopy(.rangeOutside(block: "ram", offset: 0, length: 0xffff_f000, blockLength: 0x10000)),
                request(0, 0xffff_f000)
            ),
            (.messageLength("RECV_BITMAP", got: 1), [0, 5, 0, 1, 0]),
            (.messageLength("RECV_BITMAP", got: 4), [0, 5, 0, 4, 9]),
            (.unknownBlock(name: "rom"), [0, 5, 0, 4, 3] + Array("rom".utf8) + be64(8)),
            (
                .postcopy(.bitmapLength(block: "ram", got: .max, expected: 8)),
                [0, 5, 0, 4, 3] + Array("ram".utf8) + be64(.max)
            ),
            (
                .postcopy(.bitmapLength(block: "ram", got: 0, expected: 8)),
                [0, 5, 0, 4, 3] + Array("ram".utf8) + be64(0)
            ),
            (
                .postcopy(.bitmapEnd(block: "ram", 0x0123_4567_89ab_cdee)),
                [0, 5, 0, 4, 3] + Array("ram".utf8) + be64(8) + be64(0) + be64(0x0123_4567_89ab_cdee)
            ),
            (.postcopy(.resumeAcknowledgement(0)), [0, 6, 0, 4, 0, 0, 0, 0]),
            (.messageLength("RESUME_ACK", got: 0), [0, 6, 0, 0]),
        ] as [(StreamError.Cause, [UInt8])])
    func messages(cause: StreamError.Cause, bytes: [UInt8]) {
        let padding = [UInt8](repeating: 0, count: 1100)
        for piece in [Int.max, 1] {
            let error = #expect(throws: StreamError.self) {
                try PostcopySample.hear(bytes + padding, piece: piece)
            }
            #expect(error?.cause == cause)
        }
    }

    @Test("more than a gibibyte is not asked for at once, though the block has it")
    func requestLimit() throws {
        let decoder = ReturnPathDecoder(postcopyOf: [RAMBlockDescription(name: "ram", length: 1 << 40)])
        let most = try PostcopySample.hear(request(1 << 39, 1 << 30), with: decoder)
        #expect(most.messages.count == 1)
        let error = #expect(throws: StreamError.self) {
            try PostcopySample.hear(request(0, 1 << 30 + 4096), with: decoder)
        }
        #expect(error?.cause == .postcopy(.requestTooLong(block: "ram", offset: 0, length: 1 << 30 + 4096)))
    }

    @Test("a decoder that was told of no blocks refuses every message of postcopy by name")
    func refused() {
        for (type, name) in [(3, "REQ_PAGES_ID"), (4, "REQ_PAGES"), (5, "RECV_BITMAP"), (6, "RESUME_ACK")] {
            let error = #expect(throws: StreamError.self) {
                try PostcopySample.hear([0, UInt8(type), 0, 4, 0, 0, 0, 1], with: ReturnPathDecoder())
            }
            #expect(error?.cause == .unsupportedMessage(name))
        }
    }

    @Test("random changes to postcopy's words are decoded or rejected, the same way in any pieces", arguments: 0..<4)
    func mutated(part: Int) throws {
        let commands = PostcopySample.commands.flatMap(\.1)
        let words =
            request(0, 4096) + [0, 4, 0, 12] + be64(0) + [0, 0, 0x10, 0] + [0, 5, 0, 4, 3] + Array("ram".utf8) + be64(8)
            + be64(1) + be64(0x0123_4567_89ab_cdef) + [0, 6, 0, 4, 0, 0, 0, 1]
        for seed in (part * 500)..<(part * 500 + 500) {
            var generator = SeededRandom(seed: UInt64(seed) | 1 << 34)
            func changed(_ bytes: [UInt8]) -> [UInt8] {
                var bytes = bytes
                for _ in 0..<Int.random(in: 1...3, using: &generator) {
                    bytes[Int.random(in: 0..<bytes.count, using: &generator)] = .random(in: 0...255, using: &generator)
                }
                return bytes
            }
            let stream = PostcopySample.opening + changed(commands) + [UInt8](repeating: 0, count: 300)
            #expect(Self.decoded(stream, .max) == Self.decoded(stream, 1), "seed \(seed)")
            let said = changed(words) + [UInt8](repeating: 0, count: 300)
            #expect(Self.heard(said, .max) == Self.heard(said, 1), "seed \(seed)")
        }
    }

    private static func decoded(_ bytes: [UInt8], _ piece: Int) -> String {
        do { return "\(try decode(bytes, with: PostcopySample.decoder) { piece })" } catch { return "\(error)" }
    }

    private static func heard(_ bytes: [UInt8], _ piece: Int) -> String {
        do { return "\(try PostcopySample.hear(bytes, piece: piece))" } catch { return "\(error)" }
    }
}
