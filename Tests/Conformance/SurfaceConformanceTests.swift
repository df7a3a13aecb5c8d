import Host
import QMP
import TestSupport
import Testing

@Suite(
    "What else a migration can be told means the same to QEMU and Godwit", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: QEMU.isInstalled, "needs qemu-system-x86_64"))
struct SurfaceConformanceTests {
    private let bench: Workbench
    private let byteCount: UInt64 = 16 << 20
    private let image: MemoryImage
    private static let one = "6b8f0d3e-1c52-4a7e-9f30-2d4c5b6a7988"
    private static let other = "6b8f0d3e-1c52-4a7e-9f30-2d4c5b6a7989"

    init() throws {
        bench = try Workbench()
        image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: .mixed, seed: 7)
    }

    private static let release: (major: Int, minor: Int) = {
        let numbers = (QEMU.version ?? "0.0").split(separator: ".").compactMap { Int($0) }
        return numbers.count >= 2 ? (numbers[0], numbers[1]) : (0, 0)
    }()

    fileprivate static func isAtLeast(_ major: Int, _ minor: Int) -> Bool { release >= (major, minor) }

    // MARK: Steps

    private func godwit(_ name: String, _ options: [String] = []) throws -> VM {
        try bench.startVM(
            name, ["--machine", "none", "--memory", "\(byteCount)", "--incoming", "tcp:127.0.0.1:0"] + options)
    }

    private func waiting(_ name: String, _ options: [String] = []) throws -> VM {
        try bench.startQEMU(name, byteCount: byteCount, ["-incoming", "defer"] + options)
    }

    private func set(_ vm: VM, _ capabilities: [String: Bool], _ parameters: [String: JSON] = [:]) throws {
        try vm.client.execute(
            "migrate-set-capabilities",
            [
                "capabilities": .array(
                    capabilities.map { ["capability": .string($0.key), "state": .bool($0.value)] })
            ])
        if !parameters.isEmpty { try vm.client.execute("migrate-set-parameters", .object(parameters)) }
    }

    private func listen(_ vm: VM) throws -> String {
        try vm.client.execute("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
        return "tcp:127.0.0.1:\(try vm.port())"
    }

    /// A Godwit that runs with the image as its memory.
    private func filled(_ name: String, _ options: [String] = []) throws -> VM {
        let first = try bench.startQEMU("first-\(name)", byteCount: byteCount, ram: image.path)
        let vm = try godwit(name, options)
        try first.migrate(to: "tcp:127.0.0.1:\(vm.port())")
        try vm.waitForMigration("completed")
        try first.client.execute("quit")
        return vm
    }

    private func expectEqual(_ vm: VM) throws {
        let path = "\(bench.folder)/saved"
        try vm.saveMemory(byteCount, to: path)
        #expect(try image.difference(from: path) == nil)
    }

    // MARK: UUID

    @Test("QEMU's UUID is compared with ours where validate-uuid says so, and ours with QEMU's")
    func uuid() throws {
        let validates = ["validate-uuid": true, "return-path": true]
        let qemu = try bench.startQEMU("qemu", byteCount: byteCount, ram: image.path, ["-uuid", Self.one])
        try set(qemu, validates)
        let stranger = try godwit("stranger", ["--uuid", Self.other])
        try qemu.migrate(to: "tcp:127.0.0.1:\(stranger.port())")
        try qemu.waitForMigration("failed")
        #expect(
            stranger.waitForLog("the source's UUID is \(Self.one), this machine's is \(Self.other)"), "\(stranger.log)")
        #expect(try stranger.status() == "inmigrate")
        let twin = try godwit("twin", ["--uuid", Self.one])
        #expect(try twin.client.execute("query-uuid") == qemu.client.execute("query-uuid"))
        try qemu.client.execute("cont")
        try qemu.migrate(to: "tcp:127.0.0.1:\(twin.port())")
        try twin.waitForMigration("completed")
        try expectEqual(twin)

        try set(twin, ["validate-uuid": true])
        let theirs = try waiting("theirs", ["-uuid", Self.other])
        try twin.migrate(to: listen(theirs))
        try twin.waitForMigration("failed")
        #expect(theirs.waitForLog(Self.other), "\(theirs.log)")
        #expect(try twin.status() == "running")
        let same = try waiting("same", ["-uuid", Self.one])
        try twin.migrate(to: listen(same))
        try twin.waitForMigration("completed")
        try same.waitForMigration("completed")
        try expectEqual(same)
    }

    @Test("channels of multifd carry the machine's UUID, without which a QEMU that has one refuses them")
    func channelUUID() throws {
        let multifd: [String: Bool] = ["multifd": true]
        let source = try filled("source", ["--uuid", Self.one])
        let flushes: [String: JSON] =
            Self.isAtLeast(8, 1) ? [:] : ["x-multifd-flush-after-each-section": true]
        try set(source, multifd, flushes.merging(["multifd-channels": 3]) { first, _ in first })
        let qemu = try waiting("qemu", ["-uuid", Self.one])
        try set(qemu, multifd, ["multifd-channels": 3])
        try source.migrate(to: listen(qemu))
        try source.waitForMigration("completed")
        try qemu.waitForMigration("completed")
        try expectEqual(qemu)
        let last = try bench.startVM(
            "last",
            ["--machine", "none", "--memory", "\(byteCount)", "--incoming", "defer", "--uuid", Self.one])
        try set(last, multifd, ["multifd-channels": 3])
        try qemu.client.execute("cont")
        try qemu.migrate(to: listen(last))
        try last.waitForMigration("completed")
        try expectEqual(last)
    }

    // MARK: Ways

    @Test("without return-path QEMU takes our one-way stream over a socket, over one channel and over several")
    func oneWay() throws {
        for channels in [0, 2] {
            let source = try filled("source\(channels)")
            let destination = try waiting("destination\(channels)")
            var parameters: [String: JSON] = channels > 0 ? ["multifd-channels": JSON(channels)] : [:]
            try set(destination, ["multifd": channels > 0], parameters)
            if channels > 0, !Self.isAtLeast(8, 1) { parameters["x-multifd-flush-after-each-section"] = true }
            try set(source, ["multifd": channels > 0, "return-path": false], parameters)
            try source.migrate(to: listen(destination))
            try source.waitForMigration("completed")
            #expect(try source.migration()["x-handover"] == "one-way")
            try destination.waitForMigration("completed")
            try expectEqual(destination)
        }
    }

    @Test(
        "both take `migrate` and `migrate-incoming` by channels",
        .enabled(if: SurfaceConformanceTests.isAtLeast(8, 2), "QEMU 8.2 and newer know channels"))
    func byChannels() throws {
        func channels(_ port: String) -> JSON {
            [
                "channels": [
                    [
                        "channel-type": "main",
                        "addr": ["transport": "socket", "type": "inet", "host": "127.0.0.1", "port": .string(port)],
                    ]
                ]
            ]
        }
        let source = try filled("source")
        let qemu = try waiting("qemu")
        try qemu.client.execute("migrate-incoming", channels("0"))
        try source.client.execute("migrate", channels(try qemu.port()))
        try source.waitForMigration("completed")
        try qemu.waitForMigration("completed")
        let last = try bench.startVM(
            "last", ["--machine", "none", "--memory", "\(byteCount)", "--incoming", "defer"])
        try last.client.execute("migrate-incoming", channels("0"))
        try qemu.client.execute("migrate", channels(try last.port()))
        try last.waitForMigration("completed")
        try expectEqual(last)
        // What neither takes.
        let one = channels("1")["channels"]?.arrayValue ?? []
        for vm in [try filled("again"), try bench.startQEMU("fresh", byteCount: byteCount)] {
            for wrong: JSON in [
                [:], ["uri": "tcp:127.0.0.1:1", "channels": .array(one)], ["channels": .array(one + one)],
                ["channels": [["channel-type": "main", "addr": ["transport": "socket", "type": "inet"]]]],
            ] { #expect(throws: (any Error).self, "\(vm.name): \(wrong)") { try vm.client.execute("migrate", wrong) } }
        }
    }

    @Test(
        "zero pages travel in the packets of channels, both ways",
        .enabled(if: SurfaceConformanceTests.isAtLeast(9, 0), "QEMU 9.0 and newer know zero pages in packets"),
        arguments: [1, 4])
    func zeroPagesInPackets(channels: Int) throws {
        let parameters: [String: JSON] = ["multifd-channels": JSON(channels), "zero-page-detection": "multifd"]
        let qemu = try bench.startQEMU("qemu", byteCount: byteCount, ram: image.path)
        try set(qemu, ["multifd": true, "return-path": true], parameters)
        let source = try bench.startVM(
            "source", ["--machine", "none", "--memory", "\(byteCount)", "--incoming", "defer"])
        try set(source, ["multifd": true], parameters)
        try qemu.migrate(to: listen(source))
        let told = try qemu.waitForMigration("completed")["ram"]
        try source.waitForMigration("completed")
        #expect(try source.migration()["ram"]?["duplicate"] == told?["duplicate"])
        try expectEqual(source)
        let destination = try waiting("destination")
        try set(destination, ["multifd": true], parameters)
        try source.migrate(to: listen(destination))
        try source.waitForMigration("completed")
        try destination.waitForMigration("completed")
        try expectEqual(destination)
    }

    // MARK: Names

    /// What this QEMU has and we do not know, and the other way round.
    private func difference(_ qemu: Set<String>, _ ours: Set<String>) -> (missing: [String], additional: [String]) {
        (qemu.subtracting(ours).sorted(), ours.subtracting(qemu).sorted())
    }

    @Test("every capability and parameter of QEMU is known here by its name; what is ours alone is listed")
    func names() throws {
        let qemu = try bench.startQEMU("qemu", byteCount: byteCount)
        let ours = try godwit("ours")
        func capabilities(_ vm: VM) throws -> Set<String> {
            Set(
                try vm.client.execute("query-migrate-capabilities").arrayValue?.compactMap {
                    $0["capability"]?.stringValue
                } ?? [])
        }
        func parameters(_ vm: VM) throws -> Set<String> {
            Set(try vm.client.execute("query-migrate-parameters").objectValue?.keys.map { $0 } ?? [])
        }
        let first = difference(try capabilities(qemu), try capabilities(ours))
        let second = difference(try parameters(qemu), try parameters(ours))
        print(
            "conformance: QEMU \(QEMU.version ?? "?"), capabilities: missing \(first.missing), additional \(first.additional)"
        )
        print(
            "conformance: QEMU \(QEMU.version ?? "?"), parameters: missing \(second.missing), additional \(second.additional)"
        )
        #expect(first.missing.isEmpty && second.missing.isEmpty)
        guard Self.isAtLeast(10, 0) else { return }
        // Those that QEMU has removed, and those of ours.
        #expect(first.additional == ["block", "compress", "x-postcopy-safety-net", "x-resumable", "x-verify"])
        #expect(
            second.additional == [
                "block-incremental", "compress-level", "compress-threads", "compress-wait-thread",
                "decompress-threads", "x-multifd-flush-after-each-section", "x-page-latency-target",
                "x-postcopy-channels", "x-postcopy-epoch", "x-postcopy-prefetch",
            ])
    }

    @Test("events come in the same order, but for the first pass, which QEMU tells before the migration is active")
    func events() throws {
        /// Without repetitions of passes, which are a matter of speed.
        func told(_ vm: VM) -> [String] {
            var told: [String] = []
            for event in vm.client.takeEvents() {
                let word: String
                switch event.name {
                case "MIGRATION": word = event.data["status"]?.stringValue ?? "?"
                case "MIGRATION_PASS": word = "pass"
                case "STOP": word = "STOP"
                default: continue
                }
                if word != "pass" || told.last != "pass" { told.append(word) }
            }
            return told
        }
        let qemu = try bench.startQEMU("qemu", byteCount: byteCount, ram: image.path)
        try set(qemu, ["events": true, "return-path": true, "pause-before-switchover": true])
        let source = try godwit("source")
        func move(_ vm: VM, to uri: String) throws {
            try vm.migrate(to: uri)
            try vm.waitForMigration("pre-switchover")
            try vm.client.execute("migrate-continue", ["state": "pre-switchover"])
            try vm.waitForMigration("completed")
        }
        try move(qemu, to: "tcp:127.0.0.1:\(source.port())")
        try source.waitForMigration("completed")
        _ = source.client.takeEvents()
        try set(source, ["pause-before-switchover": true])
        let destination = try waiting("destination")
        try move(source, to: listen(destination))
        var (theirs, ours) = (told(qemu), told(source))
        print("conformance: events of QEMU \(theirs), of Godwit \(ours)")
        let opening = ["setup", "active", "pass"]
        #expect(ours.starts(with: opening) && theirs.starts(with: ["setup", "pass", "active"]))
        ours.removeFirst(opening.count)
        theirs.removeFirst(opening.count)
        // Later passes are a matter of speed, up to the last one, with the guest stopped.
        #expect(ours.drop { $0 == "pass" } == theirs.drop { $0 == "pass" })
    }
}
