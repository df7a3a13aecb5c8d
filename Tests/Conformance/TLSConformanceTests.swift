import Host
import QMP
import TestSupport
import Testing

@Suite(
    "RAM travels between QEMU and Godwit through TLS", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: QEMU.isInstalled, "needs qemu-system-x86_64"))
struct TLSConformanceTests {
    private let bench: Workbench

    init() throws { bench = try Workbench() }

    private static let byteCount: UInt64 = 48 << 20

    @Test(
        "QEMU to Godwit, and from there to another QEMU, with both ends checked", arguments: TLSKind.allCases,
        ["tcp", "unix"])
    func roundTrip(kind: TLSKind, transport: String) throws {
        guard kind.canBeMade else {
            print("conformance: TLS with certificates skipped, the program openssl is not installed")
            return
        }
        let folder = try bench.makeCredentials(kind)
        let image = try MemoryImage(
            "\(bench.folder)/image", byteCount: Self.byteCount, content: .mixed, seed: 7)
        let first = try bench.startQEMU(
            "first", byteCount: Self.byteCount, ram: image.path, kind.object(folder, "client", by: "-object"))
        let second = try bench.startVM(
            "second",
            ["--machine", "none", "--memory", "\(Self.byteCount)", "--incoming", "defer"]
                + kind.object(folder, "server"))
        try move(first, to: second, transport)
        try expectEqual(image, second)
        #expect(second.log.contains("TLS 1.3, TLS_"), "\(second.log)")
        #expect(second.log.contains(kind == .psk ? "the peer is 'qemu'" : "the peer is 'CN=source,O="), "\(second.log)")

        // The same process sends on, with credentials for that.
        try second.client.execute("object-del", ["id": "tls0"])
        try second.client.execute(
            "object-add",
            [
                "qom-type": .string("tls-creds-\(kind.rawValue)"), "id": "tls0", "dir": .string(folder),
                "endpoint": "client",
            ])
        let third = try bench.startQEMU(
            "third", byteCount: Self.byteCount, kind.object(folder, "server", by: "-object") + ["-incoming", "defer"])
        try move(second, to: third, transport)
        try expectEqual(image, third)
    }

    @Test("a QEMU that speaks plaintext is refused, and a real one still gets in")
    func plaintext() throws {
        let folder = try bench.makeCredentials(.psk)
        let image = try MemoryImage(
            "\(bench.folder)/image", byteCount: Self.byteCount, content: .mixed, seed: 8)
        let source = try bench.startQEMU(
            "source", byteCount: Self.byteCount, ram: image.path, TLSKind.psk.object(folder, "client", by: "-object"))
        let destination = try bench.startVM(
            "destination",
            [
                "--machine", "none", "--memory", "\(Self.byteCount)", "--incoming", "tcp:127.0.0.1:0", "--tls-creds",
                "tls0",
            ]
                + TLSKind.psk.object(folder, "server"))
        let uri = "tcp:127.0.0.1:\(try destination.port())"
        try source.migrate(to: uri)
        try source.waitForMigration("failed")
        #expect(destination.waitForLog("what it sent is not TLS"), "\(destination.log)")
        try source.client.execute("migrate-set-parameters", ["tls-creds": "tls0"])
        try source.migrate(to: uri)
        try source.waitForMigration("completed")
        try expectEqual(image, destination)
    }

    // MARK: Steps

    private func move(_ source: VM, to destination: VM, _ transport: String) throws {
        try destination.client.execute("migrate-set-parameters", ["tls-creds": "tls0"])
        let path = "unix:\(bench.folder)/to-\(destination.name)"
        let address = transport == "unix" ? path : "tcp:127.0.0.1:0"
        try destination.client.execute("migrate-incoming", ["uri": .string(address)])
        // A socket file has no name that a certificate could have.
        try source.client.execute(
            "migrate-set-parameters",
            ["tls-creds": "tls0", "tls-hostname": .string(transport == "unix" ? "localhost" : "")])
        try source.migrate(to: transport == "unix" ? path : "tcp:127.0.0.1:\(try destination.port())")
        try source.waitForMigration("completed")
        try destination.waitForMigration("completed")
    }

    private func expectEqual(_ image: MemoryImage, _ vm: VM) throws {
        #expect(vm.wait(seconds: 5) { (try? vm.status()) == "running" }, "\(vm.log)")
        let path = "\(bench.folder)/saved"
        try vm.saveMemory(image.byteCount, to: path)
        #expect(try image.difference(from: path) == nil)
    }
}
