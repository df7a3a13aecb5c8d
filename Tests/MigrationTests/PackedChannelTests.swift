import Compression
import GuestMemory
import Host
import MigrationStream
import TestSupport
import Testing
import Transport

@testable import Migration

@Suite("Compressed packets on a channel")
struct PackedChannelTests {
    private let block: RAMBlock
    private let blocks = [RAMBlockDescription(name: "ram", length: 1 << 20)]
    private let source: Mapping
    private static let pages: [UInt64] = [0, 1, 2, 7, 9, 10]

    init() throws {
        block = try RAMBlock(name: "ram", byteCount: 1 << 20)
        source = try Mapping(anonymousByteCount: 1 << 20)
        for word in 0..<Int(1 << 17) { source.store(UInt64(word / 7) &* 0x9e37, at: word * 8) }
    }

    private enum Kind { case plain, zlib, zstd, garbage }

    /// Packets with the same pages, one after the other; plain ones begin a new stream.
    private func bytes(_ kinds: [Kind]) throws -> [UInt8] {
        let codec = MultifdCodec(blocks: blocks)
        var zlib = try PacketPacker(.zlib, level: 1, packetBytes: 1 << 19)
        var zstd = try PacketPacker(.zstd, level: 1, packetBytes: 1 << 19)
        let offsets = Self.pages.map { $0 * 4096 }
        let ranges = PacketPacking.ranges(offsets, in: source)
        var bytes: [UInt8] = []
        for (number, kind) in kinds.enumerated() {
            var packet = MultifdPacket(number: UInt64(number), normal: offsets)
            var contents = offsets.flatMap { source.read(at: Int($0), count: 4096) }
            func take(_ packed: PacketPacker.Contents, _ buffer: Mapping) {
                if case .packed(let count) = packed { contents = buffer.read(at: 0, count: count) }
            }
            switch kind {
            case .plain: break
            case .zlib:
                packet.compression = .zlib
                take(try zlib.pack(ranges, byteCount: contents.count, mayGoPlain: false), zlib.buffer)
            case .zstd:
                packet.compression = .zstd
                take(try zstd.pack(ranges, byteCount: contents.count, mayGoPlain: false), zstd.buffer)
            case .garbage:
                packet.compression = .zstd
                contents = (0..<300).map { UInt8(truncatingIfNeeded: $0 * 7) }
            }
            packet.contentBytes = contents.count
            bytes += codec.head(of: packet) + contents
        }
        return bytes
    }

    /// Receives packets. - Returns: how many there were, and why there were no more.
    private func receive(_ bytes: [UInt8], mayMix: Bool) throws -> (placed: Int, error: String?) {
        let path = temporaryPath("packed-\(UInt64.random(in: 0...UInt64.max))")
        try Descriptor.create(path).writeAll(bytes)
        defer { Descriptor.remove(path) }
        let channel = try Listener(on: .file(path: path, offset: 0)).accept()
        let memory = GuestMemory(blocks: [block])
        var receiver = try ChannelReceiver(
            channel, behind: ReceiveBuffer(), memory: memory, blocks: blocks, received: try ReceivedPages(memory),
            statistics: IncomingStatistics(totalBytes: 1 << 20, listening: []), mayMix: mayMix)
        var placed = 0
        do {
            while let packet = try receiver.next() {
                block.mapping.zero(at: 0, count: 1 << 20)
                try receiver.place(packet)
                let isEqual = Self.pages.allSatisfy {
                    let start = Int($0) * 4096
                    return block.mapping.read(at: start, count: 4096) == source.read(at: start, count: 4096)
                }
                #expect(isEqual, "packet \(placed)")
                #expect(block.mapping.isZero(at: 3 * 4096, count: 4 * 4096))
                placed += 1
            }
            return (placed, nil)
        } catch { return (placed, "\(error)") }
    }

    @Test("packets of one method arrive, whoever sends them")
    func oneMethod() throws {
        for kind in [Kind.plain, .zlib, .zstd] {
            let outcome = try receive(bytes([kind, kind, kind]), mayMix: false)
            #expect(outcome == (3, nil), "\(kind): \(outcome)")
        }
    }

    @Test("a packet of another method ends the channel with a sentence; of a Godwit, plain ones do not")
    func otherMethod() throws {
        for (kinds, placed) in [([Kind.zlib, .zlib, .zstd], 2), ([.zstd, .plain], 1), ([.plain, .zstd], 1)] {
            let outcome = try receive(bytes(kinds), mayMix: false)
            #expect(outcome.placed == placed && outcome.error?.contains("agreed") == true, "\(outcome)")
        }
        // The stream begins anew behind a plain packet; here the sender's does, because it has not begun.
        let mixed = try receive(bytes([.plain, .zstd, .zstd, .plain]), mayMix: true)
        #expect(mixed == (4, nil), "\(mixed)")
        let changed = try receive(bytes([.plain, .zstd, .plain, .zlib]), mayMix: true)
        #expect(changed.placed == 3 && changed.error?.contains("agreed") == true, "\(changed)")
    }

    @Test("damaged contents end the channel with a sentence that names the byte and the method")
    func damaged() throws {
        let outcome = try receive(bytes([.zstd, .garbage]), mayMix: true)
        #expect(outcome.placed == 1)
        #expect(outcome.error?.contains("pages compressed with zstd") == true, "\(outcome)")
        #expect(outcome.error?.hasPrefix("migration stream, byte ") == true, "\(outcome)")
        // Cut off inside the contents.
        let cut = try receive(bytes([.zlib]).dropLast(5) + [], mayMix: false)
        #expect(cut.placed == 0 && cut.error != nil, "\(cut)")
    }
}
