import Host
import MigrationStream
import QMP
import TestSupport
import Testing

@Suite("A waiting destination stands what strangers send", .serialized, .timeLimit(.minutes(10)))
struct HostileStreamTests {
    private let bench: Workbench

    init() throws { bench = try Workbench() }

    /// What is sent, and what the destination says. `isFatal`: memory was touched, so nothing can come any more.
    struct Case: Sendable, CustomTestStringConvertible {
        let testDescription: String
        let bytes: [UInt8]
        let words: String
        let isFatal: Bool
    }

    private static let memoryBytes: UInt64 = 16 << 20

    private static func stream(
        machine: String = "none", block: String = "ram", byteCount: UInt64 = memoryBytes, page: UInt64? = nil,
        pageBytes: Int = 4096
    ) -> [UInt8] {
        var writer = StreamWriter()
        writer.header()
        writer.configuration(machine: machine)
        let blocks = [RAMBlockDescription(name: block, length: byteCount)]
        writer.ramSetup(id: 2, blocks: blocks)
        guard let page else { return writer.bytes }
        writer.ramRound(final: false, id: 2)
        var records = RAMRecordEncoder(blocks: blocks)
        var bytes = writer.bytes
        records.page(block: 0, offset: page, into: &bytes)
        return bytes + [UInt8](repeating: 0x5a, count: pageBytes)
    }

    private static let cases = [
        Case(
            testDescription: "random bytes", bytes: (0..<5000).map { UInt8(truncatingIfNeeded: $0 &* 73 &+ 5) },
            words: "no migration stream", isFatal: false),
        Case(testDescription: "half a header", bytes: Array("QEVM".utf8), words: "inside its header", isFatal: false),
        Case(
            testDescription: "another machine", bytes: stream(machine: "pc-i440fx-7.2"),
            words: "the source is a 'pc-i440fx-7.2' machine", isFatal: false),
        Case(
            testDescription: "an unknown RAM block", bytes: stream(block: "pc.ram"),
            words: "RAM block 'pc.ram' does not exist", isFatal: false),
        Case(
            testDescription: "another memory size", bytes: stream(byteCount: memoryBytes * 2),
            words: "start both with the same memory size", isFatal: false),
        Case(
            testDescription: "a page cut off", bytes: stream(page: 8192, pageBytes: 1000),
            words: "the stream ended after",
            isFatal: true),
    ]

    @Test("what is wrong is said in one sentence, and the process does not trap", arguments: cases)
    func hostileStream(hostile: Case) throws {
        let vm = try bench.startVM(
            "waiting", ["--machine", "none", "--memory", "\(Self.memoryBytes)", "--incoming", "tcp:127.0.0.1:0"])
        try send(hostile.bytes, to: vm.port())
        #expect(vm.waitForLog(hostile.words), "\(vm.log)")
        guard hostile.isFatal else {
            // A stranger does no harm: the destination waits on, and ends well.
            #expect(try vm.status() == "inmigrate")
            #expect(try bench.run(["quit", "waiting"]).status == .exited(0))
            #expect(vm.process.wait(deadline: .after(seconds: 5)) == .exited(0))
            return
        }
        #expect(vm.process.wait(deadline: .after(seconds: 5)) == .exited(1))
        let last = vm.log.split(separator: "\n").last
        #expect(last?.hasPrefix("godwit: ") == true && last?.contains(hostile.words) == true, "\(vm.log)")
        #expect(try FileSystem.names(inFolder: bench.runtime) == [])
    }

    @Test("with --incoming defer a destination that failed stays, to be asked why")
    func deferred() throws {
        let vm = try bench.startVM(
            "waiting", ["--machine", "none", "--memory", "\(Self.memoryBytes)", "--incoming", "defer"])
        try vm.client.execute("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
        try send(Self.stream(page: 8192, pageBytes: 1000), to: vm.port())
        #expect(vm.waitForLog("the stream ended after"), "\(vm.log)")
        Clock.sleep(nanoseconds: 200_000_000)
        #expect(vm.process.poll() == nil)
        let answer = try vm.client.execute("query-migrate")
        #expect(answer["status"] == "failed")
        #expect(answer["error-desc"]?.stringValue?.contains("the stream ended after") == true)
    }

    private func send(_ bytes: [UInt8], to port: String) throws {
        let socket = try Socket.connect(host: "127.0.0.1", port: port, deadline: .after(seconds: 5))
        try socket.writeAll(bytes, deadline: .after(seconds: 5))
        try Socket.finishSending(socket)
        // Until the destination has seen the end.
        _ = try? socket.wait(for: .readable, deadline: .after(seconds: 2), operation: "receive")
    }
}
