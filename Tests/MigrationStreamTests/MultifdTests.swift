import MigrationStream
import TestSupport
import Testing

@Suite("The wire of multifd channels")
struct MultifdTests {
    private static let blocks = [Sample.low, Sample.high]
    private static let codec = MultifdCodec(blocks: blocks)
    private static let mark = MultifdGreeting.Mark(migration: Sample.migration, channels: 3)

    private static func greeting(_ bytes: [UInt8]) throws(StreamError) -> MultifdGreeting? {
        var buffer = ReceiveBuffer()
        buffer.append(bytes)
        return try MultifdGreeting(from: &buffer)
    }

    private static func packet(_ bytes: [UInt8], _ codec: MultifdCodec = codec) throws(StreamError) -> MultifdPacket? {
        var buffer = ReceiveBuffer()
        buffer.append(bytes)
        return try codec.next(from: &buffer, position: 64)
    }

    /// A packet with everything in it, as bytes; changed at a place it is not one any more.
    private static var sample: [UInt8] {
        codec.head(of: MultifdPacket(isSync: true, number: 7, block: 1, normal: [0x2000, 0], zero: [0x7000]))
    }

    // MARK: Greetings

    @Test("a greeting has 64 bytes where QEMU has them, and Godwit's mark in the reserved ones")
    func greetingLayout() {
        let bytes = MultifdGreeting(channel: 2, uuid: Sample.migration, mark: Self.mark).bytes
        #expect(bytes.count == 64)
        #expect(bytes[..<8] == [0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1])
        #expect(bytes[8..<24] == [1, 2, 3, 4, 5, 6, 7, 8, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18])
        #expect(bytes[24] == 2)
        #expect(bytes[25..<32].allSatisfy { $0 == 0 })
        #expect(bytes[32..<40] == [0x47, 0x4f, 0x44, 0x57, 0, 0, 0, 3])
        #expect(MultifdGreeting(channel: 2).bytes[25...].allSatisfy { $0 == 0 })
    }

    @Test("a greeting is read as it was written, whole or not at all", arguments: [mark, nil])
    func greetingRoundTrip(mark: MultifdGreeting.Mark?) throws {
        let greeting = MultifdGreeting(channel: 1, uuid: Sample.migration, mark: mark)
        #expect(try Self.greeting(greeting.bytes) == greeting)
        for count in 0..<64 { #expect(try Self.greeting(Array(greeting.bytes.prefix(count))) == nil) }
        var buffer = ReceiveBuffer()
        buffer.append(greeting.bytes + [1, 2])
        _ = try MultifdGreeting(from: &buffer)
        #expect(buffer.count == 2)
    }

    @Test("the first four bytes tell a channel from a stream")
    func recognition() {
        let greeting = MultifdGreeting(channel: 0).bytes
        #expect(MultifdGreeting.isAnnounced(by: Array(greeting.prefix(3))) == nil)
        #expect(MultifdGreeting.isAnnounced(by: Array(greeting.prefix(4))) == true)
        #expect(MultifdGreeting.isAnnounced(by: Sample.opening().bytes) == false)
    }

    @Test("greetings that are none are refused with what is wrong")
    func badGreetings() {
        func fault(_ change: (inout [UInt8]) -> Void) -> StreamError? {
            var bytes = MultifdGreeting(channel: 2, mark: Self.mark).bytes
            change(&bytes)
            do throws(StreamError) { _ = try Self.greeting(bytes) } catch { return error }
            return nil
        }
        #expect(fault { _ in } == nil)
        #expect(fault { $0[0] = 0x51 }?.cause == .multifd(.magic(0x5122_3344)))
        #expect(fault { $0[7] = 2 }?.cause == .multifd(.version(2)))
        #expect(fault { $0[24] = 3 }?.cause == .multifd(.channel(3, of: 3)))
        #expect(fault { $0[39] = 0 }?.cause == .multifd(.channelCount(0, most: 64)))
        #expect(fault { $0[39] = 65 }?.cause == .multifd(.channelCount(65, most: 64)))
        #expect(fault { $0[36] = 1 }?.description.contains("16777219 channels are announced") == true)
        // Without a mark the number of channels is not known, but it has a limit.
        #expect(
            fault {
                $0[32] = 0
                $0[24] = 64
            }?.cause == .multifd(.channel(64, of: 64)))
    }

    // MARK: Packets

    @Test("a packet's head has 1344 bytes where QEMU has them")
    func packetLayout() {
        let bytes = Self.sample
        #expect(bytes.count == 1344)
        #expect(bytes[..<12] == [0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1, 0, 0, 0, 1])
        #expect(bytes[12..<24] == [0, 0, 0, 128, 0, 0, 0, 2, 0, 0, 0x20, 0])
        #expect(bytes[24..<36] == [0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1])
        #expect(bytes[36..<64].allSatisfy { $0 == 0 })
        #expect(bytes[64..<69] == [0x68, 0x69, 0x67, 0x68, 0])
        #expect(bytes[320..<344] == [0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x70, 0])
        #expect(bytes[344...].allSatisfy { $0 == 0 })
    }

    @Test("packets are read as they were written, whole or not at all")
    func packetRoundTrip() throws {
        let packets = [
            MultifdPacket(number: 1), MultifdPacket(isSync: true, number: .max),
            MultifdPacket(number: 2, block: 0, normal: (0..<16).map { $0 * 4096 }),
            MultifdPacket(number: 3, block: 1, zero: [0x7000, 0]),
            MultifdPacket(isSync: true, number: 4, block: 1, normal: [0x1000], zero: [0x2000]),
        ]
        for packet in packets {
            let bytes = Self.codec.head(of: packet)
            #expect(try Self.packet(bytes) == packet)
            #expect(try Self.packet(Array(bytes.dropLast())) == nil)
        }
        let compressed = MultifdCodec(blocks: Self.blocks, compression: .zstd)
        let packet = MultifdPacket(compression: .zstd, number: 5, normal: [0x3000], contentBytes: 17)
        #expect(try Self.packet(compressed.head(of: packet), compressed) == packet)
    }

    @Test("a SYNC of QEMU 7.2, which leaves there what the packet before said, holds no pages and no contents")
    func staleSync() throws {
        var bytes = Self.codec.head(of: MultifdPacket(isSync: true, number: 9))
        bytes.replaceSubrange(20..<24, with: [0, 8, 0, 0])
        bytes.replaceSubrange(64..<68, with: [0xff, 0xfe, 1, 2])
        bytes.replaceSubrange(320..<328, with: [UInt8](repeating: 0xff, count: 8))
        #expect(try Self.packet(bytes) == MultifdPacket(isSync: true, number: 9))
        // Newer ones leave no room either.
        bytes.replaceSubrange(12..<16, with: [0, 0, 0, 0])
        #expect(try Self.packet(bytes)?.contentBytes == 0)
    }

    @Test("zero pages alone bring no contents, whatever their number of bytes says")
    func zeroOnly() throws {
        var bytes = Self.codec.head(of: MultifdPacket(number: 1, zero: [0]))
        bytes.replaceSubrange(20..<24, with: [0, 8, 0, 0])
        #expect(try Self.packet(bytes)?.contentBytes == 0)
    }

    @Test("packets that are none are refused with what is wrong and where")
    func badPackets() {
        func fault(_ changes: [(Int, UInt8)]) -> StreamError? {
            var bytes = Self.sample
            for (index, byte) in changes { bytes[index] = byte }
            do throws(StreamError) { _ = try Self.packet(bytes) } catch { return error }
            return nil
        }
        let high = Sample.high.length
        #expect(fault([]) == nil)
        #expect(fault([(3, 0)]) == StreamError(.multifd(.magic(0x1122_3300)), position: 64))
        #expect(fault([(4, 1)])?.cause == .multifd(.version(0x0100_0001)))
        #expect(fault([(11, 0x41)])?.cause == .multifd(.flags(0x41)))
        #expect(fault([(8, 0x80)])?.cause == .multifd(.flags(0x8000_0001)))
        #expect(fault([(11, 0x03)])?.cause == .multifd(.compression(got: 1, agreed: .none)))
        #expect(fault([(11, 0x3e)])?.cause == .multifd(.compression(got: 31, agreed: .none)))
        #expect(fault([(15, 129)])?.cause == .multifd(.room(129)))
        #expect(fault([(15, 2)])?.cause == .multifd(.pages(normal: 2, zero: 1, 2)))
        #expect(fault([(16, 0xff)])?.cause == .multifd(.pages(normal: 0xff00_0002, zero: 1, 128)))
        #expect(fault([(32, 0xff)])?.cause == .multifd(.pages(normal: 2, zero: 0xff00_0001, 128)))
        #expect(fault([(21, 1)])?.cause == .multifd(.contents(0x1_2000, normal: 2)))
        #expect(fault([(64, 0x48)])?.cause == .unknownBlock(name: "High"))
        #expect(fault([(64, 0)])?.cause == .unknownBlock(name: ""))
        #expect(fault([(64, 0xff)])?.cause == .nameNotText(what: "a packet's RAM block"))
        #expect(fault((64..<320).map { ($0, 0x61) })?.cause == .multifd(.endlessName))
        #expect(fault([(326, 0x20), (327, 1)])?.cause == .multifd(.offset(block: "high", 0x2001, length: high)))
        #expect(fault([(326, 0x80)])?.cause == .multifd(.offset(block: "high", 0x8000, length: high)))
        #expect(fault([(336, 0xff)])?.description.contains("which is no page of RAM block 'high'") == true)
    }

    @Test("random and mutated heads are read or refused, never more", arguments: 0..<4)
    func fuzz(part: Int) {
        let samples = [Self.sample, Self.codec.head(of: MultifdPacket(isSync: true, number: 1))]
        let greeting = MultifdGreeting(channel: 1, mark: Self.mark).bytes
        for seed in (part * 500)..<(part * 500 + 500) {
            var generator = SeededRandom(seed: UInt64(seed) | 1 << 34)
            var head = samples[seed % 2]
            var hello = greeting
            for _ in 0..<Int.random(in: 1...5, using: &generator) {
                head[Int.random(in: 0..<(seed % 3 == 0 ? 1344 : 72), using: &generator)] = .random(
                    in: 0...255, using: &generator)
                hello[Int.random(in: 0..<64, using: &generator)] = .random(in: 0...255, using: &generator)
            }
            if let packet = try? Self.packet(head) {
                let length = Self.blocks[packet.block].length
                #expect(packet.normal.count + packet.zero.count <= 128, "seed \(seed)")
                #expect((packet.normal + packet.zero).allSatisfy { $0 < length && $0 % 4096 == 0 }, "seed \(seed)")
                #expect(packet.contentBytes == packet.normal.count * 4096, "seed \(seed)")
            }
            if let read = try? Self.greeting(hello) { #expect(read.channel < 64, "seed \(seed)") }
        }
    }

    // MARK: The main stream

    @Test("MULTIFD_FLUSH is an item of its own, behind the block list and in rounds")
    func flush() throws {
        var writer = Sample.opening()
        writer.ramSetup(id: 2, blocks: Self.blocks, flushesChannels: true)
        writer.ramRound(final: true, id: 2)
        writer.multifdFlush()
        writer.ramSectionEnd(id: 2)
        writer.endOfStream()
        let items = try decode(writer.bytes, with: Sample.decoder)
        #expect(
            items == [
                .header, .configuration(machine: "godwit"), .ramSetup(Self.blocks), .multifdFlush,
                .ramSectionEnded(.start), .ramRound(final: true), .multifdFlush, .ramSectionEnded(.end), .endOfStream,
            ])
        var telling = Sample.decoder
        telling.tellsEndOfRecords = true
        let told = try decode(writer.bytes, with: telling)
        #expect(told.filter { $0 != .ramRecordsEnded } == items)
        #expect(told.firstIndex(of: .ramRecordsEnded) == 4 && told.count == items.count + 2)
        var summary = StreamSummary()
        try summary.feed(writer.bytes)
        try summary.finish()
        #expect(summary.isComplete)
    }
}
