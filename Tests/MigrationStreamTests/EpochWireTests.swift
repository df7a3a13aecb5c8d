import MigrationStream
import TestSupport
import Testing

@Suite("What a safety net's channel says")
struct EpochWireTests {
    private static let blocks = [
        RAMBlockDescription(name: "ram", length: 1 << 20), RAMBlockDescription(name: "rom", length: 64 << 10),
    ]
    private static let messages: [EpochMessage] = [
        .kept(epoch: 0), .pages(block: 0, first: 254, count: 2), .zeroes(block: 1, first: 3, count: 13),
        .section(DeviceSection(name: "cpu", instance: 3, version: 2, body: [1, 2, 3])),
        .section(DeviceSection(name: "empty", version: 1, body: [])), .end(epoch: 7, guestRuns: true),
        .end(epoch: .max, guestRuns: false), .stays, .released,
    ]

    /// - Returns: what is found in bytes that come in pieces; contents of pages are dropped.
    private static func read(_ bytes: [UInt8], pieces: Int) throws(StreamError) -> [EpochMessage] {
        var decoder = EpochDecoder(blocks)
        var buffer = ReceiveBuffer()
        var found: [EpochMessage] = []
        for start in stride(from: 0, to: bytes.count, by: pieces) {
            buffer.append(bytes[start..<min(start + pieces, bytes.count)])
            while true {
                let skipped = min(decoder.payloadBytes, buffer.count)
                buffer.consume(skipped)
                decoder.payloadConsumed(skipped)
                guard decoder.payloadBytes == 0, let message = try decoder.next(from: &buffer) else { break }
                found.append(message)
            }
        }
        return found
    }

    private static func bytes(of messages: [EpochMessage]) -> [UInt8] {
        messages.flatMap { message -> [UInt8] in
            guard case .pages(_, _, let count) = message else { return message.bytes }
            return message.bytes + [UInt8](repeating: 0xff, count: count * 4096)
        }
    }

    @Test("every message comes out as it went in, in pieces of any size", arguments: [1, 7, 16, 4096, 1 << 20])
    func roundTrip(pieces: Int) throws {
        #expect(try Self.read(Self.bytes(of: Self.messages), pieces: pieces) == Self.messages)
    }

    @Test("what is not in the machine, or more than it, is refused in a sentence")
    func faults() {
        func fault(_ bytes: [UInt8]) -> String {
            do throws(StreamError) { return "nothing is refused: \(try Self.read(bytes, pieces: 1 << 20))" } catch {
                return error.description
            }
        }
        let outside: [EpochMessage] = [
            .pages(block: 2, first: 0, count: 1), .pages(block: 1, first: 16, count: 1),
            .pages(block: 1, first: 15, count: 2), .pages(block: 0, first: .max, count: 1),
            .pages(block: 0, first: 0, count: 0), .pages(block: 0, first: 0, count: EpochMessage.mostPages + 1),
            .zeroes(block: 0, first: 1, count: 256), .zeroes(block: 0, first: 0, count: 0),
        ]
        for message in outside { #expect(fault(message.bytes).contains("are not in this machine"), "\(message)") }
        #expect(fault([UInt8](repeating: 0, count: 16)).contains("message 0"))
        #expect(fault([0, 99] + [UInt8](repeating: 0, count: 14)).contains("message 99"))
        let all = EpochMessage.zeroes(block: 0, first: 0, count: 256)
        #expect(fault(all.bytes + all.bytes).contains("more pages than this machine"))
        #expect(fault([0, 3, 0, 0, 0xff, 0xff, 0xff, 0xff] + [UInt8](repeating: 0, count: 8)).contains("section"))
        #expect(
            fault(
                [0, 3, 0, 0, 0, 0, 0, 12] + [UInt8](repeating: 0, count: 8) + [200] + [UInt8](repeating: 65, count: 11)
            ).contains("12 bytes"))
        let large = EpochMessage.section(
            DeviceSection(name: "x", version: 1, body: [UInt8](repeating: 0, count: 16 << 20)))
        #expect(fault((0..<5).flatMap { _ in large.bytes }).contains("more device state"))
    }

    @Test("bytes at random never trap, and never announce more than the machine has")
    func noise() {
        var random = SeededRandom(seed: 8)
        for _ in 0..<3000 {
            var bytes = Self.bytes(of: Self.messages)
            for _ in 0..<Int.random(in: 1...6, using: &random) {
                bytes[Int.random(in: 0..<bytes.count, using: &random)] = .random(in: 0...255, using: &random)
            }
            for case .pages(let block, let first, let count) in (try? Self.read(bytes, pieces: 997)) ?? [] {
                #expect((first + UInt64(count)) * 4096 <= Self.blocks[block].length)
            }
        }
    }
}
