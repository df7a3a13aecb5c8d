import Accelerator
import Glibc
import GuestMemory
import Host
import MigrationStream
import QMP
import TestSupport
import Testing
import Transport

@testable import Migration

@Suite(
    "Pages travel as differences between QEMU and Godwit", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: QEMU.isInstalled, "needs qemu-system-x86_64"))
struct XBZRLEConformanceTests {
    private let bench: Workbench
    private let byteCount: UInt64 = 8 << 20

    init() throws { bench = try Workbench() }

    /// A machine without vCPUs writes nothing by itself, see `RestlessMemory`.
    @Test("QEMU's differences arrive: memory is equal after many rounds", arguments: ["tcp", "exec"])
    func fromQEMU(transport: String) throws {
        let small: UInt64 = 1 << 20
        let image = try MemoryImage("\(bench.folder)/image", byteCount: small, content: .data, seed: 21)
        let memory = try RestlessMemory(image, folder: bench.folder)
        let source = try bench.startQEMU("source", byteCount: small, ram: image.path, memory.options)
        try source.client.execute(
            "migrate-set-capabilities",
            [
                "capabilities": [
                    ["capability": "xbzrle", "state": true], ["capability": "pause-before-switchover", "state": true],
                ]
            ])
        // So slow that memory changes in every round: it stops iterating with the first in which nothing did. It must not end by itself:
        // what the test changes afterwards would not arrive.
        try source.client.execute("migrate-set-parameters", ["max-bandwidth": JSON(256 << 10), "downtime-limit": 1])

        let stream = "\(bench.folder)/stream"
        let isFile = transport == "exec"
        let destination = isFile ? nil : try startGodwit("tcp:127.0.0.1:0", small)
        try source.migrate(to: destination.map { "tcp:127.0.0.1:\(try $0.port())" } ?? "exec:cat > \(stream)")
        var sent: JSON?
        let isEnough = try source.wait(seconds: 40) {
            memory.change()
            try source.client.execute("system_reset")
            let now = try source.migration()
            sent = now["xbzrle-cache"]
            return Self.number(sent, "pages") > 300 && Self.number(sent, "overflow") > 20
                || now["status"] == "pre-switchover"
        }
        #expect(isEnough && Self.number(sent, "pages") > 60, "\(sent ?? .null)")
        // What was changed last is reported with this reset, which is carried out a moment later.
        try source.client.execute("system_reset")
        Clock.sleep(nanoseconds: 300_000_000)
        try source.client.execute("migrate-set-parameters", ["max-bandwidth": JSON(1 << 30), "downtime-limit": 2000])
        try source.waitForMigration("pre-switchover")
        try source.client.execute("migrate-continue", ["state": "pre-switchover"])
        sent = try source.waitForMigration("completed")["xbzrle-cache"]
        #expect(Self.number(sent, "bytes") < Self.number(sent, "pages") * 4096)

        if isFile {
            let summary = try JSON(parsing: bench.run(["stream", "--json", stream]).output.utf8)
            let deltas = Self.number(summary["blocks"]?[0], "delta-pages")
            #expect(summary["complete"] == true)
            #expect(deltas > 30 && deltas <= Self.number(sent, "pages") - Self.number(sent, "overflow"))
        }
        let receiver = try destination ?? startGodwit("exec:cat \(stream)", small)
        try receiver.waitForMigration("completed")
        try receiver.saveMemory(small, to: "\(bench.folder)/saved")
        // QEMU's memory is the file: it holds what was written last.
        #expect(try image.difference(from: "\(bench.folder)/saved") == nil)
    }

    @Test("Godwit's differences load in QEMU: memory is equal after many rounds")
    func toQEMU() throws {
        let block = try RAMBlock(name: "ram", byteCount: byteCount)
        let path = "\(bench.folder)/stream"
        let counts = try writeStream(of: block, to: path)
        #expect(counts.pages > 500 && counts.overflows > 5 && counts.misses > 100, "\(counts)")
        let summary = try JSON(parsing: bench.run(["stream", "--json", path]).output.utf8)
        #expect(Self.number(summary["blocks"]?[0], "delta-pages") > 300)

        let theirs = try bench.startQEMU("theirs", byteCount: byteCount, ["-incoming", "exec:cat \(path)"])
        let ours = try startGodwit("exec:cat \(path)")
        try Descriptor.create("\(bench.folder)/expected").writeAll(
            block.mapping.read(at: 0, count: Int(byteCount)))
        for vm in [theirs, ours] {
            try vm.waitForMigration("completed")
            try vm.saveMemory(byteCount, to: "\(bench.folder)/\(vm.name)")
            let saved = try Descriptor.contents(of: "\(bench.folder)/\(vm.name)")
            #expect(saved == (try Descriptor.contents(of: "\(bench.folder)/expected")), "\(vm.name)")
        }
    }

    // MARK: Steps

    private static func number(_ json: JSON?, _ name: String) -> UInt64 {
        json?[name]?.integerValue(as: UInt64.self) ?? 0
    }

    private func startGodwit(_ incoming: String, _ size: UInt64? = nil) throws -> VM {
        let vm = try bench.startVM(
            "ours", ["--machine", "none", "--memory", "\(size ?? byteCount)", "--incoming", "defer"])
        try vm.client.execute("migrate-incoming", ["uri": .string(incoming)])
        return vm
    }

    /// What a source sends of memory that changes between the rounds: in a word, in many, to zero, or not at all.
    private func writeStream(of block: RAMBlock, to path: String) throws -> XBZRLECounts {
        let blocks = [RAMBlockDescription(name: "ram", length: byteCount)]
        let memory = GuestMemory(blocks: [block])
        let tracker = RecordedTracker()
        var sender = try RoundSender(
            memory, blocks: blocks, bitmaps: [DirtyBitmap(pageCount: block.pageCount)], xbzrleCacheBytes: 4 << 20)
        let channel = try Connector().connect(to: .file(path: path, offset: 0))
        var writer = StreamWriter()
        writer.header()
        writer.configuration(machine: "none")
        writer.ramSetup(id: 2, blocks: blocks)
        var counts = XBZRLECounts()
        var random = SeededRandom(seed: 4)
        for round in 0..<12 {
            for page in 0..<block.pageCount where round == 0 || random.next() % 4 == 0 {
                Self.change(block, page, &random)
                tracker.dirty.append(page)
            }
            _ = try sender.collect(with: tracker)
            writer.ramRound(final: round == 11, id: 2)
            try channel.send(writer.take())
            sender.prepareDeltas(cacheBytes: 0, keepsPages: round != 11)
            let route = RoundSender.Route(
                channel: channel, group: nil, batches: false, zeroPages: .legacy, mayGoPlain: false, marksEnd: false)
            _ = try sender.send(over: route, tracker: tracker, pacer: Pacer(bytesPerSecond: 0)) { sent in
                counts.pages += sent?.deltas.pages ?? 0
                counts.misses += sent?.deltas.misses ?? 0
                counts.overflows += sent?.deltas.overflows ?? 0
                return false
            }
            writer.ramSectionEnd(id: 2)
        }
        writer.endOfStream()
        try channel.send(writer.take())
        try channel.finish()
        return counts
    }

    private static func change(_ block: RAMBlock, _ page: UInt64, _ random: inout SeededRandom) {
        let start = Int(page) * 4096
        switch random.next() % 8 {
        case 0: block.mapping.zero(at: start, count: 4096)
        case 1: for word in 0..<512 { block.mapping.store(random.next(), at: start + word * 8) }
        case 2: break
        default: block.mapping.store(random.next(), at: start + Int(random.next() % 512) * 8)
        }
    }
}

/// Says what the test wrote.
private final class RecordedTracker: DirtyTracker, @unchecked Sendable {
    // SAFETY of Sendable: one thread uses it.
    var dirty: [UInt64] = []
    let client = DirtyClient.migration
    let method = "test"
    let cpuNanoseconds: UInt64 = 0

    func makePages() throws(AcceleratorError) -> sending [any DirtyPages] { [] }
    func start() throws(AcceleratorError) {}
    func collect(into pages: [any DirtyPages]) throws(AcceleratorError) {
        for page in dirty { pages[0].insert(PageIndex(page)) }
        dirty = []
    }
    func willSend(_ pages: Range<PageIndex>, of block: Int, marked record: any DirtyPages) throws(AcceleratorError) {}
    func stop() {}
}

/// The memory of a QEMU that has no vCPU to write it.
///
/// It is a file, so that a test can write it; QEMU does not notice that. But at every reset QEMU itself writes what its option
/// `-device loader` names, and reports those pages as written: a byte in each of them, whose value is always the same.
private final class RestlessMemory {
    let options: [String]
    private let mapping: Mapping
    private var step: UInt64 = 0
    private static let pages = 64
    private static let distance = 4 * 4096
    private static let loadedOffset = 100

    init(_ image: MemoryImage, folder: String) throws {
        mapping = try Mapping(Descriptor.open(image.path, O_RDWR), byteCount: Int(image.byteCount))
        let byte = "\(folder)/byte"
        try Descriptor.create(byte).writeAll([0x55])
        options = (0..<Self.pages).flatMap { page in
            ["-device", "loader,file=\(byte),addr=\(page * Self.distance + Self.loadedOffset),force-raw=on"]
        }
    }

    /// A word of most pages, all of some, nothing but the loaded byte of one.
    func change() {
        step += 1
        for page in 0..<Self.pages {
            let start = page * Self.distance
            switch page % 8 {
            case 5:
                for word in 0..<512 {
                    mapping.store(step &* 0x9e37_79b9_7f4a_7c15 &* UInt64(word + page + 1), at: start + word * 8)
                }
            case 3 where step % 16 == 0: mapping.zero(at: start, count: 4096)
            case 7: break
            default: mapping.store(step, at: start + 128 + Int(step &+ UInt64(page)) % 400 * 8)
            }
            mapping.store(UInt8(0x55), at: start + Self.loadedOffset)
        }
    }
}
