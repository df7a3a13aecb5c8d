import Glibc
import Host
import QMP
import TestSupport
import Testing

@Suite(
    "A QEMU source's memory arrives after its guest, equal page by page", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: QEMU.isInstalled, "needs qemu-system-x86_64"))
struct PostcopyConformanceTests {
    private let bench: Workbench
    private let byteCount: UInt64 = 96 << 20

    init() throws { bench = try Workbench() }

    struct Case: Sendable, CustomTestStringConvertible {
        var content = MemoryImage.Content.mixed
        /// Milliseconds of precopy.
        var precopy: UInt64 = 0
        var backing = "anonymous"
        var preempts = false
        var transport = "tcp"

        var testDescription: String {
            "\(content.rawValue), \(precopy == 0 ? "at once" : "after \(precopy) ms"), \(backing)\(preempts ? ", preempt" : ""), \(transport)"
        }
    }

    private static let cases = [
        Case(), Case(content: .data, precopy: 600), Case(precopy: 600, backing: "memfd", transport: "unix"),
        Case(content: .zero), Case(precopy: 400, preempts: true),
        Case(content: .data, backing: "memfd", preempts: true),
    ]

    @Test("pages are asked for as they are touched, while others arrive", arguments: cases)
    func arrives(trip: Case) throws {
        let image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: trip.content, seed: 11)
        let (source, destination) = try start(trip, image)
        try source.migrate(to: uri(destination, trip))
        if trip.precopy > 0 {
            // What was sent and not written since is not sent again.
            try source.waitForMigration("active")
            Clock.sleep(nanoseconds: trip.precopy * 1_000_000)
        }
        try source.client.execute("migrate-start-postcopy")
        try destination.waitForMigration("postcopy-active", "completed")
        #expect(destination.wait(seconds: 5) { (try? destination.status()) == "running" })
        // Reads faster than anything is sent: it waits for page after page.
        try expectEqual(image, destination)
        let told = try source.waitForMigration("completed", seconds: 60)
        let received = try destination.waitForMigration("completed", seconds: 60)
        try expectEqual(image, destination)
        #expect(try source.status() == "postmigrate" && destination.status() == "running")
        let asked = received["ram"]?["postcopy-requests"]?.integerValue(as: UInt64.self) ?? 0
        #expect(told["ram"]?["postcopy-requests"] == JSON(asked))
        #expect(received["ram"]?["remaining"] == 0)
        // No limit holds zeros back: on a busy host all of them, and the few pages between, may be here before anybody looks.
        #expect(asked > 0 || trip.content != .data, "\(received)")
        let latency = received["x-postcopy-latency-ns"]
        // A page may come with the rest between the touch and the question: who touched it waited, and nobody was asked.
        #expect(latency?["count"]?.integerValue(as: UInt64.self) ?? 0 >= asked, "\(received)")
        print(
            "conformance: postcopy with QEMU \(QEMU.version ?? "?"), \(trip.testDescription): \(asked) pages asked for, "
                + "\(latency ?? [:])")
        #expect(!destination.log.contains("lost"), "\(destination.log)")
    }

    @Test("a migration that may switch to postcopy and does not is like any other", arguments: [false, true])
    func notUsed(preempts: Bool) throws {
        let image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: .mixed, seed: 12)
        let trip = Case(preempts: preempts)
        let (source, destination) = try start(trip, image, limited: false)
        try source.migrate(to: uri(destination, trip))
        try source.waitForMigration("completed")
        try destination.waitForMigration("completed")
        try expectEqual(image, destination)
        #expect(try destination.migration()["ram"]?["postcopy-requests"] == 0)
    }

    @Test("a destination that was not told of postcopy refuses a source that was, with the remedy; the source goes on")
    func notTold() throws {
        let image = try MemoryImage("\(bench.folder)/image", byteCount: 8 << 20, content: .mixed, seed: 13)
        let source = try bench.startQEMU("source", byteCount: image.byteCount, ram: image.path)
        try turnOn(["postcopy-ram"], source)
        let destination = try bench.startVM(
            "destination", ["--machine", "none", "--memory", "\(image.byteCount)", "--incoming", "defer"])
        try source.migrate(to: uri(destination, Case()))
        #expect(destination.waitForLog("set the capability postcopy-ram"), "\(destination.log)")
        #expect(source.wait(seconds: 20) { (try? source.migrationStatus()) == "failed" })
        #expect(try source.status() == "running" && destination.status() == "inmigrate")
    }

    @Test("a source that dies after its guest moved: what arrived stays, and whoever needs none of the rest goes on")
    func sourceDies() throws {
        let image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: .data, seed: 14)
        let trip = Case(content: .data, precopy: 600)
        let (source, destination) = try start(trip, image)
        try source.migrate(to: uri(destination, trip))
        try source.waitForMigration("active")
        Clock.sleep(nanoseconds: 800_000_000)
        try source.client.execute("migrate-start-postcopy")
        try destination.waitForMigration("postcopy-active")
        #expect(destination.wait(seconds: 5) { (try? destination.status()) == "running" })
        source.process.signal(SIGKILL)
        let paused = try destination.waitForMigration("postcopy-paused")
        #expect(
            paused["error-desc"]?.stringValue?.contains("runs on as far as its memory is here") == true, "\(paused)")
        #expect((paused["ram"]?["remaining"]?.integerValue(as: UInt64.self) ?? 0) > 0)
        #expect(try destination.status() == "running")
        // The first pages came before the switch.
        let path = "\(bench.folder)/first"
        try destination.saveMemory(1 << 20, to: path)
        #expect(try Descriptor.contents(of: path) == Array(Descriptor.contents(of: image.path).prefix(1 << 20)))
        #expect(throws: (any Error).self) { try destination.migrate(to: "tcp:127.0.0.1:1") }
        _ = try? destination.client.execute("quit")
        #expect(destination.wait(seconds: 10) { destination.process.poll() != nil })
    }

    // MARK: Steps

    private func start(_ trip: Case, _ image: MemoryImage, limited: Bool = true) throws -> (VM, VM) {
        let source = try bench.startQEMU("source", byteCount: image.byteCount, ram: image.path)
        let destination = try bench.startVM(
            "destination",
            [
                "--machine", "none", "--memory", "\(image.byteCount)", "--memory-backing", trip.backing, "--incoming",
                "defer",
            ])
        for vm in [source, destination] {
            try turnOn(["postcopy-ram"] + (trip.preempts ? ["postcopy-preempt"] : []), vm)
        }
        if limited {
            // Slow enough that much is missing when it is touched.
            try source.client.execute(
                "migrate-set-parameters", ["max-bandwidth": JSON(32 << 20), "max-postcopy-bandwidth": JSON(48 << 20)])
        }
        return (source, destination)
    }

    private func turnOn(_ names: [String], _ vm: VM) throws {
        try vm.client.execute(
            "migrate-set-capabilities",
            ["capabilities": .array(names.map { ["capability": .string($0), "state": true] })])
    }

    /// Makes the VM wait. - Returns: where.
    private func uri(_ destination: VM, _ trip: Case) throws -> String {
        let path = "unix:\(bench.folder)/to-\(destination.name)"
        let address = trip.transport == "unix" ? path : "tcp:127.0.0.1:0"
        try destination.client.execute("migrate-incoming", ["uri": .string(address)])
        return trip.transport == "unix" ? path : "tcp:127.0.0.1:\(try destination.port())"
    }

    private func expectEqual(_ image: MemoryImage, _ vm: VM) throws {
        let path = "\(bench.folder)/saved"
        try vm.saveMemory(image.byteCount, to: path)
        #expect(try image.difference(from: path) == nil)
    }
}
