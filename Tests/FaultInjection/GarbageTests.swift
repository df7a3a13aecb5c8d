import Glibc
import Host
import MigrationStream
import QMP
import TestSupport
import Testing

/// `GODWIT_FAULT_SEED` replays what was sent.
@Suite("A waiting destination stands whatever is sent to it", .serialized, .timeLimit(.minutes(10)))
struct GarbageTests {
    private let bench: Workbench
    private let seed = TestEnvironment.number("GODWIT_FAULT_SEED") ?? .random(in: 0..<1_000_000)

    init() throws { bench = try Workbench() }

    @Test("after a hundred strangers with garbage the real source still gets in, to the same process")
    func strangers() throws {
        print("garbage: seed \(seed)")
        var random = SeededRandom(seed: seed)
        let destination = try startPlain("destination")
        let port = try destination.port()
        for number in 0..<100 {
            let bytes = Self.garbage(&random)
            try send(bytes, to: port)
            try #require(destination.process.poll() == nil, "seed \(seed), stranger \(number): \(destination.log)")
        }
        #expect(try destination.status() == "inmigrate")
        let image = try MemoryImage("\(bench.folder)/image", byteCount: Self.byteCount, content: .mixed, seed: seed)
        let source = try startFilled("source", with: image)
        try source.migrate(to: "tcp:127.0.0.1:\(port)")
        try source.waitForMigration("completed")
        try expectEqual(image, destination)
        // And afterwards strangers find nobody at home, and do no harm.
        for stream in [Self.garbage(&random), try Self.stream(of: image)] { try? send(stream, to: port) }
        Clock.sleep(nanoseconds: 50_000_000)
        #expect(try destination.status() == "running", "seed \(seed): \(destination.log)")
        try expectEqual(image, destination)
    }

    @Test("strangers with whole streams who come while a migration is under way do not disturb it")
    func strangersMeanwhile() throws {
        let destination = try startPlain("destination")
        let port = try destination.port()
        let image = try MemoryImage("\(bench.folder)/image", byteCount: Self.byteCount, content: .data, seed: seed)
        let other = try MemoryImage("\(bench.folder)/other", byteCount: Self.byteCount, content: .data, seed: seed &+ 1)
        let source = try startFilled("source", with: image)
        try source.client.execute("migrate-set-parameters", ["max-bandwidth": JSON(8 << 20)])
        try source.migrate(to: "tcp:127.0.0.1:\(port)")
        try source.waitForMigration("active")
        let stream = try Self.stream(of: other)
        var random = SeededRandom(seed: seed)
        var visits = 0
        while try source.migrationStatus() == "active" {
            try? send(visits % 2 == 0 ? stream : Self.garbage(&random), to: port)
            visits += 1
        }
        #expect(visits > 3)
        try source.waitForMigration("completed")
        try expectEqual(image, destination)
        #expect(destination.log.contains("another migration is here already"), "\(destination.log)")
    }

    @Test(
        "real streams of a running guest, cut off anywhere or with bits flipped, end in a sentence and never in a trap",
        .enabled(if: Workbench.hasKVM, "needs /dev/kvm"))
    func damagedStreams() throws {
        print("garbage: damaged streams, seed \(seed)")
        var random = SeededRandom(seed: seed &+ 7)
        let stream = try streamOfGuest()
        var tally = Tally()
        var destination: VM?
        for number in 0..<Self.damagedStreams {
            let vm = try destination ?? startGuestless("destination-\(number)")
            destination = vm
            let what = number % 2 == 0 ? "cut off" : "flipped"
            let damaged = number % 2 == 0 ? Self.cutOff(stream, &random) : Self.flipped(stream, &random)
            try send(damaged, to: vm.port())
            let state = try ending(of: vm, "seed \(seed), case \(number), \(what)")
            tally.note(state)
            // One that still waits takes the next.
            guard state != "inmigrate" else { continue }
            vm.process.signal(SIGKILL)
            destination = nil
        }
        print("garbage: of \(Self.damagedStreams) damaged streams \(tally.text)")
        #expect(tally.count(where: { $0.hasPrefix("exited") }) > 60, "\(tally.text)")
    }

    // MARK: What is sent

    private static let byteCount: UInt64 = 4 << 20
    private static let damagedStreams = 240

    private static func garbage(_ random: inout SeededRandom) -> [UInt8] {
        let noise = (0..<Int.random(in: 0...3000, using: &random)).map { _ in UInt8.random(in: 0...255, using: &random)
        }
        var writer = StreamWriter()
        let depth = Int.random(in: 0..<6, using: &random)
        if depth > 0 { writer.header() }
        // Another machine's name: the right one would make it the source.
        if depth == 2 { writer.configuration(machine: "none\(noise.count)") }
        if depth == 3 { writer.command(.settle(MigrationIdentifier(high: random.next(), low: random.next()))) }
        if depth == 4 { writer.command(.ping(1)) }
        if depth == 5 { writer.ramSetup(id: 2, blocks: [RAMBlockDescription(name: "ram", length: byteCount)]) }
        return writer.bytes + noise
    }

    /// What a machine without devices would write to a file.
    static func stream(of image: MemoryImage) throws -> [UInt8] {
        let blocks = [RAMBlockDescription(name: "ram", length: image.byteCount)]
        let contents = try Descriptor.contents(of: image.path)
        var writer = StreamWriter()
        writer.header()
        writer.configuration(machine: "none")
        writer.ramSetup(id: 2, blocks: blocks)
        writer.ramRound(final: true, id: 2)
        var records = RAMRecordEncoder(blocks: blocks)
        var bytes = writer.take()
        for page in 0..<Int(image.byteCount) / MemoryImage.pageBytes {
            records.page(block: 0, offset: UInt64(page * MemoryImage.pageBytes), into: &bytes)
            bytes += contents[page * MemoryImage.pageBytes..<(page + 1) * MemoryImage.pageBytes]
        }
        writer.ramSectionEnd(id: 2)
        writer.endOfStream()
        return bytes + writer.take()
    }

    /// Half of the cuts fall into the last part, where the state of the devices is.
    private static func place(in stream: [UInt8], _ random: inout SeededRandom) -> Int {
        switch Int.random(in: 0..<4, using: &random) {
        case 0: .random(in: 0..<min(200, stream.count), using: &random)
        case 1: .random(in: 0..<stream.count, using: &random)
        default: .random(in: max(0, stream.count - 12_000)..<stream.count, using: &random)
        }
    }

    private static func cutOff(_ stream: [UInt8], _ random: inout SeededRandom) -> [UInt8] {
        Array(stream.prefix(place(in: stream, &random)))
    }

    private static func flipped(_ stream: [UInt8], _ random: inout SeededRandom) -> [UInt8] {
        var damaged = stream
        for _ in 0..<Int.random(in: 1...4, using: &random) {
            damaged[place(in: stream, &random)] ^= 1 << UInt8.random(in: 0..<8, using: &random)
        }
        return damaged
    }

    private func send(_ bytes: [UInt8], to port: String) throws {
        let socket = try Socket.connect(host: "127.0.0.1", port: port, deadline: .after(seconds: 5))
        // It may close on us in the middle.
        guard (try? socket.writeAll(bytes, deadline: .after(seconds: 10))) != nil else { return }
        try? Socket.finishSending(socket)
        try? socket.setNonBlocking(true)
        // Until it has closed, whatever it answers before.
        let deadline = Deadline.after(seconds: 2)
        while !deadline.hasPassed {
            guard (try? socket.wait(for: .readable, deadline: deadline, operation: "receive")) != nil,
                let answer = try? socket.read(upTo: 4096), !answer.isEmpty
            else { return }
        }
    }

    // MARK: What becomes of it

    /// Waits until the stream is dealt with. - Returns: the state of the VM, or how the process ended.
    private func ending(of vm: VM, _ what: String) throws -> String {
        var state = ""
        let isOver = vm.wait(seconds: 10) {
            if let status = vm.process.poll() {
                state = "\(status)"
                return true
            }
            let status = (try? vm.migrationStatus()) ?? ""
            state = (try? vm.status()) ?? ""
            return !state.isEmpty && !["", "setup", "active", "failed"].contains(status)
        }
        #expect(isOver, "\(what): it does not end: \(vm.log)")
        if let status = vm.process.poll() {
            guard case .exited = status else {
                Issue.record("\(what): \(status): \(vm.log)")
                return state
            }
            #expect(!vm.log.contains("Fatal error") && !vm.log.contains("crashed"), "\(what): \(vm.log)")
            if status == .exited(1), vm.log.contains("migration failed") {
                #expect(vm.log.split(separator: "\n").last?.hasPrefix("godwit: ") == true, "\(what): \(vm.log)")
            }
        }
        return state
    }

    private struct Tally {
        private var counts: [String: Int] = [:]
        mutating func note(_ state: String) { counts[state, default: 0] += 1 }
        func count(where isCounted: (String) -> Bool) -> Int {
            counts.filter { isCounted($0.key) }.reduce(0) { $0 + $1.value }
        }
        var text: String {
            counts.sorted { $0.key < $1.key }.map { "\($0.value) ended '\($0.key)'" }.joined(separator: ", ")
        }
    }

    // MARK: Processes

    private func startPlain(_ name: String, incoming: String = "tcp:127.0.0.1:0") throws -> VM {
        try bench.startVM(name, ["--machine", "none", "--memory", "\(Self.byteCount)", "--incoming", incoming])
    }

    private func startFilled(_ name: String, with image: MemoryImage) throws -> VM {
        let path = "\(bench.folder)/\(name).stream"
        try Descriptor.create(path).writeAll(Self.stream(of: image))
        let vm = try startPlain(name, incoming: "exec:cat \(path)")
        try vm.waitForMigration("completed")
        return vm
    }

    private static let guestMemory = ["--memory", "4M", "--cpus", "2"]

    private func startGuestless(_ name: String) throws -> VM {
        try bench.startVM(name, Self.guestMemory + ["--incoming", "tcp:127.0.0.1:0"])
    }

    private func streamOfGuest() throws -> [UInt8] {
        let path = "\(bench.folder)/guest.stream"
        let source = try bench.startVM("guest", Self.guestMemory + ["--guest", "idle,fill=256K"])
        try source.waitForGuest()
        try source.migrate(to: "file:\(path)")
        try source.waitForMigration("completed")
        try source.client.execute("quit")
        return try Descriptor.contents(of: path)
    }

    private func expectEqual(_ image: MemoryImage, _ vm: VM) throws {
        #expect(vm.wait(seconds: 5) { (try? vm.status()) == "running" }, "seed \(seed): \(vm.log)")
        try vm.saveMemory(image.byteCount, to: "\(bench.folder)/saved")
        #expect(try image.difference(from: "\(bench.folder)/saved") == nil, "seed \(seed)")
    }
}
