import CommandLineKit
import Glibc
import GuestPrograms
import Machine
import Testing

@testable import Benchmarks

@Suite("the benchmark of dirty tracking")
struct TrackingTests {
    private static func session(_ scale: TrackingScale, only: String? = nil) -> TrackingSession {
        TrackingSession(scale: scale, options: BenchmarkOptions(only: only))
    }

    private static func value(_ name: String, in session: TrackingSession) -> Double? {
        session.promises.first { $0.name == name }?.value
    }

    @Test("the worst load decides ring-vs-log, and the better method what auto is held against")
    func promises() throws {
        var session = Self.session(.quick(runs: nil))
        for cell in session.scale.cells {
            // Sequential 400 MB/s: log 100, ring 110, auto 105; unthrottled random: log 200, ring 150, auto 160.
            let totals: [TrackingMethod: Double] =
                cell.load.isRandom
                ? [.log: 200, .ring65536: 150, .auto: 160] : [.log: 100, .ring65536: 110, .auto: 105]
            // A repetition in which the machine was slow is slow for all, and does not count for more.
            let total = totals[cell.method]!
            session.migrations[cell] = [
                "total-ms": [total, total * 8, total / 2], "tracking-cpu-ms": [cell.method == .log ? 4 : 3],
            ]
        }
        #expect(Self.value("ring-vs-log", in: session) == 1.1)
        let auto = try #require(Self.value("auto-vs-best", in: session))
        #expect(abs(auto - 160.0 / 150) < 1e-9)
        #expect(Self.value("ring-cpu-vs-log-100mb", in: session) == 0.75)
        #expect(Self.value("ring-4096-vs-log", in: session) == nil)
    }

    @Test("a load without one of its methods promises nothing, and neither do limits of which one is missing")
    func incomplete() {
        var session = Self.session(.quick(runs: nil))
        for cell in session.scale.cells where cell.method != .auto || !cell.load.isRandom {
            session.migrations[cell] = ["total-ms": [1], "tracking-cpu-ms": []]
        }
        session.limits = [(50, [50]), (200, [200])]
        #expect(Self.value("ring-vs-log", in: session) == 1)
        #expect(Self.value("auto-vs-best", in: session) == nil)
        #expect(Self.value("ring-cpu-vs-log-100mb", in: session) == nil)
        #expect(Self.value("dirty-limit-error", in: session) == nil)
        session.limits = [(50, []), (200, []), (800, [])]
        #expect(session.promises.first { $0.name == "dirty-limit-error" }?.holds == false)
    }

    @Test("the error of limits counts in both directions; collections and gaps are compared by size")
    func besideMigrations() throws {
        var session = Self.session(.quick(runs: nil))
        session.limits = [(50, [48]), (200, [230]), (800, [800])]
        session.collections = [
            (CollectCell(gibibytes: 1, method: .ring65536), [2, 3, 4], [1]),
            (CollectCell(gibibytes: 512, method: .log), [90], [1]),
            (CollectCell(gibibytes: 512, method: .ring65536), [3, 3, 9], [1]),
        ]
        session.starts = [
            (1, .log, [1], [90], [1]), (512, .log, [1], [3, 4, 5], [1]), (512, .ring65536, [1], [7], [1]),
        ]
        let error = try #require(Self.value("dirty-limit-error", in: session))
        #expect(abs(error - 0.15) < 1e-9)
        #expect(Self.value("collect-512g-vs-1g", in: session) == 1)
        #expect(Self.value("start-gap-512g-ms", in: session) == 7)
        #expect(session.promises.first { $0.name == "start-gap-512g-ms" }?.limit == nil)
    }

    @Test("the full table has the cells the issue names, and QEMU's where it is installed")
    func cells() {
        let own = TrackingScale.full(runs: nil, hasQEMU: false).cells
        #expect(own.count == 4 * 2 * 4 && Set(own).count == own.count)
        #expect(TrackingScale.full(runs: nil, hasQEMU: true).cells.count { $0.vmm == .qemu } == 4 * 2 * 3)
        #expect(own.contains { $0.name == "godwit ring 4096 800 MB/s random" })
        #expect(TrackingScale.full(runs: nil, hasQEMU: false).runs >= 5)
        #expect(TrackingScale.quick(runs: nil).runs >= 5 && TrackingScale.quick(runs: nil).collectSamples >= 21)
        for load in TrackingLoad.all {
            #expect(throws: Never.self) { try GuestProgram(parsing: load.guest(workingSetMegabytes: 64)) }
        }
    }

    @Test("the figure shows a bar for each cell of each chart")
    func figure() throws {
        var session = Self.session(.quick(runs: nil))
        for cell in session.scale.cells { session.migrations[cell] = ["total-ms": [5], "downtime-ms": [1]] }
        session.starts = [(1, .log, [1], [2], [1])]
        let result = BenchmarkResult(bench: "tracking", runs: 1, cells: session.cells, promises: [])
        let figure = try #require(TrackingBenchmark.figure(of: result))
        #expect(figure.charts.count == 3)
        let markup = try WellFormedMarkup(figure.svg())
        // A title for each bar, and the picture's own.
        #expect(markup.elements["title"] == 1 + 2 * session.scale.cells.count + 2)
    }

    @Test("the ELF file starts by PVH, and its copying code has every low segment at hand")
    func pvhFile() throws {
        let memory: UInt64 = 64 << 20
        let guest = try GuestProgram(parsing: "dirty,working-set=4M")
        let image = try guest.image(
            memoryBytes: memory - (4 << 20), lowMemoryBytes: memory - (4 << 20), cpus: 1, tscKilohertz: 2_000_000)
        let file = PVHGuestFile.contents(image, stagingAddress: memory - (4 << 20))
        let kernel = try PVHKernel(
            file: "guest.elf", contents: file, ram: try RAMLayout(byteCount: memory, physicalAddressBits: 46))
        guard case .protected32(let entry, _) = kernel.plan.cpu else {
            Issue.record("it starts in \(kernel.plan.cpu)")
            return
        }
        #expect(UInt64(entry) == memory - (4 << 20))
        func loaded(at address: UInt64) -> [UInt8]? {
            kernel.plan.segments.first { $0.address == address }.map { Array($0.bytes) }
        }
        let staged = try #require(loaded(at: memory - (4 << 20)))
        var copied = 0
        for segment in image.segments {
            if segment.physicalAddress >= 1 << 20 {
                #expect(loaded(at: segment.physicalAddress) == segment.bytes)
            } else {
                #expect(staged.firstRange(of: segment.bytes) != nil)
                copied += 1
            }
        }
        #expect(copied > 0 && staged[0] == 0xFC)
        #expect(staged[..<4096].filter { $0 == 0xA5 }.count >= copied)
    }

    @Test("CPU time is read behind the program's name, whatever that holds")
    func processorTime() throws {
        let own = try ProcessorTime(process: getpid(), threads: [Int(getpid())])
        #expect(own.processMilliseconds >= 0 && own.threadMilliseconds > 0)
        #expect(throws: CommandFailure.self) { try ProcessorTime.ticks("/nonexistent") }
        #expect(throws: CommandFailure.self) { try ProcessorTime(process: -1, threads: []) }
    }
}
