import Host
import Synchronization
import Testing

/// What one fault costs without a network: the floor under a requested page. Printed, for other work goes on beside tests.
@Suite(.serialized, .enabled(if: (try? UserFault.supportedFeatures()) != nil, "this process may have no userfaultfd"))
struct UserFaultLatencyTests {
    enum Way: String, CaseIterable, CustomTestStringConvertible {
        case copyToAnonymous = "anonymous, UFFDIO_COPY"
        case zeroInAnonymous = "anonymous, UFFDIO_ZEROPAGE"
        case copyToShared = "memfd, UFFDIO_COPY"
        case mapShared = "memfd, filled beside, UFFDIO_CONTINUE"
        case copyBeside = "memfd, UFFDIO_COPY through another mapping, UFFDIO_WAKE"
        case fillAndMap = "memfd, filled through another mapping on demand, UFFDIO_CONTINUE"
        var testDescription: String { rawValue }
        var isShared: Bool { self != .copyToAnonymous && self != .zeroInAnonymous }
        var isMinor: Bool { self == .mapShared || self == .fillAndMap }
    }

    private static let pages = 2000

    @Test(
        "a page that is at hand ends the fault of who touches it within a millisecond, in the middle",
        arguments: Way.allCases)
    func latency(_ way: Way) throws {
        let byteCount = Self.pages * 4096
        let file = try MemoryFile(name: "latency", byteCount: UInt64(byteCount))
        let guest =
            try way.isShared
            ? Mapping(file.descriptor, byteCount: byteCount) : Mapping(anonymousByteCount: byteCount)
        let source = try Mapping(anonymousByteCount: 4096)
        source.store(UInt64(1), at: 0)
        let alias = try Mapping(file.descriptor, byteCount: byteCount)
        if way == .mapShared {
            for page in 0..<Self.pages { alias.store(UInt64(1), at: page * 4096) }
        }
        let faults = try UserFault(wanting: .minorShared)
        try faults.register(guest, 0..<byteCount, way.isMinor ? [.missing, .minor] : .missing)
        if way == .copyBeside { try faults.register(alias, 0..<byteCount, .missing) }
        // The half of it that is the handler's: from having read the fault to having ended it.
        let placing = Mutex<[UInt64]>([])
        let server = try FaultServer(faults) { faults, fault in
            let began = Clock.monotonicNanoseconds
            let start = Int(fault.address - guest.hostAddress(at: 0)) / 4096 * 4096
            switch way {
            case .copyToAnonymous, .copyToShared:
                try faults.copy(source, at: 0, into: guest, start..<start + 4096)
            case .zeroInAnonymous: try faults.zero(guest, start..<start + 4096)
            case .mapShared: try faults.mapExisting(guest, start..<start + 4096)
            case .copyBeside:
                try faults.copy(source, at: 0, into: alias, start..<start + 4096)
                try faults.wake(guest, start..<start + 4096)
            case .fillAndMap:
                alias.copy(from: source, at: 0, count: 4096, to: start)
                try faults.mapExisting(guest, start..<start + 4096)
            }
            let ended = Clock.monotonicNanoseconds
            placing.withLock { $0.append(ended - began) }
        }
        let times = Mutex<[UInt64]>([])
        let touch = try Touch {
            for page in 0..<Self.pages {
                let began = Clock.monotonicNanoseconds
                let word = guest.load(at: page * 4096, as: UInt64.self)
                let ended = Clock.monotonicNanoseconds
                times.withLock { $0.append(word == (way == .zeroInAnonymous ? 0 : 1) ? ended - began : .max) }
            }
        }
        #expect(touch.hasEnded(within: 60_000))
        server.end()
        #expect(server.errors.isEmpty)
        let sorted = times.withLock { $0.sorted() }
        try #require(sorted.count == Self.pages)
        #expect(server.seen.count == Self.pages)
        print(
            "fault to wake, \(way.rawValue): \(Self.words(sorted)); of it placing \(Self.words(placing.withLock { $0.sorted() }))"
        )
        #expect(sorted[Self.pages / 2] < 1_000_000)
        #expect(sorted.last != .max)
    }

    private static func words(_ sorted: [UInt64]) -> String {
        let parts = [("p50", 50), ("p90", 90), ("p99", 99)].map { name, percent in
            "\(name) \(tenths(sorted[(sorted.count - 1) * percent / 100]))"
        }
        return parts.joined(separator: ", ") + ", max \(tenths(sorted[sorted.count - 1])) us"
    }

    private static func tenths(_ nanoseconds: UInt64) -> String {
        "\(nanoseconds / 1000).\(nanoseconds % 1000 / 100)"
    }
}
