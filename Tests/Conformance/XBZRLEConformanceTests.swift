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
    "Pages travel as differences between QEMU and Godwit", .serialized, .timeLimit(.minutes(2)),
    .enabled(if: QEMU.isInstalled, "needs qemu-system-x86_64"))
struct XBZRLEConformanceTests {
    private let bench: Workbench
    private let byteCount: UInt64 = 8 << 20

    init() throws { bench = try Workbench() }

    /// A machine without vCPUs writes nothing: QEMU's test protocol does, through the same functions as a vCPU.
    @Test("QEMU's differences arrive: memory is equal after many rounds", arguments: ["tcp", "exec"])
    func fromQEMU(transport: String) throws {
        let image = try MemoryImage("\(bench.folder)/image", byteCount: byteCount, content: .mixed, seed: 21)
        let path = "\(bench.folder)/qtest"
        let source = try bench.startQEMU(
            "source", byteCount: byteCount, ram: image.path,
            ["-accel", "qtest", "-qtest", "unix:\(path),server=on,wait=off"])
        let writer = try GuestWriter(path)
        try source.client.execute(
            "migrate-set-capabilities", ["capabilities": [["capability": "xbzrle", "state": true]]])
        // Few pages fit the limit: as long as more are written, it goes on.
        try source.client.execute("migrate-set-parameters", ["max-bandwidth": JSON(32 << 20), "downtime-limit": 1])

        let stream = "\(bench.folder)/stream"
        let isFile = transport == "exec"
        let destination = isFile ? nil : try startGodwit("tcp:127.0.0.1:0")
        try source.migrate(to: destination.map { "tcp:127.0.0.1:\(try $0.port())" } ?? "exec:cat > \(stream)")
        var sent: JSON?
        var step: UInt64 = 0
        let isEnough = try source.wait(seconds: 20) {
            for _ in 0..<64 {
                step += 1
                try writer.change(step, pages: byteCount / 4096)
            }
            sent = try source.migration()["xbzrle-cache"]
            return Self.number(sent, "pages") > 500 && Self.number(sent, "overflow") > 5
        }
        #expect(isEnough, "\(sent ?? .null)")
        sent = try source.waitForMigration("completed")["xbzrle-cache"]
        #expect(Self.number(sent, "bytes") < Self.number(sent, "pages") * 4096)

        if isFile {
            let summary = try JSON(parsing: bench.run(["stream", "--json", stream]).output.utf8)
            let deltas = Self.number(summary["blocks"]?[0], "delta-pages")
            #expect(summary["complete"] == true)
            #expect(deltas > 100 && deltas <= Self.number(sent, "pages") - Self.number(sent, "overflow"))
        }
        let receiver = try destination ?? startGodwit("exec:cat \(stream)")
        try receiver.waitForMigration("completed")
        try receiver.saveMemory(byteCount, to: "\(bench.folder)/saved")
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

    private func startGodwit(_ incoming: String) throws -> VM {
        let vm = try bench.startVM("ours", ["--machine", "none", "--memory", "\(byteCount)", "--incoming", "defer"])
        try vm.client.execute("migrate-incoming", ["uri": .string(incoming)])
        return vm
    }

    /// What a source sends of memory that changes between the rounds: in a word, in many, to zero, or not at all.
    private func writeStream(of block: RAMBlock, to path: String) throws -> XBZRLECounts {
        let blocks = [RAMBlockDescription(name: "ram", length: byteCount)]
        let memory = GuestMemory(blocks: [block])
        let tracker = RecordedTracker()
        var sender = try RoundSender(
            memory, blocks: blocks, bitmaps: [DirtyBitmap(pageCount: block.pageCount)], xbzrleCacheBytes: 1 << 20)
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
            sender.prepareDeltas(cacheBytes: 0, isFinal: round == 11)
            _ = try sender.send(to: channel, batches: false, tracker: tracker, pacer: Pacer(bytesPerSecond: 0)) {
                counts.pages += $3.pages
                counts.misses += $3.misses
                counts.overflows += $3.overflows
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

/// Writes the memory of a QEMU by its test protocol: lines of text, each answered.
private struct GuestWriter {
    private let socket: Descriptor

    init(_ path: String) throws { socket = try Socket.connect(unix: path) }

    /// One word of a page; now and then a whole page, to zero or to something else.
    func change(_ step: UInt64, pages: UInt64) throws {
        let page = step % 64 * 7 % pages
        switch step % 29 {
        case 5: try command("memset 0x\(String(page * 4096, radix: 16)) 0x1000 0x0")
        case 9:
            let bytes = (0..<4096).map { ($0 as UInt64 &* step &* 0x9e37 >> 5) & 0xff }
            let text = bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
            try command("write 0x\(String(page * 4096, radix: 16)) 0x1000 0x\(text)")
        default:
            try command("writeq 0x\(String(page * 4096 + step % 512 * 8, radix: 16)) 0x\(String(step, radix: 16))")
        }
    }

    private func command(_ line: String) throws {
        try socket.writeAll(Array((line + "\n").utf8))
        var answer: [UInt8] = []
        while answer.last != UInt8(ascii: "\n") {
            guard let (bytes, _) = try Socket.receive(socket, upTo: 256), !bytes.isEmpty else {
                throw TestObstacle("QEMU's test protocol ended at '\(line.prefix(40))'")
            }
            answer += bytes
        }
        guard answer.starts(with: Array("OK".utf8)) else {
            throw TestObstacle("'\(line.prefix(40))' is answered '\(String(decoding: answer, as: UTF8.self))'")
        }
    }
}
