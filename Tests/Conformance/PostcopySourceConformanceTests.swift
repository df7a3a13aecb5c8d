import Glibc
import Host
import QMP
import TestSupport
import Testing

@Suite(
    "Memory follows its guest from Godwit to QEMU, equal page by page", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: QEMU.isInstalled, "needs qemu-system-x86_64"))
struct PostcopySourceConformanceTests {
    private let bench: Workbench
    private let byteCount: UInt64 = 48 << 20
    private let image: MemoryImage

    init() throws {
        bench = try Workbench()
        image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: .mixed, seed: 11)
    }

    struct Case: Sendable, CustomTestStringConvertible {
        /// Requested pages have a channel of their own.
        let preempts: Bool
        /// Some of RAM goes before the guest.
        let sendsRounds: Bool
        var transport = "tcp"
        /// Every channel is TLS.
        var encrypts = false

        var testDescription: String {
            "\(preempts ? "preempt" : "one channel"), \(sendsRounds ? "rounds before" : "at once"), \(transport)"
                + (encrypts ? ", TLS" : "")
        }
    }

    private static let cases = [
        Case(preempts: false, sendsRounds: false), Case(preempts: false, sendsRounds: true, transport: "unix"),
        Case(preempts: true, sendsRounds: false, transport: "unix"), Case(preempts: true, sendsRounds: true),
        Case(preempts: false, sendsRounds: true, encrypts: true),
        Case(preempts: true, sendsRounds: true, encrypts: true),
    ]

    @Test("QEMU reads memory that is still here: every page comes when it is asked for, and once", arguments: cases)
    func requests(trip: Case) throws {
        guard try knows(trip) else { return }
        let source = try filledGodwit()
        let destination = try startQEMU("destination", trip)
        if trip.encrypts { try encrypt(source) }
        // So slow that what is read there must be asked for.
        try limit(source, precopy: 8 << 20, postcopy: 512 << 10)
        try turnOn(source, trip)
        try source.migrate(to: address(destination, trip))
        try source.waitForMigration("active")
        if trip.sendsRounds { try #require(try source.wait(seconds: 20) { try normalPages(source) > 500 }) }
        try source.client.execute("migrate-start-postcopy")
        try source.waitForMigration("postcopy-active")
        let before = try #require(try source.migration()["ram"])
        #expect(number(before, "precopy-bytes") > 0)
        #expect((number(before, "normal") > 500) == trip.sendsRounds)

        let began = Clock.monotonicNanoseconds
        try expectEqual(destination)
        let seconds = Double(Clock.monotonicNanoseconds - began) / 1e9
        let during = try source.migration()
        let ram = try #require(during["ram"])
        // All of it was asked for, or hardly anything is left.
        #expect(["postcopy-active", "completed"].contains(during["status"]?.stringValue))
        // The background alone would have taken longer than a minute.
        #expect(number(ram, "postcopy-requests") > 1000 && seconds < 20)
        print(
            "conformance: postcopy to QEMU \(QEMU.version ?? "?"), \(trip.testDescription): \(number(ram, "postcopy-requests")) "
                + "requests in \(Int(seconds * 1000)) ms")

        try source.client.execute("migrate-set-parameters", ["max-postcopy-bandwidth": 0])
        let end = try source.waitForMigration("completed")
        try destination.waitForMigration("completed")
        #expect(try source.status() == "postmigrate")
        #expect(destination.wait(seconds: 5) { (try? destination.status()) == "running" })
        try expectEqual(destination)
        // Nothing was sent twice, and every page that has something in it was sent.
        if !trip.sendsRounds { #expect(number(end["ram"], "normal") == image.dataPages) }
        #expect(number(end["ram"], "postcopy-bytes") > 4096 * 1000)
        #expect(number(end["ram"], "remaining") == 0)
        #expect(!destination.log.lowercased().contains("error"), "\(destination.log)")
    }

    @Test("nobody asks for anything: all memory follows as fast as it can", arguments: [false, true])
    func background(preempts: Bool) throws {
        let trip = Case(preempts: preempts, sendsRounds: false)
        guard try knows(trip) else { return }
        let source = try filledGodwit()
        let destination = try startQEMU("destination", trip)
        try limit(source, precopy: 1 << 20, postcopy: 0)
        try turnOn(source, trip)
        try source.migrate(to: address(destination, trip))
        try source.client.execute("migrate-start-postcopy")
        try source.waitForMigration("completed")
        try destination.waitForMigration("completed")
        try expectEqual(destination)
    }

    @Test("the command line moves the guest at once, and says how often it asked", arguments: [false, true])
    func commandLine(preempts: Bool) throws {
        let trip = Case(preempts: preempts, sendsRounds: false)
        guard try knows(trip) else { return }
        let source = try filledGodwit()
        let destination = try startQEMU("destination", trip)
        // Precopy alone would take longer than anybody waits.
        let outcome = try bench.run(
            ["migrate", source.name, address(destination, trip), "--bandwidth", "64K", "--postcopy", "after=0"]
                + (preempts ? ["--preempt"] : []))
        #expect(outcome.status == .exited(0), "\(outcome)")
        #expect(outcome.errors.contains("the guest moves now"), "\(outcome)")
        #expect(outcome.output.contains("postcopy ram: "), "\(outcome)")
        try destination.waitForMigration("completed")
        try expectEqual(destination)
        let capabilities = try source.client.execute("query-migrate-capabilities").arrayValue ?? []
        #expect(capabilities.contains { $0["capability"] == "postcopy-ram" && $0["state"] == false })
    }

    @Test("a QEMU that was not told of postcopy refuses it, and the guest goes on here")
    func notTold() throws {
        let trip = Case(preempts: false, sendsRounds: false)
        let source = try filledGodwit()
        let destination = try bench.startQEMU("destination", byteCount: byteCount, ["-incoming", "defer"])
        try turnOn(source, trip)
        try limit(source, precopy: 8 << 20, postcopy: 0)
        try source.migrate(to: address(destination, trip))
        let answer = try source.waitForMigration("failed")
        #expect(answer["error-desc"]?.stringValue?.isEmpty == false)
        #expect(try source.status() == "running")
        try expectEqual(source)
    }

    @Test(
        "the destination dies while memory follows: the source keeps what it has, stays stopped and still ends",
        arguments: [false, true])
    func lost(preempts: Bool) throws {
        let trip = Case(preempts: preempts, sendsRounds: false)
        guard try knows(trip) else { return }
        let source = try filledGodwit()
        let destination = try startQEMU("destination", trip)
        try limit(source, precopy: 1 << 20, postcopy: 1 << 20)
        try turnOn(source, trip)
        try source.migrate(to: address(destination, trip))
        try source.client.execute("migrate-start-postcopy")
        try source.waitForMigration("postcopy-active")
        destination.process.end(graceMilliseconds: 0)
        let answer = try source.waitForMigration("postcopy-paused")
        #expect(answer["error-desc"]?.stringValue?.contains("stays here") == true, "\(answer)")
        #expect(try source.status() == "postmigrate")
        for command in ["migrate_cancel", "cont"] {
            #expect(throws: (any Error).self) { try source.client.execute(command) }
        }
        #expect(throws: (any Error).self) { try source.migrate(to: "tcp:127.0.0.1:1") }
        // Nothing of it is gone.
        try expectEqual(source)
        try source.client.execute("quit")
        #expect(source.process.wait(deadline: .after(seconds: 10)) == .exited(0))
    }

    @Test("what does not go with postcopy is refused in a sentence before anything moves")
    func refusals() throws {
        let source = try filledGodwit()
        func refusal(_ command: String, _ arguments: JSON = [:]) -> String {
            do {
                try source.client.execute(command, arguments)
                return ""
            } catch { return "\(error)" }
        }
        #expect(
            refusal("migrate-start-postcopy").contains(
                "Enable postcopy with migrate_set_capability before the start of migration"))
        try turnOn(source, Case(preempts: false, sendsRounds: false))
        #expect(
            refusal("migrate-start-postcopy").contains("Postcopy must be started after migration has been started"))
        for uri in ["file:\(bench.folder)/file", "exec:cat > \(bench.folder)/file"] {
            #expect(refusal("migrate", ["uri": .string(uri)]).contains("postcopy-ram"))
        }
        #expect(try source.migrationStatus() == "completed" && source.status() == "running")
    }

    // MARK: Steps

    /// From 7.1 on there is a channel for requested pages.
    private func knows(_ trip: Case) throws -> Bool {
        let numbers = (QEMU.version ?? "0.0").split(separator: ".").compactMap { Int($0) }
        return !trip.preempts || numbers.count >= 2 && (numbers[0], numbers[1]) >= (7, 1)
    }

    private func number(_ json: JSON?, _ name: String) -> UInt64 { json?[name]?.integerValue(as: UInt64.self) ?? 0 }

    private func normalPages(_ vm: VM) throws -> UInt64 { number(try vm.migration()["ram"], "normal") }

    private func turnOn(_ vm: VM, _ trip: Case) throws {
        var list: [JSON] = [["capability": "postcopy-ram", "state": true]]
        if trip.preempts { list.append(["capability": "postcopy-preempt", "state": true]) }
        try vm.client.execute("migrate-set-capabilities", ["capabilities": .array(list)])
    }

    private func limit(_ vm: VM, precopy: Int, postcopy: Int) throws {
        try vm.client.execute(
            "migrate-set-parameters", ["max-bandwidth": JSON(precopy), "max-postcopy-bandwidth": JSON(postcopy)])
    }

    private var keys: String { "\(bench.folder)/psk" }

    private func encrypt(_ source: VM) throws {
        try source.client.execute(
            "object-add", ["qom-type": "tls-creds-psk", "id": "tls0", "dir": .string(keys), "endpoint": "client"])
        try source.client.execute("migrate-set-parameters", ["tls-creds": "tls0"])
    }

    private func startQEMU(_ name: String, _ trip: Case) throws -> VM {
        var options = ["-incoming", "defer"]
        if trip.encrypts {
            try CertificateAuthority.writeKeys(
                ["qemu": "9f5e4d3c2b1a00112233445566778899aabbccddeeff00112233445566778899"], to: keys)
            options += ["-object", "tls-creds-psk,id=tls0,dir=\(keys),endpoint=server"]
        }
        let vm = try bench.startQEMU(name, byteCount: byteCount, options)
        if trip.encrypts { try vm.client.execute("migrate-set-parameters", ["tls-creds": "tls0"]) }
        try turnOn(vm, trip)
        return vm
    }

    private func address(_ vm: VM, _ trip: Case) throws -> String {
        let path = "unix:\(bench.folder)/to-\(vm.name)"
        let address = trip.transport == "unix" ? path : "tcp:127.0.0.1:0"
        try vm.client.execute("migrate-incoming", ["uri": .string(address)])
        return trip.transport == "unix" ? path : "tcp:127.0.0.1:\(try vm.port())"
    }

    /// A Godwit that runs with the image as its memory.
    private func filledGodwit() throws -> VM {
        let first = try bench.startQEMU("first", byteCount: byteCount, ram: image.path)
        let vm = try bench.startVM(
            "source", ["--machine", "none", "--memory", "\(byteCount)", "--incoming", "tcp:127.0.0.1:0"])
        try first.migrate(to: "tcp:127.0.0.1:\(try vm.port())")
        try vm.waitForMigration("completed")
        try first.client.execute("quit")
        return vm
    }

    private func expectEqual(_ vm: VM) throws {
        let path = "\(bench.folder)/saved"
        try vm.saveMemory(byteCount, to: path)
        #expect(try image.difference(from: path) == nil)
    }
}
