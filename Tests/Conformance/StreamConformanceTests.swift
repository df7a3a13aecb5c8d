import Glibc
import Host
import MigrationStream
import QMP
import TestSupport
import Testing

@Suite(
    "Streams in files pass between QEMU and Godwit", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: QEMU.isInstalled, "needs qemu-system-x86_64"))
struct StreamConformanceTests {
    private let bench: Workbench
    private let byteCount: UInt64 = 33 << 20

    init() throws { bench = try Workbench() }

    @Test("a stream that QEMU wrote is decoded to the byte, its figures are QEMU's, and it loads here")
    func fromQEMU() throws {
        let image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: .mixed, seed: 5)
        let source = try bench.startQEMU("source", byteCount: byteCount, ram: image.path)
        let path = "\(bench.folder)/qemu.stream"
        try source.migrate(to: "exec:cat > \(path)")
        let figures = try source.waitForMigration("completed")["ram"]

        let size = try Descriptor.open(path, O_RDONLY).size()
        let stream = try JSON(parsing: bench.run(["stream", "--json", path]).output.utf8)
        #expect(stream["bytes"] == JSON(size) && stream["complete"] == true && stream["machine"] == "none")
        #expect(stream["blocks"]?[0]?["name"] == "ram" && stream["blocks"]?[0]?["length"] == JSON(byteCount))
        #expect(stream["blocks"]?[0]?["data-pages"] == figures?["normal"])
        #expect(stream["blocks"]?[0]?["zero-pages"] == figures?["duplicate"])
        #expect(figures?["normal"] == JSON(image.dataPages) && figures?["duplicate"] == JSON(image.zeroPages))
        #expect(
            figures?["transferred"]
                == JSON(QEMU.countsEveryByte ? size : try Self.transferredAsQEMUCounts(stream)))

        let destination = try startGodwit("destination", "exec:cat \(path)")
        let received = try destination.waitForMigration("completed")["ram"]
        #expect(received?["normal"] == figures?["normal"] && received?["duplicate"] == figures?["duplicate"])
        #expect(destination.wait(seconds: 5) { Self.transferred(try? destination.migration()) == size })
        try expectEqual(image, destination)
    }

    @Test(
        "a stream that Godwit wrote loads in QEMU, and its size is what Godwit says it sent",
        arguments: ["exec", "file"])
    func toQEMU(transport: String) throws {
        let image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: .mixed, seed: 6)
        let first = try bench.startQEMU("first", byteCount: byteCount, ram: image.path)
        let source = try startGodwit("source", "unix:\(bench.folder)/socket")
        try first.migrate(to: "unix:\(bench.folder)/socket")
        try source.waitForMigration("completed")

        let path = "\(bench.folder)/godwit.stream"
        try source.migrate(to: transport == "exec" ? "exec:cat > \(path)" : "file:\(path)")
        let sent = try source.waitForMigration("completed")
        let size = try Descriptor.open(path, O_RDONLY).size()
        #expect(Self.transferred(sent) == size)
        #expect(sent["ram"]?["normal"] == JSON(image.dataPages))

        let destination = try bench.startQEMU("destination", byteCount: byteCount, ["-incoming", "exec:cat \(path)"])
        try destination.waitForMigration("completed")
        try expectEqual(image, destination)
        #expect(!destination.log.contains("error"), "\(destination.log)")
    }

    @Test("pages that come again, with other contents or as zeroes, load alike in QEMU and Godwit")
    func pagesThatComeAgain() throws {
        let small: UInt64 = 4 << 20
        let path = "\(bench.folder)/made.stream"
        try Descriptor.create(path).writeAll(Self.restlessStream(byteCount: small))
        let ours = try startGodwit("ours", "exec:cat \(path)", small)
        let theirs = try bench.startQEMU("theirs", byteCount: small, ["-incoming", "exec:cat \(path)"])
        for vm in [ours, theirs] {
            try vm.waitForMigration("completed")
            try vm.saveMemory(small, to: "\(bench.folder)/\(vm.name)")
        }
        let left = try Descriptor.contents(of: "\(bench.folder)/ours")
        #expect(left == (try Descriptor.contents(of: "\(bench.folder)/theirs")))
        // Neither is simply empty.
        #expect(Set(left).count > 100)
    }

    /// A QEMU with devices: their sections have no length on the wire.
    @Test("a stream of QEMU's PC, devices and all, is decoded whole")
    func ofPC() throws {
        let source = try bench.startQEMU("source", byteCount: 8 << 20, machine: "pc,accel=tcg", ["-S"])
        let path = "\(bench.folder)/pc.stream"
        try source.migrate(to: "exec:cat > \(path)")
        let figures = try source.waitForMigration("completed")["ram"]
        let outcome = try bench.run(["stream", "--json", path])
        #expect(outcome.status == .exited(0), "\(outcome.errors)")
        let stream = try JSON(parsing: outcome.output.utf8)
        #expect(stream["bytes"] == JSON(try Descriptor.open(path, O_RDONLY).size()) && stream["complete"] == true)
        #expect(stream["machine"]?.stringValue?.hasPrefix("pc-i440fx-") == true)
        let blocks = stream["blocks"]?.arrayValue ?? []
        #expect(blocks.contains { $0["name"] == "pc.ram" && $0["length"] == 8_388_608 })
        for (count, records) in [("normal", "data-pages"), ("duplicate", "zero-pages")] {
            let pages = blocks.compactMap { $0[records]?.integerValue(as: Int.self) }
            #expect(figures?[count] == JSON(pages.reduce(0, +)), "\(count)")
        }
        let names = (stream["sections"]?.arrayValue ?? []).compactMap { $0["name"]?.stringValue }
        for name in ["cpu", "apic", "timer", "ram", "globalstate"] { #expect(names.contains(name), "\(names)") }
    }

    // MARK: Steps

    private func startGodwit(_ name: String, _ incoming: String, _ size: UInt64? = nil) throws -> VM {
        let vm = try bench.startVM(
            name, ["--machine", "none", "--memory", "\(size ?? byteCount)", "--incoming", "defer"])
        try vm.client.execute("migrate-incoming", ["uri": .string(incoming)])
        return vm
    }

    private func expectEqual(_ image: MemoryImage, _ vm: VM) throws {
        try vm.saveMemory(image.byteCount, to: "\(bench.folder)/saved")
        #expect(try image.difference(from: "\(bench.folder)/saved") == nil)
    }

    private static func transferred(_ migration: JSON?) -> UInt64? {
        migration?["ram"]?["transferred"]?.integerValue(as: UInt64.self)
    }

    /// QEMU counts the records of all rounds with the mark at their end, save that of the last round; heads and footers of
    /// sections and the list of blocks it does not count.
    private static func transferredAsQEMUCounts(_ stream: JSON) throws -> UInt64 {
        let ram = try #require(stream["sections"]?.arrayValue?.first { $0["name"] == "ram" })
        let all = try #require(ram["body-bytes"]?.integerValue(as: UInt64.self))
        let mark: UInt64 = 8
        let blockList: UInt64 = 8 + (1 + 3 + 8) + mark
        return all - blockList - mark
    }

    /// Two rounds over the same pages: data over zeroes, zeroes over data, data over other data.
    private static func restlessStream(byteCount: UInt64) -> [UInt8] {
        let blocks = [RAMBlockDescription(name: "ram", length: byteCount)]
        var random = SeededRandom(seed: 9)
        var writer = StreamWriter()
        writer.header()
        writer.configuration(machine: "none")
        writer.ramSetup(id: 2, blocks: blocks)
        var records = RAMRecordEncoder(blocks: blocks)
        for round in 0..<3 {
            writer.ramRound(final: round == 2, id: 2)
            for page in 0..<byteCount / 4096 where round == 0 || random.next() % 2 == 0 {
                var head: [UInt8] = []
                if random.next() % 3 == 0 {
                    records.zeroPage(block: 0, offset: page * 4096, into: &head)
                    writer.append(head)
                } else {
                    records.page(block: 0, offset: page * 4096, into: &head)
                    writer.append(head)
                    writer.append([UInt8](repeating: UInt8(random.next() % 256), count: 4096))
                }
            }
            writer.ramSectionEnd(id: 2)
        }
        writer.endOfStream()
        return writer.take()
    }
}
