import MigrationStream
import TestSupport
import Testing

@Suite("The wire")
struct MigrationStreamTests {
    @Test("what is written is what is read")
    func roundTrip() throws {
        let sample = Sample.everything()
        #expect(try decode(sample.bytes) == sample.items)
    }

    @Test("a stream fed byte by byte gives the same items as in one piece")
    func byteByByte() throws {
        let sample = Sample.everything()
        #expect(try decode(sample.bytes) { 1 } == sample.items)
    }

    @Test("a stream fed in random pieces gives the same items", arguments: 1...20)
    func randomPieces(seed: Int) throws {
        let sample = Sample.everything()
        var generator = SeededRandom(seed: UInt64(seed))
        let items = try decode(sample.bytes) { Int.random(in: 1...6000, using: &generator) }
        #expect(items == sample.items, "seed \(seed)")
    }

    @Test("the opening bytes are those QEMU writes")
    func qemuBytes() {
        var writer = StreamWriter()
        writer.header()
        writer.configuration(machine: "none")
        writer.ramSetup(id: 2, blocks: [RAMBlockDescription(name: "ram", length: 16 << 20)])
        let recorded: [UInt8] = [
            0x51, 0x45, 0x56, 0x4d, 0, 0, 0, 3, 7, 0, 0, 0, 4, 0x6e, 0x6f, 0x6e, 0x65,
            1, 0, 0, 0, 2, 3, 0x72, 0x61, 0x6d, 0, 0, 0, 0, 0, 0, 0, 4,
            0, 0, 0, 0, 1, 0, 0, 4, 3, 0x72, 0x61, 0x6d, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
            0x7e, 0, 0, 0, 2,
        ]
        #expect(writer.bytes == recorded)
    }

    @Test("every prefix of a stream is incomplete, and says so with its position")
    func truncated() throws {
        let sample = Sample.everything().bytes
        let eof = sample.count - (try descriptionBytes()) - 5
        for length in Array(stride(from: 0, to: 400, by: 1)) + Array(stride(from: 401, to: sample.count, by: 251)) {
            if length == eof { continue }
            #expect(throws: StreamError.self, "\(length) bytes") { try decode(Array(sample.prefix(length))) }
        }
        #expect(throws: Never.self) { try decode(Array(sample.prefix(eof))) }
    }

    private func descriptionBytes() throws -> Int {
        guard case .vmDescription(let count)? = Sample.everything().items.last else { return 0 }
        return count
    }

    @Test("return path messages survive the wire, byte by byte too")
    func returnPath() throws {
        let messages: [ReturnPathMessage] = [
            .hello(version: 1, features: .all, instance: Sample.migration), .pong(Wire.godwitPing),
            .ready(nanoseconds: 1 << 40), .started(nanoseconds: 12), .failure(reason: "no space: ü"),
            .verdict(.started), .verdict(.neverStarted), .verdict(.unknown), .retracted(attempt: 7),
            .digestsWanted(DigestRange(level: .groups, block: 2, first: 9, count: 4096)),
            .switchoverAcknowledged, .shut(0),
        ]
        var writer = StreamWriter()
        for message in messages { writer.message(message) }
        var decoder = ReturnPathDecoder()
        var buffer = ReceiveBuffer()
        var read: [ReturnPathMessage] = []
        for byte in writer.bytes {
            buffer.append([byte])
            while let message = try decoder.next(from: &buffer) { read.append(message) }
        }
        #expect(read == messages)
        #expect(decoder.position == UInt64(writer.bytes.count))
    }

    @Test("behind RETRACT and COMMIT_WITHIN device state comes again, with RAM still open; without them it may not")
    func retraction() throws {
        for command in [.retract(attempt: 1), .commitWithin(attempt: 1, nanoseconds: 1 << 40), .prepare]
            as [ForwardCommand]
        {
            var writer = Sample.opening()
            writer.command(.begin(Sample.migration, .all))
            writer.ramSetup(id: 2, blocks: [Sample.low, Sample.high])
            for attempt in 0..<2 {
                writer.ramRound(final: false, id: 2)
                writer.ramSectionEnd(id: 2)
                writer.deviceSection(Sample.cpu, id: 4, layout: .lengthPrefixed())
                writer.command(.prepare)
                if attempt == 0 { writer.command(command) }
            }
            writer.ramRound(final: true, id: 2)
            writer.ramSectionEnd(id: 2)
            writer.endOfStream()
            guard command != .prepare else {
                #expect(throws: StreamError.self) { try decode(writer.bytes) }
                continue
            }
            let items = try decode(writer.bytes, pieces: { 3 })
            #expect(items.contains(.command(command)))
            #expect(items.count { if case .device = $0 { true } else { false } } == 2)
            #expect(items.last == .endOfStream)
        }
    }

    @Test("a long reason is cut at a character, not rejected")
    func longReason() throws {
        var writer = StreamWriter()
        writer.message(.failure(reason: String(repeating: "ü", count: 5000)))
        var decoder = ReturnPathDecoder()
        var buffer = ReceiveBuffer()
        buffer.append(writer.bytes)
        #expect(try decoder.next(from: &buffer) == .failure(reason: String(repeating: "ü", count: 512)))
    }

    @Test("the run state of globalstate survives, and a wrong size field is refused")
    func globalState() {
        let section = GlobalState(runState: "paused").section
        #expect(GlobalState(body: section.body)?.runState == "paused")
        #expect(Array(section.body.prefix(12)) == [0, 0, 0, 7] + Array("paused".utf8) + [0, 0])
        #expect(section.body.count == 104)
        var wrong = section.body
        wrong[3] = 101
        #expect(GlobalState(body: wrong) == nil)
        wrong[3] = 0
        #expect(GlobalState(body: wrong) == nil)
        #expect(GlobalState(body: []) == nil)
    }

    @Test("the buffer keeps its bytes in order however it is filled and consumed", arguments: 1...20)
    func receiveBuffer(seed: Int) {
        var generator = SeededRandom(seed: UInt64(seed))
        var buffer = ReceiveBuffer(capacity: 16)
        var model: [UInt8] = []
        for _ in 0..<300 {
            let more = (0..<Int.random(in: 0...40, using: &generator)).map { _ in
                UInt8.random(in: 0...255, using: &generator)
            }
            if Bool.random(using: &generator) {
                buffer.append(more)
            } else {
                let filled = unsafe buffer.fill(atLeast: more.count) { room in
                    for (index, byte) in more.enumerated() { unsafe room[index] = byte }
                    return more.count
                }
                #expect(filled == more.count)
            }
            model += more
            let consumed = Int.random(in: 0...min(60, model.count), using: &generator)
            if Bool.random(using: &generator) {
                buffer.consume(consumed)
            } else {
                var taken = [UInt8](repeating: 0, count: consumed)
                let moved = unsafe taken.withUnsafeMutableBytes { unsafe buffer.move(to: $0) }
                #expect(moved == consumed)
                #expect(taken == Array(model.prefix(consumed)))
            }
            model.removeFirst(consumed)
            #expect(buffer.count == model.count)
            #expect(
                (0..<model.count).allSatisfy {
                    unsafe buffer.bytes.unsafeLoad(fromByteOffset: $0, as: UInt8.self) == model[$0]
                })
        }
    }
}
