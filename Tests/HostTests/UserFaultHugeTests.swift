import Glibc
import Host
import Synchronization
import Testing

/// The host's pool of 2 MiB pages: lets it grow by a few for as long as this lives, where this process may.
private final class HugePages: Sendable {
    static let byteCount = 2 << 20
    private static let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages"
    private let count: Int

    init?(_ count: Int) {
        self.count = count
        guard let number = Self.limit, Self.set(number + count) else { return nil }
    }

    /// Others may have changed it meanwhile: only ours go.
    deinit { if let number = Self.limit { _ = Self.set(max(0, number - count)) } }

    private static var limit: Int? {
        (try? Descriptor.contents(of: path)).flatMap { Int(String(decoding: $0, as: UTF8.self).filter(\.isNumber)) }
    }

    private static func set(_ number: Int) -> Bool {
        (try? Descriptor.open(path, O_WRONLY).writeAll(Array("\(number)".utf8))) != nil
    }

    /// Whether four can be had: asked for by touching them, which the kernel refuses without harm.
    static let canBeHad: Bool = {
        guard let pool = HugePages(4), let mapping = try? huge("probe", 4) else { return false }
        defer { withExtendedLifetime(pool) {} }
        return (try? mapping.advise(.populate)) != nil && (try? UserFault.supportedFeatures()) != nil
    }()

    static func huge(_ name: String, _ count: Int) throws -> Mapping {
        let file = try MemoryFile(name: name, byteCount: UInt64(count * byteCount), pageBytes: byteCount)
        return try Mapping(file.descriptor, byteCount: count * byteCount)
    }
}

/// One after the other: they take from one pool.
@Suite(.serialized, .enabled(if: HugePages.canBeHad, "huge pages or a userfaultfd cannot be had here"))
struct UserFaultHugeTests {
    private static func source() throws -> Mapping {
        let source = try Mapping(anonymousByteCount: 2 * HugePages.byteCount)
        for page in 0..<source.byteCount / 4096 { source.store(UInt64(page) + 1, at: page * 4096) }
        return source
    }

    private static func isRight(_ mapping: Mapping, _ range: Range<Int>) -> Bool {
        stride(from: range.lowerBound, to: range.upperBound, by: 4096)
            .allSatisfy { mapping.load(at: $0, as: UInt64.self) == UInt64($0 / 4096) + 1 }
    }

    @Test("a missing huge page is placed whole, and cannot be placed in part")
    func missing() throws {
        let (pool, faults) = (try #require(HugePages(4)), try UserFault())
        defer { withExtendedLifetime(pool) {} }
        let (source, guest) = (try Self.source(), try HugePages.huge("guest", 2))
        let able = try faults.register(guest, 0..<guest.byteCount, .missing)
        #expect(able.contains(.copy) && !able.contains(.zero))
        #expect {
            try faults.copy(source, at: 0, into: guest, 0..<4096, pageBytes: HugePages.byteCount)
        } throws: {
            ($0 as? SystemError)?.code == EINVAL
        }
        let server = try FaultServer(faults) { faults, fault in
            let start = Int(fault.address - guest.hostAddress(at: 0))
            try faults.copy(
                source, at: start, into: guest, start..<start + HugePages.byteCount, pageBytes: HugePages.byteCount)
        }
        let right = Atomic(false)
        let second = HugePages.byteCount..<2 * HugePages.byteCount
        let touch = try Touch { right.store(Self.isRight(guest, second), ordering: .relaxed) }
        #expect(touch.hasEnded())
        server.end()
        #expect(server.errors.isEmpty)
        #expect(right.load(ordering: .relaxed) == true)
        #expect(server.seen.map(\.address) == [guest.hostAddress(at: HugePages.byteCount)])
        // The one that is there stays; the other is placed.
        guest.store(UInt64(9), at: HugePages.byteCount)
        let placed = try faults.copy(
            source, at: 0, into: guest, 0..<guest.byteCount, pageBytes: HugePages.byteCount)
        #expect(placed == HugePages.byteCount)
        #expect(guest.load(at: HugePages.byteCount, as: UInt64.self) == 9)
        #expect(Self.isRight(guest, 0..<HugePages.byteCount))
    }

    @Test("a huge page filled in pieces through another mapping is mapped by one minor fault")
    func minor() throws {
        let (pool, faults) = (try #require(HugePages(4)), try UserFault(wanting: .minorHuge))
        try #require(faults.features.contains(.minorHuge))
        defer { withExtendedLifetime(pool) {} }
        let source = try Self.source()
        let file = try MemoryFile(name: "guest", byteCount: UInt64(source.byteCount), pageBytes: HugePages.byteCount)
        let guest = try Mapping(file.descriptor, byteCount: source.byteCount)
        let alias = try Mapping(file.descriptor, byteCount: source.byteCount)
        try faults.register(guest, 0..<guest.byteCount, [.missing, .minor])
        for offset in stride(from: 0, to: HugePages.byteCount, by: 4096) {
            alias.copy(from: source, at: offset, count: 4096, to: offset)
        }
        let server = try FaultServer(faults) { faults, fault in
            let start = Int(fault.address - guest.hostAddress(at: 0))
            try faults.mapExisting(guest, start..<start + HugePages.byteCount, pageBytes: HugePages.byteCount)
        }
        let right = Atomic(false)
        let touch = try Touch { right.store(Self.isRight(guest, 0..<HugePages.byteCount), ordering: .relaxed) }
        #expect(touch.hasEnded())
        server.end()
        #expect(server.errors.isEmpty && server.seen.map(\.isMinor) == [true])
        #expect(right.load(ordering: .relaxed) == true)
    }
}
