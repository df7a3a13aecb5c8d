import CommandLineKit
import Glibc
import GuestPrograms
import Host
import Testing

@testable import Benchmarks

@Suite("the benchmark of big guests")
struct BigGuestTests {
    private static func session(_ scale: BigGuestScale) -> BigGuestSession {
        BigGuestSession(scale: scale, options: BenchmarkOptions())
    }

    private static func sample(
        setup: Double = 1, total: Double, downtime: Double = 2, parts: [(String, Double)] = []
    ) -> BigGuestMigration.Sample {
        var sample = BigGuestMigration.Sample()
        sample.quantities = [
            "setup-ms": setup, "total-ms": total, "downtime-ms": downtime, "blackout-ms": downtime + 1,
        ]
        sample.parts = parts.map { (name: $0.0, milliseconds: $0.1) }
        return sample
    }

    @Test("the guests are those of the thread, and each fits its machine, QEMU's too")
    func cells() throws {
        let scale = BigGuestScale.full(runs: nil, hasQEMU: true)
        #expect(scale.cells.contains { $0.name == "godwit 512 GiB 40 5.1 GB" })
        #expect(scale.cells.contains { $0.name == "qemu 256 GiB 20 5.1 GB" })
        #expect(scale.cells.count { $0.vmm == .qemu } == PublishedMigration.all.count)
        #expect(!BigGuestScale.full(runs: nil, hasQEMU: false).cells.contains { $0.vmm == .qemu })
        #expect(scale.runs == 5 && BigGuestScale.quick(runs: nil).runs == 3)
        for cell in scale.cells + BigGuestScale.quick(runs: nil).cells {
            let memory = cell.gibibytes << 30
            let layout = QEMULayout(memoryBytes: memory)
            let low = cell.vmm == .qemu ? layout.guestLowBytes : min(memory, 3 << 30)
            let image = try GuestProgram(parsing: cell.guest).image(
                memoryBytes: cell.vmm == .qemu ? layout.guestBytes : memory, lowMemoryBytes: low, cpus: cell.cpuCount,
                tscKilohertz: 2_000_000)
            #expect(image.segments.allSatisfy { $0.physicalAddress + UInt64($0.bytes.count) < low })
            #expect(cell.neededBytes > 2 * cell.filledBytes)
        }
    }

    @Test("setup and downtime are the largest guest's, the ratio that of the same bytes in the same repetition")
    func promises() throws {
        var session = Self.session(.full(runs: nil, hasQEMU: false))
        for cell in session.scale.cells {
            let isCompared = cell.filledBytes != PublishedMigration.filledBytes
            session.samples[cell] =
                cell.gibibytes == 4
                ? [Self.sample(total: 100), Self.sample(total: 400), Self.sample(total: 100)]
                : isCompared
                    ? [Self.sample(total: 110), Self.sample(total: 440), Self.sample(total: 900)]
                    : [Self.sample(setup: Double(cell.gibibytes) / 8, total: 7, downtime: 21)]
        }
        func promise(_ name: String) throws -> BenchmarkPromise {
            try #require(session.promises.first { $0.name == name })
        }
        #expect(try promise("setup-512g-ms").value == 64 && !(try promise("setup-512g-ms").holds))
        #expect(try promise("downtime-512g-ms").value == 21)
        #expect(abs(try promise("total-512g-vs-4g").value - 1.1) < 1e-9)
        #expect(try promise("blackout-512g-ms").limit == nil)
        #expect(try promise("failed-big-guests").holds)
        session.samples = session.samples.filter { $0.key.gibibytes != 4 }
        #expect(!session.promises.contains { $0.name == "total-512g-vs-4g" })
    }

    @Test(
        "rows stand in one table with what was published, parts of the downtime in another, and a bar for each row in the figure"
    )
    func table() throws {
        var session = Self.session(.full(runs: nil, hasQEMU: true))
        for cell in session.scale.cells {
            session.samples[cell] = [
                Self.sample(total: 500, parts: cell.vmm == .godwit ? [("stop", 1), ("load", 3)] : [])
            ]
        }
        let result = BenchmarkResult(bench: "big-guests", runs: 1, cells: session.resultCells, promises: [])
        let rows = result.cells.filter { $0.parameters.first?.name == "vmm" }
        #expect(rows.count == session.scale.cells.count + PublishedMigration.all.count)
        let published = try #require(rows.first { $0.name == "published 512 GiB 40 5.1 GB" })
        #expect(published.median("downtime-ms") == 1508 && published.median("blackout-ms") == nil)
        #expect(result.cells.count - rows.count == 4)
        #expect(result.cells.last?.median("load-ms") == 3)
        let figure = try #require(BigGuestsBenchmark.figure(of: result))
        let markup = try WellFormedMarkup(figure.svg())
        #expect(markup.elements["title"] == 1 + 3 * rows.count)
    }

    @Test("a PC of QEMU has its memory behind 3 GiB at 4 GiB, and its firmware the end of what is below")
    func layouts() {
        let small = QEMULayout(memoryBytes: 2 << 30)
        #expect(small.guestBytes == 2 << 30 - 32 << 20 && small.guestLowBytes == small.guestBytes)
        #expect(small.physicalEnd == 2 << 30)
        let large = QEMULayout(memoryBytes: 512 << 30)
        #expect(large.guestLowBytes == 3 << 30 - 32 << 20)
        #expect(large.guestBytes == 512 << 30 - 32 << 20)
        #expect(large.physicalEnd == 513 << 30)
    }

    @Test("the gap is that between the last heartbeat here and the first there")
    func heartbeats() throws {
        let folder = try PrivateFolder("test")
        defer { folder.remove() }
        let listeners = try ["a", "b"].map { try Socket.listen(unix: "\(folder.path)/\($0)") }
        let watch = try HeartbeatWatch(source: "\(folder.path)/a", destination: "\(folder.path)/b")
        defer { watch.end() }
        let lines = try listeners.map { try #require(try Socket.accept($0, deadline: .after(seconds: 10))) }
        try lines[0].writeAll([46])
        Clock.sleep(nanoseconds: 400_000_000)
        try lines[0].writeAll([46, 46])
        Clock.sleep(nanoseconds: 50_000_000)
        try lines[1].writeAll([46])
        let gap = try watch.gapMilliseconds()
        #expect(gap >= 50 && gap < 400)
        // The source's line is late.
        try lines[0].writeAll([46])
        let deadline = Deadline.after(seconds: 10)
        while (try? watch.gapMilliseconds()) != nil {
            try #require(!deadline.hasPassed)
            Clock.sleep(nanoseconds: 1_000_000)
        }
        #expect(throws: CommandFailure.self) { try watch.gapMilliseconds() }
    }

    /// In a process of its own: what it has in memory is what the tests beside this one have, too.
    @Test(
        "warm memory goes piece by piece as processes grow, and comes back",
        .enabled(
            if: HostMemory.availableByteCount > 3 << 30,
            "less than 3 GiB are free here, and nothing is taken from others"))
    func warmMemory() async {
        await #expect(processExitsWith: .success) {
            let warm = try WarmMemory(byteCount: 256 << 20)
            defer { warm.end() }
            let before = ProcessMemory.residentBytes(of: getpid())
            #expect(before > 1 << 20 && ProcessMemory.residentBytes(of: -1) == 0)
            try warm.refill(BenchmarkOptions())
            let held = ProcessMemory.residentBytes(of: getpid())
            #expect(held > before + 192 << 20)
            // A process that takes nothing: the lead goes, and no more.
            warm.follow([-1])
            let deadline = Deadline.after(seconds: 30)
            while ProcessMemory.residentBytes(of: getpid()) > held - 128 << 20 {
                try #require(!deadline.hasPassed)
                Clock.sleep(nanoseconds: 5_000_000)
            }
            try warm.refill(BenchmarkOptions())
            #expect(ProcessMemory.residentBytes(of: getpid()) > held - 64 << 20)
        }
    }
}
