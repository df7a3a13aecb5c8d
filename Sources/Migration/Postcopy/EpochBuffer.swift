import Host
import MigrationStream

/// The bytes of one epoch, in memory of their own that is used again for the next: what a destination says of it, whole before any of it
/// leaves, and what a source heard, whole before any of it counts.
struct EpochBuffer: Sendable {
    /// A place for some bytes.
    struct Room: Sendable {
        let mapping: Mapping
        let offset: Int
    }

    private var chunks: [Mapping] = []
    private var used: [Int] = []
    /// Of `chunks`, that is being filled.
    private var current = 0
    private(set) var byteCount = 0

    private static let chunkBytes = 4 << 20

    mutating func removeAll() {
        for index in used.indices { used[index] = 0 }
        (current, byteCount) = (0, 0)
    }

    /// Gives the memory back to the host.
    mutating func release() { self = EpochBuffer() }

    private var left: Int { chunks.isEmpty ? 0 : chunks[current].byteCount - used[current] }

    /// Makes room for that many bytes in one piece. - Throws: `SystemError` if the host has no memory.
    mutating func room(_ count: Int) throws(SystemError) -> Room {
        while left < count {
            if current + 1 < chunks.count {
                current += 1
            } else {
                chunks.append(try Mapping(anonymousByteCount: max(count, Self.chunkBytes)))
                used.append(0)
                current = chunks.count - 1
            }
        }
        defer {
            used[current] += count
            byteCount += count
        }
        return Room(mapping: chunks[current], offset: used[current])
    }

    mutating func append(_ bytes: [UInt8]) throws(SystemError) {
        guard !bytes.isEmpty else { return }
        let room = try room(bytes.count)
        room.mapping.write(bytes, at: room.offset)
    }

    /// Copies pages that lie side by side, each run behind its head.
    mutating func append(pages: Range<UInt64>, of block: Int, from memory: Mapping) throws(SystemError) {
        var first = pages.lowerBound
        while first < pages.upperBound {
            let wanted = min(pages.upperBound - first, UInt64(EpochMessage.mostPages))
            let fitting = (left - EpochMessage.headBytes) / Wire.pageSize
            let count = fitting > 0 ? min(Int(wanted), fitting) : Int(wanted)
            let bytes = count * Wire.pageSize
            let room = try room(EpochMessage.headBytes + bytes)
            room.mapping.write(EpochMessage.pages(block: block, first: first, count: count).bytes, at: room.offset)
            room.mapping.copy(
                from: memory, at: Int(first) * Wire.pageSize, count: bytes, to: room.offset + EpochMessage.headBytes)
            first += UInt64(count)
        }
    }

    /// All bytes, in order.
    func forEachPiece<E: Error>(_ body: (Mapping, _ count: Int) throws(E) -> Void) throws(E) {
        for (chunk, count) in zip(chunks, used) where count > 0 { try body(chunk, count) }
    }
}
