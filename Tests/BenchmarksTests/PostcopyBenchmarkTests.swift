import CommandLineKit
import GuestPrograms
import Host
import QMP
import Testing

@testable import Benchmarks

@Suite("the benchmark of postcopy")
struct PostcopyBenchmarkTests {
    private static func session(_ scale: PostcopyScale = .full(runs: 3)) -> PostcopySession {
        PostcopySession(scale: scale, options: BenchmarkOptions())
    }

    private static func promise(_ name: String, _ session: PostcopySession) throws -> BenchmarkPromise {
        try #require(session.promises.first { $0.name == name })
    }

    @Test("as many huge pages are borrowed as two guests take, each rounded up")
    func borrowed() {
        func count(_ pages: BackingPages, _ megabytes: UInt64) -> UInt64 {
            HugePagePools.count(PostcopyCell(pages: pages, memoryMegabytes: megabytes))
        }
        #expect(count(.gigantic, 1024) == 2)
        #expect(count(.gigantic, 1025) == 4)
        #expect(count(.large, 1024) == 1024)
        #expect(count(.large, 3) == 4)
    }

    @Test("all page sizes, 1, 4 and 16 vCPUs, 1, 2 and 4 channels, and TLS are measured, each cell once")
    func cells() throws {
        let cells = PostcopyScale.full(runs: nil).cells
        #expect(Set(cells).count == cells.count && cells.first == PostcopyCell())
        #expect(Set(cells.map(\.pages)) == Set(BackingPages.allCases))
        for cpus in [1, 4, 16] {
            for channels in [1, 2, 4] {
                for isEncrypted in [false, true] {
                    #expect(
                        cells.contains(PostcopyCell(cpuCount: cpus, channels: channels, isEncrypted: isEncrypted)))
                }
            }
        }
        #expect(PostcopyScale.full(runs: nil).runs >= 5)
        // Each huge cell has a small one to be held against, and each guest fits its machine.
        for cell in cells {
            var small = cell
            small.pages = .small
            #expect(cells.contains(small), "\(cell.name)")
            let memory = cell.memoryMegabytes << 20
            let image = try GuestProgram(parsing: cell.guest).image(
                memoryBytes: memory, lowMemoryBytes: memory, cpus: cell.cpuCount, tscKilohertz: 2_000_000)
            #expect(image.segments.allSatisfy { $0.physicalAddress + UInt64($0.bytes.count) < memory })
        }
    }

    private static func histogram(_ counts: [Int: UInt64], kilohertz: Int = 1_000_000) -> JSON {
        let all = (0..<GuestHistogram.bucketCount).map { JSON(counts[$0] ?? 0) }
        return ["tsc-kilohertz": JSON(kilohertz), "counts": .array(all)]
    }

    @Test("of the guest's accesses at the destination the slowest count, as many as pages were fetched")
    func probe() throws {
        // At a tick per nanosecond bucket 80 is 1024 to 1152 ns, bucket 136 is 131072 to 147456 ns.
        let here = Self.histogram([80: 1000, 200: 5])
        let there = Self.histogram([80: 9000, 136: 90, 160: 10, 200: 5])
        let latency = try ProbeLatency(from: here, to: there, fetched: 100)
        #expect(latency.count == 100)
        #expect(latency.microseconds(atMille: 500) == 139.264)
        #expect(latency.microseconds(atMille: 900) == 139.264)
        #expect(latency.microseconds(atMille: 901) == 1114.112)
        #expect(latency.microseconds(atMille: 1000) == 1114.112)
        let more = try ProbeLatency(from: here, to: there, fetched: 200)
        #expect(more.microseconds(atMille: 500) == 1.088)
    }

    @Test("a guest that does not tell, or waited for nothing, is no measurement")
    func silence() {
        let told = Self.histogram([80: 1])
        #expect(throws: CommandFailure.self) { try ProbeLatency(from: told, to: told, fetched: 10) }
        #expect(throws: CommandFailure.self) { try ProbeLatency(from: [:], to: told, fetched: 10) }
        #expect(throws: CommandFailure.self) {
            try ProbeLatency(from: told, to: ["tsc-kilohertz": 1, "counts": [1, 2]], fetched: 10)
        }
        #expect(throws: CommandFailure.self) { try PageTimes(["status": "completed"], of: "it") }
        #expect(throws: CommandFailure.self) {
            try PageTimes(["x-postcopy-latency-ns": ["count": 5, "p50": 1, "p90": 2, "max": 3]], of: "it")
        }
        #expect(throws: CommandFailure.self) {
            try PageTimes(["x-postcopy-latency-ns": ["count": 0, "p50": 0, "p90": 0, "p99": 0, "max": 0]], of: "it")
        }
    }

    @Test(
        "promises are those of the worst cell at full speed, huge pages held against small ones of the same repetition")
    func promises() throws {
        var session = Self.session()
        for cell in session.scale.cells {
            let isWorst = cell.cpuCount == 16 && cell.channels == 1 && cell.isEncrypted
            session.samples[cell] = [1.0, 3, 2].map { factor in
                [
                    "p50-vs-floor": isWorst ? 1.9 : cell.capMegabytes == nil ? 1.1 : 50,
                    "p99-vs-floor": isWorst ? 4.9 : cell.capMegabytes == nil ? 2 : 50,
                    "guest-p50-vs-floor": 9, "guest-p99-vs-floor": 90, "guest-p50-us": 50,
                    "guest-p99-us": cell.pages == .gigantic ? 140 * factor : 100 * factor,
                ]
            }
        }
        session.totals = [(130, 100), (90, 100), (120, 100)]
        #expect(try Self.promise("p50-vs-floor", session).value == 1.9)
        #expect(try Self.promise("p99-vs-floor", session).value == 4.9)
        let huge = try Self.promise("huge-p99-vs-4k", session).value
        #expect(abs(huge - 1.4) < 1e-9)
        #expect(try Self.promise("total-vs-precopy", session).value == 1.2)
        #expect(session.promises.allSatisfy { $0.holds })
        #expect(session.resultCells.contains { $0.name == "1 GiB with it" && $0.median("mean-us") == 649_000 })
        #expect(
            PostcopyBenchmark.figure(
                of: BenchmarkResult(bench: "postcopy", runs: 3, cells: session.resultCells, promises: []))?.charts.count
                == 2)
        session.failures = 1
        #expect(try !Self.promise("failed-postcopies", session).holds)
    }

    @Test("a cell of which every run failed keeps no promise")
    func failedCell() throws {
        var session = Self.session()
        session.samples[PostcopyCell()] = [["p50-vs-floor": 1, "p99-vs-floor": 1]]
        session.samples[PostcopyCell(cpuCount: 4)] = [nil]
        session.failures = 1
        #expect(try !Self.promise("p50-vs-floor", session).holds)
        #expect(try !Self.promise("p99-vs-floor", session).holds)
        #expect(try !Self.promise("total-vs-precopy", session).holds)
    }

    @Test(
        "the floor is told of both transports, and a fault alone costs less than it",
        .enabled(if: (try? UserFault.supportedFeatures()) != nil, "this process may have no userfaultfd"),
        arguments: [false, true])
    func floor(isEncrypted: Bool) throws {
        let folder = try PrivateFolder("floor")
        defer { folder.remove() }
        let floor = try PageFloor.measure(tls: isEncrypted ? try ChannelStream.keys(in: folder.path) : nil)
        print("floor, \(isEncrypted ? "TLS" : "TCP"): round trip \(floor.roundTrip) ns, fault \(floor.fault) ns")
        #expect(floor.fault > 500 && floor.roundTrip > 1000 && floor.sum < 100_000_000)
        #expect(floor.fault < floor.sum && floor.sum.isFinite)
    }
}
