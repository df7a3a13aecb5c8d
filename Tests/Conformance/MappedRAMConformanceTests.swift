import Glibc
import Host
import QMP
import TestSupport
import Testing

@Suite(
    "mapped-ram files pass between QEMU and Godwit", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: QEMU.knowsMappedRAM, "needs qemu-system-x86_64 9.0 or newer; name one in GODWIT_TEST_QEMU"))
struct MappedRAMConformanceTests {
    private let bench: Workbench
    private let byteCount: UInt64 = 33 << 20

    init() throws { bench = try Workbench() }

    private func setUp(_ vm: VM, channels: Int) throws {
        try vm.client.execute(
            "migrate-set-capabilities",
            [
                "capabilities": [
                    ["capability": "mapped-ram", "state": true],
                    ["capability": "multifd", "state": .bool(channels > 0)],
                ]
            ])
        if channels > 0 {
            try vm.client.execute("migrate-set-parameters", ["multifd-channels": JSON(channels)])
        }
    }

    private func expectEqual(_ image: MemoryImage, _ vm: VM) throws {
        try vm.saveMemory(image.byteCount, to: "\(bench.folder)/saved")
        #expect(try image.difference(from: "\(bench.folder)/saved") == nil)
    }

    @Test("a file that QEMU wrote loads here, eagerly and lazily", arguments: [0, 3])
    func fromQEMU(channels: Int) throws {
        let image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: .mixed, seed: 5)
        let source = try bench.startQEMU("source", byteCount: byteCount, ram: image.path)
        try setUp(source, channels: channels)
        let path = "\(bench.folder)/qemu.mapped"
        try source.migrate(to: "file:\(path)")
        try source.waitForMigration("completed")
        for options in [[], ["--restore-lazily"]] {
            let destination = try bench.startVM(
                "destination\(options.count)",
                ["--machine", "none", "--memory", "\(byteCount)", "--restore", path] + options)
            let received = try destination.waitForMigration("completed")["ram"]
            if options.isEmpty { #expect(received?["normal"] == JSON(image.dataPages)) }
            try expectEqual(image, destination)
        }
    }

    @Test("a file that Godwit wrote loads in QEMU", arguments: [0, 3])
    func toQEMU(channels: Int) throws {
        let image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: .mixed, seed: 6)
        let first = try bench.startQEMU("first", byteCount: byteCount, ram: image.path)
        let source = try bench.startVM(
            "source",
            ["--machine", "none", "--memory", "\(byteCount)", "--incoming", "unix:\(bench.folder)/socket"])
        try first.migrate(to: "unix:\(bench.folder)/socket")
        try source.waitForMigration("completed")

        let path = "\(bench.folder)/godwit.mapped"
        let saved = try bench.run(["save", "source", path, "--channels", "\(channels)", "--json"])
        #expect(saved.status == .exited(0), "\(saved)")
        let destination = try bench.startQEMU("destination", byteCount: byteCount, ["-incoming", "defer"])
        try setUp(destination, channels: channels)
        try destination.client.execute("migrate-incoming", ["uri": .string("file:\(path)")])
        try destination.waitForMigration("completed")
        try expectEqual(image, destination)
    }
}
