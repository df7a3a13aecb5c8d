//! The Compression tests: streams of both libraries, golden bytes that other programs made with them, and bytes that lie.
import Host
import Synchronization
import TestSupport
import Testing

@testable import Compression

/// Guest memory on both sides, and what is between them.
struct Bench {
    static let pages = 128
    let source: Mapping
    let target: Mapping
    let buffer: Mapping

    init() throws {
        source = try Mapping(anonymousByteCount: Self.pages * 4096)
        target = try Mapping(anonymousByteCount: Self.pages * 4096)
        buffer = try Mapping(anonymousByteCount: PageCompressor.bound(byteCount: Self.pages * 4096))
    }

    /// - Parameter share: of 256 bytes, how many are noise.
    func fill(_ page: Int, noise share: Int, using generator: inout SeededRandom) {
        for word in 0..<512 {
            let value = generator.next()
            source.store(Int(value & 0xff) < share ? value : UInt64(page), at: page * 4096 + word * 8)
        }
    }

    static func ranges(_ pages: [Int], in mapping: Mapping) -> [MemoryRange] {
        pages.map { MemoryRange(mapping, offset: $0 * 4096, count: 4096) }
    }

    func isEqual(_ pages: [Int]) -> Bool {
        pages.allSatisfy { source.read(at: $0 * 4096, count: 4096) == target.read(at: $0 * 4096, count: 4096) }
    }
}

@Suite("Compressed pages")
struct CompressionTests {
    @Test(
        "packets of any pages come out as they went in, in one stream, at every level",
        arguments: CompressionMethod.allCases)
    func roundTrips(method: CompressionMethod) throws {
        let bench = try Bench()
        for level in method.levels {
            var generator = SeededRandom(seed: UInt64(level))
            var compressor = try PageCompressor(method, level: level)
            var decompressor = try PageDecompressor(method)
            for packet in 0..<(level > 12 ? 3 : 6) {
                // Pages that share packets with pages of other kinds, one page alone, all pages, and none twice.
                let count = [1, 128, 7, 64, 3, 128][packet]
                let pages = Array((0..<Bench.pages).shuffled(using: &generator).prefix(count))
                for page in pages { bench.fill(page, noise: [0, 20, 256][page % 3], using: &generator) }
                let size = try compressor.compress(Bench.ranges(pages, in: bench.source), into: bench.buffer)
                #expect(size <= PageCompressor.bound(byteCount: count * 4096))
                try decompressor.decompress(bench.buffer, count: size, into: Bench.ranges(pages, in: bench.target))
                #expect(bench.isEqual(pages), "\(method) \(level), packet \(packet)")
            }
        }
    }

    @Test(
        "a page sent again costs next to nothing: the stream remembers the packets before",
        arguments: CompressionMethod.allCases)
    func oneStream(method: CompressionMethod) throws {
        let bench = try Bench()
        var generator = SeededRandom(seed: 1)
        bench.fill(0, noise: 256, using: &generator)
        var compressor = try PageCompressor(method, level: 1)
        let page = Bench.ranges([0], in: bench.source)
        let first = try compressor.compress(page, into: bench.buffer)
        let second = try compressor.compress(page, into: bench.buffer)
        #expect(first > 4000 && second < 200, "\(first), \(second)")
        // After a reset it has forgotten.
        try compressor.reset()
        let third = try compressor.compress(page, into: bench.buffer)
        #expect(third > 4000)
        var decompressor = try PageDecompressor(method)
        try decompressor.decompress(bench.buffer, count: third, into: Bench.ranges([0], in: bench.target))
        #expect(bench.isEqual([0]))
        try decompressor.reset()
        try decompressor.decompress(bench.buffer, count: third, into: Bench.ranges([5], in: bench.target))
        #expect(bench.target.read(at: 5 * 4096, count: 4096) == bench.source.read(at: 0, count: 4096))
    }

    /// Made by zlib 1.2.13 and zstd 1.5.4 from Python: two pages flushed, then the second once more, flushed.
    private static let golden: [CompressionMethod: [String]] = [
        .zlib: [
            "7801ecd7c10d002008c0c020a2ec3fb11fa720d711eed758b9ebdc4e112040800001020408102040800001026305e2ff7f8900010204"
                + "0810204080000102040810182bf0000000ffff",
            "ecd7310d000000c230ffaef926825402e59afebfbdd630020408102040800001020408102090c0000000ffff",
        ],
        .zstd: [
            "28b52ffd0048c4000050010203040506070803050300f4c7791980f302fafbe008", "4c0000000100fd1f00ff0001",
        ],
    ]

    @Test("bytes that the libraries made for others are understood", arguments: CompressionMethod.allCases)
    func goldenBytes(method: CompressionMethod) throws {
        let bench = try Bench()
        var decompressor = try PageDecompressor(method)
        func page(_ byte: UInt8) -> [UInt8] { Array(1...8) + [UInt8](repeating: byte, count: 4088) }
        let packets = try #require(Self.golden[method]).map(Self.bytes)
        bench.buffer.write(packets[0], at: 100)
        try decompressor.decompress(
            bench.buffer, at: 100, count: packets[0].count, into: Bench.ranges([7, 3], in: bench.target))
        bench.buffer.write(packets[1], at: 0)
        try decompressor.decompress(bench.buffer, count: packets[1].count, into: Bench.ranges([9], in: bench.target))
        for (place, byte) in [(7, 3), (3, 5), (9, 5)] {
            #expect(bench.target.read(at: place * 4096, count: 4096) == page(UInt8(byte)))
        }
    }

    private static func bytes(_ text: String) -> [UInt8] {
        let digits = text.compactMap(\.hexDigitValue)
        return stride(from: 0, to: digits.count, by: 2).map { UInt8(digits[$0] << 4 | digits[$0 + 1]) }
    }

    @Test(
        "pages that the guest changes while they are compressed still make a valid stream",
        arguments: CompressionMethod.allCases)
    func changingPages(method: CompressionMethod) throws {
        let bench = try Bench()
        let isOver = Atomic(false)
        let source = bench.source
        let guest = try HostThread(name: "guest") {
            var generator = SeededRandom(seed: 5)
            while !isOver.load(ordering: .relaxed) {
                for _ in 0..<64 {
                    let place = Int(generator.next() % UInt64(Bench.pages * 512)) * 8
                    source.store(generator.next() & 0x0f0f, at: place)
                }
            }
        }
        defer {
            isOver.store(true, ordering: .relaxed)
            guest.join()
        }
        let all = Array(0..<Bench.pages)
        for level in [0, 1, 6] {
            var compressor = try PageCompressor(method, level: level)
            var decompressor = try PageDecompressor(method)
            for _ in 0..<12 {
                let size = try compressor.compress(Bench.ranges(all, in: source), into: bench.buffer)
                try decompressor.decompress(bench.buffer, count: size, into: Bench.ranges(all, in: bench.target))
            }
        }
        #expect(bench.target.load(at: 0, as: UInt64.self) & ~0x0f0f == 0)
    }

    // MARK: What comes from outside

    /// A packet of `pages` pages half full of noise, in the bench's buffer.
    private func packet(_ bench: Bench, _ method: CompressionMethod, pages: Int) throws -> Int {
        var generator = SeededRandom(seed: 9)
        for page in 0..<pages { bench.fill(page, noise: 60, using: &generator) }
        var compressor = try PageCompressor(method, level: 1)
        return try compressor.compress(Bench.ranges(Array(0..<pages), in: bench.source), into: bench.buffer)
    }

    private func unpack(
        _ bench: Bench, _ method: CompressionMethod, count: Int, pages: Int
    ) throws -> CompressionError? {
        var decompressor = try PageDecompressor(method)
        do throws(CompressionError) {
            try decompressor.decompress(
                bench.buffer, count: count, into: Bench.ranges(Array(0..<pages), in: bench.target))
            return nil
        } catch { return error }
    }

    @Test("a packet that was cut off is refused, wherever it was cut", arguments: CompressionMethod.allCases)
    func truncated(method: CompressionMethod) throws {
        let bench = try Bench()
        let size = try packet(bench, method, pages: 2)
        // The last bytes are the mark of the flush: the pages may be whole without it.
        for count in 0..<(size - 8) where count % 13 == 0 || count < 8 {
            switch try unpack(bench, method, count: count, pages: 2) {
            case .tooShort(method, let missing): #expect(missing > 0 && missing <= 8192)
            case let other: Issue.record("cut at \(count) of \(size): \(other.map { "\($0)" } ?? "accepted")")
            }
        }
        #expect(try unpack(bench, method, count: size, pages: 2) == nil)
    }

    @Test(
        "a packet that holds more than its pages is refused, and nothing is written behind them",
        arguments: CompressionMethod.allCases)
    func tooLong(method: CompressionMethod) throws {
        let bench = try Bench()
        let size = try packet(bench, method, pages: 3)
        #expect(try unpack(bench, method, count: size, pages: 2) == .tooLong(method))
        #expect(bench.target.isZero(at: 2 * 4096, count: 126 * 4096))
        #expect(try unpack(bench, method, count: size, pages: 3) == nil)
        #expect(try unpack(bench, method, count: size, pages: 4) == .tooShort(method, missing: 4096))
        // Bytes behind the packet.
        bench.buffer.write([1, 2, 3, 4, 5, 6, 7, 8], at: size)
        #expect(try unpack(bench, method, count: size + 8, pages: 3) != nil)
    }

    @Test("a packet of few bytes that unpacks to very many stops at its pages", arguments: CompressionMethod.allCases)
    func bomb(method: CompressionMethod) throws {
        let bench = try Bench()
        var compressor = try PageCompressor(method, level: 1)
        // 64 MiB of zeros.
        let zeros = (0..<128).flatMap { _ in [MemoryRange(bench.source, offset: 0, count: 512 << 10)] }
        let size = try compressor.compress(zeros, into: bench.buffer)
        #expect(size < 1 << 20)
        #expect(try unpack(bench, method, count: size, pages: 128) == .tooLong(method))
    }

    @Test("random and mutated packets are unpacked or refused with a sentence", arguments: CompressionMethod.allCases)
    func fuzz(method: CompressionMethod) throws {
        let bench = try Bench()
        let size = try packet(bench, method, pages: 2)
        let good = bench.buffer.read(at: 0, count: size)
        for seed in 0..<400 {
            var generator = SeededRandom(seed: UInt64(seed))
            var bytes = good
            if seed % 4 == 0 {
                bytes = (0..<Int.random(in: 1...300, using: &generator)).map { _ in
                    .random(in: 0...255, using: &generator)
                }
            } else {
                for _ in 0..<Int.random(in: 1...4, using: &generator) {
                    bytes[Int.random(in: 0..<bytes.count, using: &generator) / (seed % 2 == 0 ? 1 : 40)] = .random(
                        in: 0...255, using: &generator)
                }
            }
            bench.buffer.write(bytes, at: 0)
            if let error = try unpack(bench, method, count: bytes.count, pages: 2) {
                #expect(
                    !error.description.contains("\n") && error.description.contains(method.rawValue), "seed \(seed)")
            }
            #expect(bench.target.isZero(at: 2 * 4096, count: 126 * 4096), "seed \(seed)")
        }
    }

    @Test("a zstd peer that asks for a window of more than 32 MiB is refused")
    func window() throws {
        let bench = try Bench()
        // A frame head with a window descriptor of 2^27 bytes, and an empty block.
        bench.buffer.write([0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x88, 0x01, 0x00, 0x00], at: 0)
        let error = try #require(try unpack(bench, .zstd, count: 9, pages: 1))
        #expect(error.description.contains("memory"), "\(error)")
    }

    @Test("a zlib peer that ends its stream, or wants a dictionary, is refused")
    func zlibEnds() throws {
        let bench = try Bench()
        // An empty stream, ended; a head with the dictionary's flag.
        bench.buffer.write([0x78, 0x9c, 0x03, 0x00, 0x00, 0x00, 0x00, 0x01], at: 0)
        #expect(try unpack(bench, .zlib, count: 8, pages: 1)?.description.contains("ends") == true)
        bench.buffer.write([0x78, 0xbb, 0x00, 0x00, 0x00, 0x01], at: 0)
        #expect(try unpack(bench, .zlib, count: 6, pages: 1)?.description.contains("dictionary") == true)
    }

    // MARK: Around it

    @Test("a level that does not exist is refused by name", arguments: CompressionMethod.allCases)
    func levels(method: CompressionMethod) throws {
        for level in [-1, method.levels.upperBound + 1, 1000] {
            #expect(throws: CompressionError.level(method, level)) { try method.check(level: level) }
            #expect(throws: CompressionError.level(method, level)) { _ = try PageCompressor(method, level: level) }
        }
        try method.check(level: method.levels.upperBound)
    }

    @Test("a machine without the library is told what to install")
    func absent() {
        let names = ["libgodwit-has-no-such-library.so.1"]
        let sentences = [
            #expect(throws: CompressionError.self) { _ = try ZlibLibrary(names) }?.description,
            #expect(throws: CompressionError.self) { _ = try ZstdLibrary(names) }?.description,
        ]
        for (sentence, package) in zip(sentences, ["zlib1g", "libzstd1"]) {
            #expect(sentence?.contains(package) == true && sentence?.contains("multifd-compression") == true)
        }
    }

    @Test(
        "packets that do not shrink go plain among the others, and both ends begin anew after each",
        arguments: CompressionMethod.allCases)
    func plainAmongOthers(method: CompressionMethod) throws {
        let bench = try Bench()
        var generator = SeededRandom(seed: 8)
        let size = 8 * 4096
        var packer = try PacketPacker(method, level: 1, packetBytes: size)
        var unpacker = try PacketUnpacker(method, packetBytes: size)
        var plain: [Bool] = []
        for packet in 0..<40 {
            let pages = (0..<8).map { (packet * 8 + $0) % Bench.pages }
            let isNoise = packet % 20 > 9
            for page in pages { bench.fill(page, noise: isNoise ? 256 : 10, using: &generator) }
            switch try packer.pack(Bench.ranges(pages, in: bench.source), byteCount: size, mayGoPlain: true) {
            case .plain:
                plain.append(true)
                for page in pages {
                    bench.target.copy(from: bench.source, at: page * 4096, count: 4096, to: page * 4096)
                }
                try unpacker.sawPlain()
            case .packed(let count):
                plain.append(false)
                #expect(count < size && count <= PacketUnpacker.longest(packetBytes: size))
                unpacker.buffer.copy(from: packer.buffer, at: 0, count: count)
                try unpacker.unpack(count: count, into: Bench.ranges(pages, in: bench.target))
            }
            #expect(bench.isEqual(pages), "packet \(packet)")
        }
        #expect(plain[..<10].allSatisfy { !$0 } && plain[10..<20].allSatisfy { $0 })
        #expect(plain[36...].contains(true) && plain[20..<30].contains(false))
        // To QEMU nothing may go plain.
        var strict = try PacketPacker(method, level: 1, packetBytes: size)
        for page in 0..<8 { bench.fill(page, noise: 256, using: &generator) }
        for _ in 0..<3 {
            let contents = try strict.pack(
                Bench.ranges(Array(0..<8), in: bench.source), byteCount: size, mayGoPlain: false)
            #expect(contents != .plain)
        }
    }

    @Test("after packets that do not shrink fewer and fewer are tried, after one that does all are")
    func watch() {
        var watch = ShrinkWatch()
        func untilTried() -> Int {
            var skipped = 0
            while !watch.shouldTry() { skipped += 1 }
            return skipped
        }
        #expect(untilTried() == 0)
        for expected in [1, 2, 4, 8, 16, 16] {
            let isWorth = watch.isWorth(packed: 1000, plain: 1000)
            #expect(!isWorth)
            #expect(untilTried() == expected)
        }
        let isWorth = watch.isWorth(packed: 500, plain: 1000)
        #expect(isWorth)
        #expect(untilTried() == 0)
        #expect(untilTried() == 0)
    }
}
