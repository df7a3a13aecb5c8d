import Host
import QMP
import TestSupport
import Testing

@Suite("Postcopy between two Godwits through TLS", .serialized, .timeLimit(.minutes(10)))
struct PostcopyTLSTests {
    private let bench: Workbench
    private static let byteCount: UInt64 = 8 << 20

    init() throws { bench = try Workbench() }

    @Test(
        "every page is asked for and comes on encrypted channels, also when their connections were lost on the way",
        arguments: [(TLSKind.psk, 1), (.psk, 3), (.x509, 1), (.x509, 3)], [false, true])
    func moves(_ terms: (kind: TLSKind, channels: Int), isLost: Bool) throws {
        guard terms.kind.canBeMade else {
            return print("postcopy: TLS with certificates skipped, the program openssl is not installed")
        }
        let folder = try bench.makeCredentials(terms.kind)
        let image = try MemoryImage("\(bench.folder)/image", byteCount: Self.byteCount, content: .mixed, seed: 11)
        let source = try startSource(image, terms.kind.object(folder, "client"))
        let destination = try bench.startVM(
            "destination",
            ["--machine", "none", "--memory", "\(Self.byteCount)", "--incoming", "defer"]
                + terms.kind.object(folder, "server"))
        for vm in [source, destination] {
            try vm.allowPostcopy(preempts: true)
            try vm.client.execute("migrate-set-parameters", ["tls-creds": "tls0"])
        }
        // What nobody asks for would take minutes.
        try source.client.execute(
            "migrate-set-parameters",
            [
                "max-bandwidth": JSON(512 << 10), "max-postcopy-bandwidth": JSON(16 << 10),
                "x-postcopy-channels": JSON(UInt64(terms.channels)),
            ])
        try destination.client.execute("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
        let uri = "tcp:127.0.0.1:\(try destination.port())"
        try source.migrate(to: uri)
        try source.client.execute("migrate-start-postcopy")
        for vm in [source, destination] { try vm.waitForMigration("postcopy-active") }
        let threads = destination.threadNames
        #expect(threads.filter { $0.hasPrefix("postcopy-recv-") }.count == terms.channels, "\(threads)")

        let path = "\(bench.folder)/saved"
        let outcome = try bench.savingMemory(of: destination, Self.byteCount, to: path, seconds: 60)
        if isLost {
            #expect(source.wait(seconds: 10) { (try? requests(at: source)) ?? 0 > 20 }, "nothing was asked for")
            try source.client.execute("migrate-pause")
            for vm in [source, destination] { try vm.waitForMigration("postcopy-paused") }
            #expect(outcome.withLock { $0 } == nil, "all was there before")
            try source.client.execute("migrate", ["uri": .string(uri), "resume": true])
        }
        let words = outcome.wait(deadline: .after(seconds: 40)) { $0 }
        #expect(words == "saved", "\(words ?? "it waits"): \(source.log)\(destination.log)")
        #expect(try image.difference(from: path) == nil)
        #expect(try requests(at: source) > 300)
        try source.client.execute("migrate-set-parameters", ["max-postcopy-bandwidth": JSON(UInt64(0))])
        for vm in [source, destination] { try vm.waitForMigration("completed") }
        try destination.saveMemory(Self.byteCount, to: path)
        #expect(try image.difference(from: path) == nil)
        #expect(destination.log.contains("TLS 1.3, TLS_"), "\(destination.log)")
        for vm in [source, destination] { try vm.client.execute("quit") }
    }

    private func requests(at vm: VM) throws -> UInt64 {
        try vm.migration()["ram"]?["postcopy-requests"]?.integerValue(as: UInt64.self) ?? 0
    }

    private func startSource(_ image: MemoryImage, _ options: [String]) throws -> VM {
        let path = "\(bench.folder)/source.stream"
        try Descriptor.create(path).writeAll(GarbageTests.stream(of: image))
        let vm = try bench.startVM(
            "source",
            ["--machine", "none", "--memory", "\(Self.byteCount)", "--incoming", "exec:cat \(path)"] + options)
        try vm.waitForMigration("completed")
        return vm
    }
}
