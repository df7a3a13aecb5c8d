import Glibc
import Host
import QMP
import TestSupport
import Testing

@Suite(
    "A postcopy whose connection breaks goes on over another one, to and from QEMU", .serialized,
    .timeLimit(.minutes(10)), .enabled(if: QEMU.isInstalled, "needs qemu-system-x86_64"))
struct PostcopyRecoveryConformanceTests {
    private let bench: Workbench
    private let byteCount: UInt64 = 96 << 20
    private let image: MemoryImage

    init() throws {
        bench = try Workbench()
        image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: .mixed, seed: 17)
    }

    struct Case: Sendable, CustomTestStringConvertible {
        let comesFromQEMU: Bool
        var preempts = false
        var encrypts = false

        var testDescription: String {
            (comesFromQEMU ? "from QEMU" : "to QEMU") + (preempts ? ", preempt" : "") + (encrypts ? ", TLS" : "")
        }
    }

    private static let cases = [
        Case(comesFromQEMU: true), Case(comesFromQEMU: true, preempts: true), Case(comesFromQEMU: false),
        Case(comesFromQEMU: false, preempts: true), Case(comesFromQEMU: false, preempts: true, encrypts: true),
    ]

    /// How a connection ends, one after the other.
    private enum Break: CaseIterable {
        case cut, pausedAtSource, pausedAtDestination, cutOne, stalledAndPaused
    }

    @Test("each time it breaks both sides pause, and go on where they were; every page is right", arguments: cases)
    func recovers(trip: Case) throws {
        guard try knows(trip) else { return }
        let (source, destination) = try start(trip)
        do { try recovers(trip, source, destination) } catch {
            let end = (trip.comesFromQEMU ? source : destination).process.wait(deadline: .after(seconds: 2))
            Issue.record(
                "\(error); the QEMU \(end.map { "ended: \($0)" } ?? "runs"); source: \(source.log); destination: \(destination.log)"
            )
        }
    }

    private func recovers(_ trip: Case, _ source: VM, _ destination: VM) throws {
        let proxy = try FaultyProxy(to: try destination.port())
        defer { proxy.close() }
        try source.migrate(to: proxy.uri)
        try source.waitForMigration("active")
        Clock.sleep(nanoseconds: 300_000_000)
        try source.client.execute("migrate-start-postcopy")
        try source.waitForMigration("postcopy-active")
        try destination.waitForMigration("postcopy-active")
        #expect(destination.wait(seconds: 5) { (try? destination.status()) == "running" })
        // Somebody waits for pages all the while.
        let path = "\(bench.folder)/saved"
        // (A QEMU that waits for a page accepts no connection.)
        let saving = trip.comesFromQEMU ? try read(destination, into: path) : nil
        for way in Break.allCases {
            Clock.sleep(nanoseconds: 150_000_000)
            try breakOff(way, proxy, source, destination)
            try source.waitForMigration("postcopy-paused")
            let paused = try destination.waitForMigration("postcopy-paused")
            #expect((paused["ram"]?["remaining"]?.integerValue(as: UInt64.self) ?? 1) > 0, "\(paused)")
            #expect(throws: (any Error).self) { try source.migrate(to: proxy.uri) }
            try recover(proxy, source, destination, hesitates: way == .cut && !trip.comesFromQEMU)
            try source.waitForMigration("postcopy-active")
            try destination.waitForMigration("postcopy-active")
        }
        try source.client.execute("migrate-set-parameters", ["max-postcopy-bandwidth": 0])
        try source.waitForMigration("completed")
        try destination.waitForMigration("completed")
        if let saving {
            saving.join()
            #expect(try image.difference(from: path) == nil, "what was read while it broke")
        }
        try expectEqual(destination)
        #expect(try source.status() == "postmigrate" && destination.status() == "running")
    }

    @Test("what does not fit is refused in QEMU's words, and pausing or recovering without postcopy too")
    func refusals() throws {
        let (source, destination) = try start(Case(comesFromQEMU: true))
        func refusal(_ vm: VM, _ command: String, _ arguments: JSON = [:], outOfBand: Bool = true) -> String {
            do {
                try vm.client.execute(command, arguments, outOfBand: outOfBand)
                return ""
            } catch { return "\(error)" }
        }
        for vm in [source, destination] {
            #expect(refusal(vm, "migrate-pause").contains("migrate-pause is currently only supported during postcopy"))
            #expect(
                refusal(vm, "migrate-recover", ["uri": "tcp:127.0.0.1:0"]).contains(
                    "Migrate recover can only be run when postcopy is paused."))
        }
        #expect(
            refusal(source, "migrate", ["uri": "tcp:127.0.0.1:1", "resume": true], outOfBand: false).contains(
                "Cannot resume if there is no paused migration"))
    }

    // MARK: Steps

    private func read(_ vm: VM, into path: String) throws -> HostThread {
        let reader = try QMPClient(path: "\(bench.runtime)/\(vm.name).qmp")
        return try HostThread(name: "pmemsave") { [byteCount] in
            _ = try? reader.execute(
                "pmemsave", ["val": 0, "size": JSON(byteCount), "filename": .string(path)],
                deadline: .after(seconds: 120))
        }
    }

    private func breakOff(_ way: Break, _ proxy: FaultyProxy, _ source: VM, _ destination: VM) throws {
        switch way {
        case .cut: proxy.cut()
        case .cutOne: if let last = proxy.connections.last { proxy.cut(connection: last) }
        case .pausedAtSource: try source.client.execute("migrate-pause", outOfBand: true)
        case .pausedAtDestination: try destination.client.execute("migrate-pause", outOfBand: true)
        case .stalledAndPaused:
            proxy.hold()
            try source.client.execute("migrate-pause", outOfBand: true)
            // It may hear of it all the same. Told to pause while it does, QEMU 7.2 shuts down a file that is none, and is gone.
            let pausedItself = destination.wait(seconds: 1) {
                (try? destination.migrationStatus()) == "postcopy-paused"
            }
            if !pausedItself { try destination.client.execute("migrate-pause", outOfBand: true) }
            try source.waitForMigration("postcopy-paused")
            try destination.waitForMigration("postcopy-paused")
            proxy.cut()
        }
    }

    private func recover(_ proxy: FaultyProxy, _ source: VM, _ destination: VM, hesitates: Bool) throws {
        func listen() throws {
            try destination.client.execute(
                "migrate-recover", ["uri": "tcp:127.0.0.1:0"], outOfBand: true)
            proxy.redirect(to: try destination.port())
        }
        // (A QEMU 10.0 that could not connect once does not notice later that its destination pauses.)
        if hesitates {
            // Nobody listens there; then elsewhere; then there.
            let closed = try Socket.localPort(of: Socket.listen(host: "127.0.0.1", port: "0")) ?? 1
            _ = try? source.client.execute("migrate", ["uri": .string("tcp:127.0.0.1:\(closed)"), "resume": true])
            try source.waitForMigration("postcopy-paused")
            try listen()
        }
        try listen()
        try source.client.execute("migrate", ["uri": .string(proxy.uri), "resume": true])
    }

    private func knows(_ trip: Case) throws -> Bool {
        let numbers = (QEMU.version ?? "0.0").split(separator: ".").compactMap { Int($0) }
        return !trip.preempts || numbers.count >= 2 && (numbers[0], numbers[1]) >= (7, 1)
    }

    private func start(_ trip: Case) throws -> (VM, VM) {
        let source: VM
        let destination: VM
        let arguments = ["--machine", "none", "--memory", "\(byteCount)"]
        if trip.comesFromQEMU {
            source = try bench.startQEMU("source", byteCount: byteCount, ram: image.path)
            destination = try bench.startVM("destination", arguments + ["--incoming", "defer"])
        } else {
            let first = try bench.startQEMU("first", byteCount: byteCount, ram: image.path)
            source = try bench.startVM("source", arguments + ["--incoming", "tcp:127.0.0.1:0"])
            try first.migrate(to: "tcp:127.0.0.1:\(try source.port())")
            try source.waitForMigration("completed")
            try first.client.execute("quit")
            var options = ["-incoming", "defer"]
            if trip.encrypts {
                try CertificateAuthority.writeKeys(
                    ["qemu": "9f5e4d3c2b1a00112233445566778899aabbccddeeff00112233445566778899"], to: keys)
                options += ["-object", "tls-creds-psk,id=tls0,dir=\(keys),endpoint=server"]
            }
            destination = try bench.startQEMU("destination", byteCount: byteCount, options)
            if trip.encrypts {
                try source.client.execute(
                    "object-add",
                    ["qom-type": "tls-creds-psk", "id": "tls0", "dir": .string(keys), "endpoint": "client"])
                for vm in [source, destination] {
                    try vm.client.execute("migrate-set-parameters", ["tls-creds": "tls0"])
                }
            }
        }
        let names = ["postcopy-ram"] + (trip.preempts ? ["postcopy-preempt"] : [])
        for vm in [source, destination] {
            try vm.client.execute(
                "migrate-set-capabilities",
                ["capabilities": .array(names.map { ["capability": .string($0), "state": true] })])
        }
        // Slow enough that much is missing when it breaks.
        try source.client.execute(
            "migrate-set-parameters", ["max-bandwidth": JSON(16 << 20), "max-postcopy-bandwidth": JSON(1 << 20)])
        try destination.client.execute("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
        return (source, destination)
    }

    private var keys: String { "\(bench.folder)/psk" }

    private func expectEqual(_ vm: VM) throws {
        let path = "\(bench.folder)/saved-again"
        try vm.saveMemory(byteCount, to: path)
        #expect(try image.difference(from: path) == nil)
    }
}
