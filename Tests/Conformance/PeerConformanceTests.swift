import Glibc
import Host
import QMP
import TestSupport
import Testing

@Suite(
    "With QEMU as the peer, operators cancel and destinations refuse without harm", .serialized,
    .timeLimit(.minutes(10)), .enabled(if: QEMU.isInstalled, "needs qemu-system-x86_64"))
struct PeerConformanceTests {
    private let bench: Workbench
    private let byteCount: UInt64 = 24 << 20
    private let image: MemoryImage

    init() throws {
        bench = try Workbench()
        image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: .data, seed: 1)
    }

    @Test("a Godwit source cancels a slow migration to QEMU, goes on, and migrates to the next QEMU")
    func weCancel() throws {
        let source = try filledGodwit()
        let destination = try startQEMU("destination")
        try startSlowly(source, to: uri(of: destination))
        try source.client.execute("migrate_cancel")
        try source.waitForMigration("cancelled")
        #expect(try source.status() == "running")
        // QEMU gives up a destination whose source went away.
        #expect(destination.process.wait(deadline: .after(seconds: 10)) != nil)

        try source.client.execute("migrate-set-parameters", ["max-bandwidth": 0])
        let next = try startQEMU("next")
        try source.migrate(to: uri(of: next))
        try source.waitForMigration("completed")
        #expect(try source.migration()["x-handover"] == "qemu")
        try next.waitForMigration("completed")
        try next.saveMemory(byteCount, to: "\(bench.folder)/saved")
        #expect(try image.difference(from: "\(bench.folder)/saved") == nil)
    }

    @Test("a QEMU source cancels a slow migration to Godwit, and goes on; the destination says why it ended")
    func theyCancel() throws {
        let source = try bench.startQEMU("source", byteCount: byteCount, ram: image.path)
        let destination = try startGodwit("destination")
        try startSlowly(source, to: "tcp:127.0.0.1:\(destination.port())")
        try source.client.execute("migrate_cancel")
        try source.waitForMigration("cancelled")
        #expect(try source.status() == "running")
        #expect(destination.process.wait(deadline: .after(seconds: 10)) == .exited(1))
        // Which sentence it is depends on the byte after which QEMU closed.
        #expect(destination.log.split(separator: "\n").last?.hasPrefix("godwit: ") == true, "\(destination.log)")
        #expect(!destination.log.contains("migration completed"))
    }

    @Test("the operator of a QEMU destination ends it: our source says so, and goes on")
    func theirDestinationQuits() throws {
        let source = try filledGodwit()
        let destination = try startQEMU("destination")
        try startSlowly(source, to: uri(of: destination))
        try destination.client.execute("quit")
        try expectRefused(source)
    }

    @Test("the operator of a Godwit destination ends it: QEMU's source goes on")
    func ourDestinationQuits() throws {
        let source = try bench.startQEMU("source", byteCount: byteCount, ram: image.path)
        let destination = try startGodwit("destination")
        try startSlowly(source, to: "tcp:127.0.0.1:\(destination.port())")
        try destination.client.execute("quit")
        #expect(destination.process.wait(deadline: .after(seconds: 10)) == .exited(0))
        try source.waitForMigration("failed")
        #expect(try source.status() == "running")
    }

    @Test("a QEMU of another memory size refuses; our source says so in a sentence and stays as it was")
    func otherSize() throws {
        let source = try filledGodwit()
        for other in [byteCount / 2, byteCount * 2] {
            let destination = try bench.startQEMU("other-\(other)", byteCount: other, ["-incoming", "tcp:127.0.0.1:0"])
            try source.migrate(to: uri(of: destination))
            try expectRefused(source)
        }
        try expectStillWhole(source)
    }

    @Test("a Godwit of another memory size refuses QEMU's stream, says why, and waits on")
    func ourOtherSize() throws {
        let source = try bench.startQEMU("source", byteCount: byteCount, ram: image.path)
        let destination = try startGodwit("destination", byteCount * 2)
        try waitsForAnswer(source)
        try source.migrate(to: "tcp:127.0.0.1:\(destination.port())")
        #expect(destination.waitForLog("start both with the same memory size"), "\(destination.log)")
        try source.waitForMigration("failed")
        #expect(try source.status() == "running")
        #expect(try destination.status() == "inmigrate")
    }

    @Test("machines that are not the same refuse each other, by name, in both directions")
    func otherMachine() throws {
        let pc = try bench.startQEMU("pc", byteCount: byteCount, machine: "pc,accel=tcg", ["-S"])
        let destination = try startGodwit("destination")
        try waitsForAnswer(pc)
        try pc.migrate(to: "tcp:127.0.0.1:\(destination.port())")
        #expect(destination.waitForLog("the source is a 'pc-i440fx-"), "\(destination.log)")
        #expect(destination.log.contains("this one is 'none'"))
        try pc.waitForMigration("failed")
        #expect(try destination.status() == "inmigrate")

        let source = try filledGodwit()
        let other = try bench.startQEMU(
            "other", byteCount: byteCount, machine: "pc,accel=tcg", ["-incoming", "tcp:127.0.0.1:0"])
        try source.migrate(to: uri(of: other))
        try expectRefused(source)
        try expectStillWhole(source)
        #expect(other.waitForLog("none"), "\(other.log)")
    }

    // MARK: Steps

    /// Without its return path QEMU calls a migration completed once the kernel has taken the stream, read or not.
    private func waitsForAnswer(_ qemu: VM) throws {
        try qemu.client.execute(
            "migrate-set-capabilities", ["capabilities": [["capability": "return-path", "state": true]]])
    }

    private func startQEMU(_ name: String) throws -> VM {
        try bench.startQEMU(name, byteCount: byteCount, ["-incoming", "tcp:127.0.0.1:0"])
    }

    private func uri(of vm: VM) throws -> String { "tcp:127.0.0.1:\(try vm.port())" }

    private func startGodwit(_ name: String, _ size: UInt64? = nil) throws -> VM {
        try bench.startVM(
            name, ["--machine", "none", "--memory", "\(size ?? byteCount)", "--incoming", "tcp:127.0.0.1:0"])
    }

    /// A Godwit that runs with the image as its memory.
    private func filledGodwit() throws -> VM {
        let first = try bench.startQEMU("first", byteCount: byteCount, ram: image.path)
        let vm = try startGodwit("source")
        try first.migrate(to: uri(of: vm))
        try vm.waitForMigration("completed")
        try first.client.execute("quit")
        return vm
    }

    private func startSlowly(_ source: VM, to uri: String) throws {
        try source.client.execute("migrate-set-parameters", ["max-bandwidth": JSON(4 << 20)])
        try source.migrate(to: uri)
        try source.waitForMigration("active")
        // Some pages are there already.
        #expect(
            source.wait(seconds: 10) {
                ((try? source.migration())?["ram"]?["normal"]?.integerValue(as: Int.self) ?? 0) > 100
            })
    }

    private func expectRefused(_ source: VM) throws {
        let answer = try source.waitForMigration("failed")
        let words = answer["error-desc"]?.stringValue ?? ""
        // "the destination ended it" or "send to tcp:...": QEMU closes when it has seen enough.
        #expect(words.contains("destination") || words.contains("tcp:127.0.0.1:"), "\(answer)")
        #expect(!words.contains("\n"))
        #expect(try source.status() == "running")
    }

    private func expectStillWhole(_ vm: VM) throws {
        try vm.saveMemory(byteCount, to: "\(bench.folder)/saved")
        #expect(try image.difference(from: "\(bench.folder)/saved") == nil)
        for command in ["stop", "cont"] { try vm.client.execute(command) }
        #expect(try vm.status() == "running")
    }
}
