import Glibc
import Host

/// A file with what a guest's RAM shall hold, and the comparison with what it does hold.
public struct MemoryImage: Sendable {
    /// What the pages are like. Each kind holds the pages that fool a careless look: only the first or the last byte is not zero.
    public enum Content: String, Sendable, CaseIterable {
        case zero, data, mixed
    }

    public static let pageBytes = 4096
    public let path: String
    public let byteCount: UInt64
    /// Pages with a byte that is not zero, and those without.
    public private(set) var dataPages: UInt64 = 0
    public private(set) var zeroPages: UInt64 = 0

    /// Writes the file. Every page of data differs from every other.
    public init(_ path: String, byteCount: UInt64, content: Content, seed: UInt64) throws {
        self.path = path
        self.byteCount = byteCount
        let file = try Descriptor.create(path)
        try file.truncate(to: byteCount)
        guard content != .zero else {
            zeroPages = byteCount / UInt64(Self.pageBytes)
            return
        }
        let mapping = try Mapping(Descriptor.open(path, O_RDWR), byteCount: Int(byteCount))
        var random = SeededRandom(seed: seed)
        // Two pages of it: a page's contents begin anywhere in the first.
        let noise = (0..<1024).flatMap { _ in
            let word = random.next()
            return (0..<8).map { UInt8(truncatingIfNeeded: word >> ($0 * 8)) }
        }
        var left = 0
        var isData = true
        for page in 0..<Int(byteCount) / Self.pageBytes {
            if left == 0 {
                // Runs of every length, single pages most of all.
                left = 1 << Int(random.next() % 9)
                isData = content == .data || !isData
            }
            left -= 1
            guard isData else {
                zeroPages += 1
                continue
            }
            dataPages += 1
            let start = page * Self.pageBytes
            switch random.next() % 16 {
            case 0: mapping.store(UInt8(1), at: start)
            case 1: mapping.store(UInt8(1), at: start + Self.pageBytes - 1)
            default:
                let offset = Int(random.next() % 4096)
                mapping.write(noise[offset..<offset + Self.pageBytes], at: start)
                mapping.store(UInt64(page) | 1 << 63, at: start)
            }
        }
    }

    /// What differs in another file of the same size, as one sentence; `nil` if every page is equal.
    public func difference(from other: String) throws -> String? {
        let file = try Descriptor.open(other, O_RDONLY)
        let size = try file.size()
        guard size == byteCount else { return "\(other) has \(size) bytes, \(path) has \(byteCount)" }
        let mine = try Mapping(Descriptor.open(path, O_RDONLY), byteCount: Int(byteCount), readOnly: true)
        let theirs = try Mapping(file, byteCount: Int(byteCount), readOnly: true)
        var differing: [Int] = []
        for page in 0..<Int(byteCount) / Self.pageBytes {
            let start = page * Self.pageBytes
            let isEqual = unsafe mine.withBytes(at: start, count: Self.pageBytes) { left in
                unsafe theirs.withBytes(at: start, count: Self.pageBytes) { right in
                    // SAFETY: both buffers hold a page.
                    unsafe memcmp(left.baseAddress!, right.baseAddress!, Self.pageBytes) == 0
                }
            }
            if !isEqual { differing.append(page) }
        }
        guard let first = differing.first else { return nil }
        return "\(differing.count) pages of \(other) differ from \(path), the first is page \(first)"
    }
}
