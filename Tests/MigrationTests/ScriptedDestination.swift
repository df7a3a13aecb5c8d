import Host
import Testing

@testable import Migration
@testable import MigrationStream

/// A destination of postcopy by QEMU's rules, as a script: it reads one connection, answers PING, and asks for what the test says.
final class ScriptedDestination {
    /// What came of one page.
    struct Arrival: Equatable {
        var times = 0
        var bytes: [UInt8] = []
    }

    let main: Descriptor
    private var decoder: StreamDecoder
    private var buffer = ReceiveBuffer()
    private let blocks: [RAMBlockDescription]
    /// Pages by offset.
    var pages: [UInt64: Arrival] = [:]
    var discarded: [RAMDiscard.ByteRange] = []
    var package: [StreamItem] = []
    var items: [StreamItem] = []
    /// Whether DISCARD has its effect on `pages`.
    var forgets = false
    /// After so many bytes nothing is read any more.
    var bytesUntilCut = Int.max
    /// PINGs from this number on are heard and not answered.
    var deafFrom: UInt32 = .max

    /// Pages that came although they were there: a QEMU gives up over one.
    private(set) var repeated: [UInt64] = []
    private(set) var hasPackage = false

    init(_ main: Descriptor, byteCount: UInt64, catalogue: SectionCatalogue = SectionCatalogue()) {
        self.main = main
        blocks = [RAMBlockDescription(name: "ram", length: byteCount)]
        decoder = StreamDecoder(.load(blocks: blocks, catalogue: catalogue))
        decoder.allowsPostcopy = true
    }

    /// The next item; what comes with it is kept. - Returns: nil at the end of the connection.
    @discardableResult
    func next() throws -> StreamItem? {
        guard let item = try read(&decoder, &buffer, from: main) else { return nil }
        items.append(item)
        switch item {
        case .command(.ping(let value)): try pong(value)
        case .command(.postcopy(.discard(let discard))):
            discarded += discard.ranges
            if forgets {
                for range in discard.ranges {
                    for offset in stride(from: range.offset, to: range.offset + range.length, by: 4096) {
                        pages[offset] = nil
                    }
                }
            }
        case .command(.postcopy(.packaged(let count))):
            var inner = decoder.packageDecoder()
            var content = ReceiveBuffer()
            content.append(try take(Int(count)))
            decoder.payloadConsumed(Int(count))
            hasPackage = true
            while let item = try inner.next(from: &content) {
                package.append(item)
                if case .command(.ping(let value)) = item { try pong(value) }
            }
        default: break
        }
        return item
    }

    private func pong(_ value: UInt32) throws { if value < deafFrom { try say(.pong(value)) } }

    /// Reads on until an item is as it should be.
    func read(until isIt: (StreamItem) -> Bool) throws {
        while let item = try next() { if isIt(item) { return } }
        throw Obstacle("the source closed after \(items.suffix(3))")
    }

    func readToPackage() throws {
        try read { if case .command(.postcopy(.packaged)) = $0 { true } else { false } }
    }

    /// Reads a channel for requested pages until one more page came.
    func readPage(_ channel: Descriptor, _ decoder: inout StreamDecoder, _ buffer: inout ReceiveBuffer) throws {
        _ = try read(&decoder, &buffer, from: channel)
    }

    func urgentDecoder() -> StreamDecoder { .requestedPages(of: blocks) }

    func say(_ message: ReturnPathMessage) throws {
        var writer = StreamWriter()
        writer.message(message)
        try main.writeAll(writer.bytes)
    }

    func ask(_ offset: UInt64, length: UInt32 = 4096) throws {
        try say(.postcopy(.requestPages(PageRequest(block: "ram", offset: offset, length: length))))
    }

    private func read(
        _ decoder: inout StreamDecoder, _ buffer: inout ReceiveBuffer, from channel: Descriptor
    ) throws -> StreamItem? {
        while true {
            if let item = try decoder.next(from: &buffer) {
                switch item {
                case .page(_, let offset):
                    var bytes: [UInt8] = []
                    while bytes.count < 4096 {
                        let count = min(4096 - bytes.count, buffer.count)
                        bytes += (0..<count).map { buffer[$0] }
                        buffer.consume(count)
                        if bytes.count < 4096 { guard try fill(&buffer, from: channel) else { return nil } }
                    }
                    decoder.payloadConsumed(4096)
                    arrived(offset, bytes)
                case .zeroPage(_, let offset): arrived(offset, [UInt8](repeating: 0, count: 4096))
                default: break
                }
                return item
            }
            guard try fill(&buffer, from: channel) else { return nil }
        }
    }

    private func fill(_ buffer: inout ReceiveBuffer, from channel: Descriptor) throws -> Bool {
        guard bytesUntilCut > 0 else { return false }
        let bytes = try channel.read(upTo: min(1 << 16, bytesUntilCut)) ?? []
        bytesUntilCut -= bytes.count
        buffer.append(bytes)
        return !bytes.isEmpty
    }

    private func take(_ count: Int) throws -> [UInt8] {
        while buffer.count < count { guard try fill(&buffer, from: main) else { throw Obstacle("no package") } }
        let bytes = (0..<count).map { buffer[$0] }
        buffer.consume(count)
        return bytes
    }

    private func arrived(_ offset: UInt64, _ bytes: [UInt8]) {
        if hasPackage, pages[offset] != nil { repeated.append(offset) }
        pages[offset, default: Arrival()].times += 1
        pages[offset]?.bytes = bytes
    }

    struct Obstacle: Error, CustomStringConvertible {
        let description: String
        init(_ description: String) { self.description = description }
    }
}
