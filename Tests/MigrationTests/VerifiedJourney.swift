import Compression
import Glibc
import GuestMemory
import Host
import MigrationStream
import TestSupport
import Transport

@testable import Migration

/// How pages travel in a verified migration.
enum Vehicle: String, CaseIterable, Sendable {
    /// Records of the main stream with many pages each.
    case batches
    /// The differences of `xbzrle`, one record for each page, behind rounds of batches.
    case deltas
    /// Packets of a channel besides the main one: as they are, or compressed.
    case packets, zlib, zstd

    var method: CompressionMethod? {
        switch self {
        case .zlib: .zlib
        case .zstd: .zstd
        default: nil
        }
    }
    var isChannel: Bool { self != .batches && self != .deltas }
}

/// A verified stream in pieces, made by the code that sends. Pieces may be damaged before the code that receives gets them.
struct VerifiedJourney {
    static let pages = 48
    static let migration = MigrationIdentifier(high: 0x1234, low: 0x9876_5432_10)
    private static let blocks = [RAMBlockDescription(name: "ram", length: UInt64(pages) * 4096)]

    /// One record, or one packet.
    struct Piece {
        let pages: [Int]
        /// Of a packet empty: it is made when the contents are known.
        var head: [UInt8]
        var digests: [UInt8]
        /// The pages, or the encoding of a difference.
        var contents: [UInt8]
        /// No page of it comes again.
        var isLast = true

        func page(_ index: Int) -> Range<Int> { index * 4096..<index * 4096 + 4096 }
    }

    let vehicle: Vehicle
    let pieces: [Piece]
    let sent: OutgoingVerification
    /// What the destination must have in the end.
    let truth: GuestMemory
    private let opening: [UInt8]

    static func memory() throws -> GuestMemory {
        GuestMemory(blocks: [try RAMBlock(name: "ram", byteCount: UInt64(pages) * 4096)])
    }

    /// Two rounds: all pages, eight a piece, then half of them with new contents. With differences three: all twice, then single words.
    init(_ vehicle: Vehicle, seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        self.vehicle = vehicle
        truth = try Self.memory()
        sent = try OutgoingVerification(truth, Self.migration)
        var writer = StreamWriter()
        writer.header()
        writer.configuration(machine: "m")
        writer.command(.begin(Self.migration, FeatureSet.all.union(.verification)))
        writer.ramSetup(id: 2, blocks: Self.blocks)
        writer.ramRound(final: false, id: 2)
        opening = writer.bytes
        var pieces: [Piece] = []
        switch vehicle {
        case .batches: pieces = try Self.records(truth, sent, rounds: 2, deltas: false, &random)
        case .deltas: pieces = try Self.records(truth, sent, rounds: 3, deltas: true, &random)
        case .packets, .zlib, .zstd: pieces = Self.packets(truth, sent, &random)
        }
        for index in pieces.indices {
            let later = pieces[(index + 1)...].contains { !Set($0.pages).isDisjoint(with: pieces[index].pages) }
            pieces[index].isLast = !later
        }
        self.pieces = pieces
    }

    /// Words with a few bits each, so that compressors find something.
    private static func fill(_ memory: GuestMemory, _ page: Int, _ random: inout SeededRandom) {
        for word in 0..<512 {
            memory.blocks[0].mapping.store(random.next() & 0x0101_0303_0101_0303, at: page * 4096 + word * 8)
        }
    }

    private static func run(_ pages: Range<Int>) -> Range<PageIndex> {
        PageIndex(UInt64(pages.lowerBound))..<PageIndex(UInt64(pages.upperBound))
    }

    private static func records(
        _ memory: GuestMemory, _ sent: OutgoingVerification, rounds: Int, deltas: Bool, _ random: inout SeededRandom
    ) throws -> [Piece] {
        var records = try RecordWriter(
            memory, blocks: blocks, xbzrleCacheBytes: deltas ? 1 << 20 : nil, verification: sent)
        var pieces: [Piece] = []
        for round in 0..<rounds {
            let single = deltas && round == 2
            let step = single ? 1 : 8
            records.deltas?.roundBegins(pages: UInt64(pages))
            for first in stride(from: 0, to: pages, by: step) where deltas || round == 0 || first % 16 == 0 {
                for page in first..<first + step {
                    if single {
                        for _ in 0..<5 {
                            memory.blocks[0].mapping.store(
                                random.next(), at: page * 4096 + Int(random.next() % 512) * 8)
                        }
                    } else {
                        fill(memory, page, &random)
                    }
                }
                let bytes = try bytes { channel in
                    _ = try records.send(
                        [run(first..<first + step)], of: 0, batches: true, findsZeroes: true, to: channel)
                }
                // A word, kind and length of a difference, and its digest; a batch ends with its digests and contents.
                let contents = single ? 19 : bytes.count - 8 * 4096
                let digests = single ? 11 : contents - 64
                pieces.append(
                    Piece(
                        pages: Array(first..<first + step), head: Array(bytes[..<digests]),
                        digests: Array(bytes[digests..<contents]), contents: Array(bytes[contents...])))
            }
            records.deltas?.roundEnded(pages: UInt64(pages), isInterrupted: false)
        }
        return pieces
    }

    /// What is written to a channel.
    private static func bytes(_ write: (Channel) throws -> Void) throws -> [UInt8] {
        let path = temporaryPath("verified-\(UInt64.random(in: 0...UInt64.max))")
        defer { Descriptor.remove(path) }
        let channel = try Connector().connect(to: .file(path: path, offset: 0))
        try write(channel)
        try channel.finish()
        return try Descriptor.open(path, O_RDONLY).read(upTo: 1 << 20) ?? []
    }

    private static func packets(
        _ memory: GuestMemory, _ sent: OutgoingVerification, _ random: inout SeededRandom
    ) -> [Piece] {
        let mapping = memory.blocks[0].mapping
        var pieces: [Piece] = []
        for round in 0..<2 {
            for first in stride(from: 0, to: pages, by: 8) where round == 0 || first % 16 == 0 {
                for page in first..<first + 8 { fill(memory, page, &random) }
                let digests = (first..<first + 8).map {
                    sent.digest(mapping, at: $0 * 4096, block: 0, page: UInt64($0))
                }
                sent.sent([run(first..<first + 8)], of: 0, digests: digests[...])
                pieces.append(
                    Piece(
                        pages: Array(first..<first + 8), head: [],
                        digests: digests.flatMap { digest in
                            stride(from: 56, through: 0, by: -8).map { UInt8(truncatingIfNeeded: digest >> $0) }
                        }, contents: mapping.read(at: first * 4096, count: 8 * 4096)))
            }
        }
        return pieces
    }

    // MARK: Arrival

    /// What became of it: which pages are not as they should be, and what was said.
    struct Outcome {
        var differing: Set<Int> = []
        var findings: [PageFinding] = []
        /// The sentence with which a migration would fail; `nil`: it would not.
        var sentence: String?
        /// It failed in the middle: what comes behind was not received.
        var isBroken = false
    }

    /// A bit of the compressed contents of a piece that breaks, at a part of their length.
    struct BrokenBit {
        let piece: Int
        let place: Double
        let mask: UInt8
    }

    /// Receives pieces, and asks the source until it is clear what differs.
    func outcome(of pieces: [Piece], breaking bit: BrokenBit? = nil, nothing: Channel) throws -> Outcome {
        let memory = try Self.memory()
        let verification = try IncomingVerification(memory, Self.migration)
        let received = try ReceivedPages(memory)
        let statistics = IncomingStatistics(totalBytes: 0, listening: [])
        var outcome = Outcome()
        do {
            if vehicle.isChannel {
                var buffer = ReceiveBuffer()
                buffer.append(try packetBytes(pieces, bit))
                var receiver = try ChannelReceiver(
                    nothing, behind: buffer, memory: memory, blocks: Self.blocks, received: received,
                    statistics: statistics, mayMix: true, verification: verification)
                while let packet = try receiver.next() { try receiver.place(packet) }
            } else {
                var receiver = PageReceiver(
                    nothing, behind: opening + pieces.flatMap { $0.head + $0.digests + $0.contents }, memory: memory,
                    blocks: Self.blocks, catalogue: SectionCatalogue(), received: received, statistics: statistics)
                receiver.verification = verification
                while let item = try receiver.next() { try receiver.place(item) }
                // The stream ends inside its section: that is no fault here.
                if let failure = receiver.failure, !failure.isTruncation { throw failure }
            }
            outcome.sentence = narrowed(verification)
        } catch let error as StreamError {
            outcome.sentence = error.description
            outcome.isBroken = true
        }
        outcome.findings = verification.findings
        let (left, right) = (memory.blocks[0].mapping, truth.blocks[0].mapping)
        for page in 0..<Self.pages
        where left.read(at: page * 4096, count: 4096) != right.read(at: page * 4096, count: 4096) {
            outcome.differing.insert(page)
        }
        return outcome
    }

    private func narrowed(_ verification: IncomingVerification) -> String? {
        var verdict = verification.compare(root: sent.ledger.root)
        while case .ask(let range) = verdict, case .digests(_, let values) = sent.answer(range) {
            verdict = verification.compare(range, values)
        }
        if case .corrupt(let sentence) = verdict { return sentence }
        return nil
    }

    private func packetBytes(_ pieces: [Piece], _ bit: BrokenBit?) throws -> [UInt8] {
        let codec = MultifdCodec(blocks: Self.blocks)
        let memory = try Mapping(anonymousByteCount: 8 * 4096)
        var bytes: [UInt8] = []
        func append(_ number: Int, _ piece: Piece, _ packed: [UInt8]?, _ method: MultifdCompression) {
            var packet = MultifdPacket(number: UInt64(number), normal: piece.pages.map { UInt64($0) * 4096 })
            var contents = packed ?? piece.contents
            if let bit, bit.piece == number { contents[Int(bit.place * Double(contents.count))] ^= bit.mask }
            packet.compression = method
            packet.contentBytes = contents.count
            bytes += codec.head(of: packet) + piece.digests + contents
        }
        guard let method = vehicle.method else {
            for (number, piece) in pieces.enumerated() where !piece.pages.isEmpty { append(number, piece, nil, .none) }
            return bytes
        }
        var packer = try PacketPacker(method, level: 1, packetBytes: PacketPacking.packetBytes)
        for (number, piece) in pieces.enumerated() where !piece.pages.isEmpty {
            memory.write(piece.contents, at: 0)
            let range = CollectionOfOne(MemoryRange(memory, offset: 0, count: piece.contents.count))
            guard
                case .packed(let count) = try packer.pack(range, byteCount: piece.contents.count, mayGoPlain: false)
            else { continue }
            append(number, piece, packer.buffer.read(at: 0, count: count), method.onWire)
        }
        return bytes
    }

    /// A file that holds nothing: everything was read ahead.
    static func nothing() throws -> Channel {
        let path = temporaryPath("nothing-\(UInt64.random(in: 0...UInt64.max))")
        try Descriptor.create(path).writeAll([])
        defer { Descriptor.remove(path) }
        return try Listener(on: .file(path: path, offset: 0)).accept()
    }
}
