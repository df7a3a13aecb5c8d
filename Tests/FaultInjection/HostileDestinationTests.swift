import Glibc
import Host
import MigrationStream
import QMP
import TestSupport
import Testing

/// `GODWIT_FAULT_SEED` replays what was said and when, `GODWIT_GARBAGE_CASES` says how much.
@Suite("A source of postcopy stands whatever its destination says", .serialized, .timeLimit(.minutes(10)))
struct HostileDestinationTests {
    private let bench: Workbench
    private let seed = TestEnvironment.number("GODWIT_FAULT_SEED") ?? .random(in: 0..<1_000_000)
    private static let cases = Int(TestEnvironment.number("GODWIT_GARBAGE_CASES") ?? 24)
    private static let byteCount: UInt64 = 4 << 20
    /// Of what it had before, whatever is said.
    private static let mostGrowth: UInt64 = 48 << 20

    init() throws { bench = try Workbench() }

    /// What a destination says, and whether a source may take it for the end of the migration where it is whole.
    private struct Words: Sendable {
        let name: String
        let say: @Sendable (PostcopyPeer, inout SeededRandom) throws -> Void

        init(_ name: String, _ say: @escaping @Sendable (PostcopyPeer, inout SeededRandom) throws -> Void) {
            self.name = name
            self.say = say
        }
    }

    @Test("each word at each moment: a sentence, bounded memory, and the guest here where that is possible")
    func words() throws {
        print("garbage: a hostile destination of postcopy, seed \(seed)")
        let image = try MemoryImage("\(bench.folder)/image", byteCount: Self.byteCount, content: .mixed, seed: seed)
        var random = SeededRandom(seed: seed)
        var plan: [(words: Words, moment: PostcopyPeer.Moment)] = []
        // Every word once before any comes twice; each goes through all moments.
        let order = Self.all.shuffled(using: &random)
        let shift = Int.random(in: 0..<7, using: &random)
        for number in 0..<Self.cases {
            let moments = PostcopyPeer.Moment.allCases
            let turn = (number % order.count * 3 + number / order.count + shift) % moments.count
            plan.append((order[number % order.count], moments[turn]))
        }
        var source: VM?
        var endings: [String: Int] = [:]
        var growth: UInt64 = 0
        for (number, (words, moment)) in plan.enumerated() {
            let preempts = random.next() % 2 == 0
            let isGodwit = random.next() % 2 == 0
            let what =
                "seed \(seed), case \(number): \(words.name) \(moment)\(preempts ? ", with preempt" : "")"
                + (isGodwit ? ", from a Godwit" : "")
            let vm = try source ?? start("source-\(number)", image)
            source = vm
            let before = vm.peakMemory
            let peer = try meet(vm, preempts: preempts, isGodwit: isGodwit, what) { peer, start in
                // What is said in a round is heard in it: nobody has told the guest to move.
                try peer.read(to: moment) { if moment > .rounds { try start() } }
            }
            try? words.say(peer, &random)
            let hangsUp = peer.drain(seconds: 1)
            // Nobody may be left waiting for a peer that says nothing more.
            if !hangsUp {
                Socket.shutdown(peer.main)
                _ = peer.drain(seconds: 1)
            }
            let status = judge(vm, peer, words.name, moment, what)
            growth = max(growth, vm.peakMemory - min(before, vm.peakMemory))
            endings[status, default: 0] += 1
            guard status == "failed" else {
                end(&source, what)
                continue
            }
        }
        if let vm = source {
            try vm.saveMemory(Self.byteCount, to: "\(bench.folder)/saved")
            #expect(try image.difference(from: "\(bench.folder)/saved") == nil, "seed \(seed)")
        }
        end(&source, "the last one")
        let tally = endings.sorted { $0.key < $1.key }.map { "\($0.value) \($0.key)" }.joined(separator: ", ")
        print("garbage: of \(Self.cases) hostile destinations \(tally); at most \(growth >> 20) MiB more memory")
        #expect(growth <= Self.mostGrowth, "seed \(seed)")
        #expect((endings["failed"] ?? 0) > 0 && (endings["postcopy-paused"] ?? 0) > 0, "seed \(seed): \(tally)")
    }

    @Test(
        "each word on each channel for requested pages that was greeted: a sentence, bounded memory, and nobody runs twice",
        arguments: [PostcopyPeer.Moment.rounds, .pulled])
    func channels(moment: PostcopyPeer.Moment) throws {
        print("garbage: a hostile destination on the channels of a Godwit, seed \(seed)")
        let image = try MemoryImage("\(bench.folder)/image", byteCount: Self.byteCount, content: .mixed, seed: seed)
        var random = SeededRandom(seed: seed)
        var source: VM?
        for (number, words) in Self.onChannels.enumerated() {
            let what = "seed \(seed): \(words.name) on a channel \(moment)"
            let vm = try source ?? start("source-\(number)", image)
            source = vm
            let before = vm.peakMemory
            // Slowly: who says nonsense when all was sent is not heard any more.
            let peer = try meet(vm, preempts: true, isGodwit: true, channels: 3, rate: 64 << 10, what) { peer, start in
                try peer.read(to: moment) { if moment > .rounds { try start() } }
            }
            try #require(peer.urgents.count == 3, "\(what)")
            try? words.say(peer, &random)
            // What is nonsense is noticed without anything else being said.
            let isHalf = words.name.hasPrefix("half")
            let isNoticed = vm.wait(seconds: isHalf ? 0 : 8) {
                _ = peer.drain(seconds: 0)
                return ["failed", "postcopy-paused"].contains((try? vm.migrationStatus()) ?? "")
            }
            #expect(isNoticed != isHalf, "\(what): \((try? vm.migration()).map { "\($0)" } ?? "")")
            Socket.shutdown(peer.main)
            let status = judge(vm, peer, words.name, moment, what)
            #expect(status == (moment == .rounds ? "failed" : "postcopy-paused"), "\(what)")
            #expect(vm.peakMemory - min(before, vm.peakMemory) <= Self.mostGrowth, "\(what)")
            // A guest that stayed goes on to the next one.
            if status != "failed" { end(&source, what) }
        }
        if let vm = source {
            try vm.saveMemory(Self.byteCount, to: "\(bench.folder)/saved")
            #expect(try image.difference(from: "\(bench.folder)/saved") == nil, "seed \(seed)")
        }
        end(&source, "the last one")
    }

    @Test(
        "a guest that runs goes on after each hostile destination that did not get it", .enabled(if: hasKVM, needsKVM))
    func guestGoesOn() throws {
        let source = try bench.startVM(
            "guest", ["--memory", "4M", "--guest", "dirty,working-set=256K,rate=4M,heartbeat=50ms"])
        try source.waitForGuest()
        var random = SeededRandom(seed: seed &+ 5)
        for number in 0..<max(8, Self.cases / 4) {
            let words = Self.all[Int.random(in: 0..<Self.all.count, using: &random)]
            let moment = PostcopyPeer.Moment.allCases[Int.random(in: 0..<2, using: &random)]
            let isGodwit = number % 2 == 0
            let what = "seed \(seed), case \(number): \(words.name) \(moment)\(isGodwit ? ", from a Godwit" : "")"
            let peer = try meet(source, preempts: false, isGodwit: isGodwit, what) { peer, _ in
                try peer.read(to: moment) {}
            }
            try? words.say(peer, &random)
            if !peer.drain(seconds: 1) { Socket.shutdown(peer.main) }
            #expect(judge(source, peer, words.name, moment, what) == "failed", "\(what)")
            let check = try source.client.execute("x-query-guest")
            #expect(check["ready"] == true, "\(what): \(check)")
        }
        try source.client.execute("quit")
    }

    // MARK: What is said

    private static func request(_ block: String, _ offset: UInt64, _ length: UInt32) -> [UInt8] {
        var writer = StreamWriter()
        writer.message(.postcopy(.requestPages(PageRequest(block: block, offset: offset, length: length))))
        return writer.bytes
    }

    private static func bytes(_ messages: ReturnPathMessage...) -> [UInt8] {
        var writer = StreamWriter()
        for message in messages { writer.message(message) }
        return writer.bytes
    }

    /// Says it again and again, as long as it is heard.
    private static func flood(_ peer: PostcopyPeer, _ bytes: [UInt8], times: Int) throws {
        let block = [[UInt8]](repeating: bytes, count: 1000).flatMap { $0 }
        for _ in 0..<max(1, times / 1000) { try peer.say(block) }
    }

    private static let identifier = MigrationIdentifier(high: 3, low: 4)

    /// Says it on one of the channels for requested pages, any of them.
    private static func sayBeside(_ peer: PostcopyPeer, _ bytes: [UInt8], _ random: inout SeededRandom) throws {
        try peer.urgents.randomElement(using: &random)?.writeAll(bytes, deadline: .after(seconds: 10))
    }

    private static let onChannels: [Words] = [
        Words("a request outside RAM") { try sayBeside($0, request("ram", byteCount, 4096), &$1) },
        Words("a request far outside RAM") { try sayBeside($0, request("ram", .max << 12, 4096), &$1) },
        Words("a request across the end") { try sayBeside($0, request("ram", byteCount - 4096, 8192), &$1) },
        Words("a request between pages") { try sayBeside($0, request("ram", 100, 4096), &$1) },
        Words("a request of nothing") { try sayBeside($0, request("ram", 0, 0), &$1) },
        Words("a request of 4 GiB") { try sayBeside($0, request("ram", 0, 0xffff_f000), &$1) },
        Words("a request of another block") { try sayBeside($0, request("rom", 0, 4096), &$1) },
        Words("a request of no block") {
            try sayBeside($0, [0, 4, 0, 12] + [UInt8](repeating: 0, count: 8) + [0, 0, 16, 0], &$1)
        },
        Words("the same request a million times") { peer, random in
            let urgent = peer.urgents.randomElement(using: &random)
            let block = [[UInt8]](repeating: request("ram", 8 << 12, 4096), count: 1000).flatMap { $0 }
            for _ in 0..<1000 { try urgent?.writeAll(block, deadline: .after(seconds: 10)) }
        },
        Words("a page of RAM again and again, many at once") { peer, random in
            let urgent = peer.urgents.randomElement(using: &random)
            // The first of them is answered; who does not read that keeps the source waiting, and is no concern of this.
            let block = [[UInt8]](repeating: request("ram", 0, 64 << 12), count: 1000).flatMap { $0 }
            for _ in 0..<20 { try urgent?.writeAll(block, deadline: .after(seconds: 10)) }
        },
        Words("PONG") { try sayBeside($0, bytes(.pong(3)), &$1) },
        Words("SHUT 0") { try sayBeside($0, bytes(.shut(0)), &$1) },
        Words("STARTED") { try sayBeside($0, bytes(.started(nanoseconds: 1)), &$1) },
        Words("a bitmap") { peer, random in
            let count = byteCount / 4096 / 8
            let head = bytes(.postcopy(.receivedBitmap(block: "ram", byteCount: count)))
            try sayBeside(peer, head + [UInt8](repeating: 0xff, count: Int(count)), &random)
        },
        Words("a message of 64 KiB") {
            try sayBeside($0, [0, 3, 0xff, 0xff] + [UInt8](repeating: 0, count: 0xffff), &$1)
        },
        Words("half a request") { try sayBeside($0, Array(request("ram", 0, 4096).prefix(9)), &$1) },
        Words("noise") { peer, random in
            try sayBeside(peer, (0..<2000).map { _ in UInt8.random(in: 0...255, using: &random) }, &random)
        },
        Words("its end") { peer, random in
            if let urgent = peer.urgents.randomElement(using: &random) { Socket.shutdown(urgent) }
        },
    ]

    private static let all: [Words] = [
        Words("a request outside RAM") { peer, _ in try peer.say(request("ram", byteCount, 4096)) },
        Words("a request far outside RAM") { peer, _ in try peer.say(request("ram", .max << 12, 4096)) },
        Words("a request across the end") { peer, _ in try peer.say(request("ram", byteCount - 4096, 8192)) },
        Words("a request between pages") { peer, _ in try peer.say(request("ram", 100, 4096)) },
        Words("a request of half a page") { peer, _ in try peer.say(request("ram", 0, 2048)) },
        Words("a request of nothing") { peer, _ in try peer.say(request("ram", 0, 0)) },
        Words("a request of 4 GiB") { peer, _ in try peer.say(request("ram", 0, 0xffff_f000)) },
        Words("a request of another block") { peer, _ in try peer.say(request("rom", 0, 4096)) },
        Words("a request of no block") { peer, _ in
            try peer.say([0, 4, 0, 12] + [UInt8](repeating: 0, count: 8) + [0, 0, 16, 0])
        },
        Words("a request whose name is longer than it is") { peer, _ in
            var bytes = request("ram", 0, 4096)
            bytes[16] = 255
            try peer.say(bytes)
        },
        Words("the same request a million times") { peer, _ in
            try flood(peer, request("ram", 8 << 12, 4096), times: 1_000_000)
        },
        Words("all of RAM, again and again") { peer, _ in
            try flood(peer, request("ram", 0, UInt32(byteCount)), times: 20_000)
        },
        Words("PONG without end") { peer, _ in try flood(peer, bytes(.pong(9)), times: 100_000) },
        Words("SWITCHOVER_ACK without end") { peer, _ in
            try flood(peer, bytes(.switchoverAcknowledged), times: 100_000)
        },
        Words("a bitmap that nobody asked for") { peer, _ in
            let count = byteCount / 4096 / 8
            try peer.say(bytes(.postcopy(.receivedBitmap(block: "ram", byteCount: count))))
            try peer.say([UInt8](repeating: 0xff, count: Int(count)))
        },
        Words("a bitmap of a size of its own") { peer, _ in
            try peer.say(bytes(.postcopy(.receivedBitmap(block: "ram", byteCount: 1 << 60))))
        },
        Words("the end of a recovery") { peer, _ in try peer.say(bytes(.postcopy(.resumeAcknowledged))) },
        Words("SHUT 0") { peer, _ in try peer.say(bytes(.shut(0))) },
        Words("SHUT 1") { peer, _ in try peer.say(bytes(.shut(1))) },
        Words("SHUT 1 behind PONG 3") { peer, _ in try peer.say(bytes(.pong(3), .shut(1))) },
        Words("READY") { peer, _ in try peer.say(bytes(.ready(nanoseconds: 1))) },
        Words("STARTED") { peer, _ in try peer.say(bytes(.started(nanoseconds: 1))) },
        Words("HELLO, twice") { peer, _ in
            let hello = ReturnPathMessage.hello(version: 1, features: .all, instance: identifier)
            try peer.say(bytes(hello, hello))
        },
        Words("FAILURE") { peer, _ in try peer.say(bytes(.failure(reason: "no\u{1b}[2J"))) },
        Words("a verdict") { peer, _ in try peer.say(bytes(.verdict(.started))) },
        Words("RETRACTED") { peer, _ in try peer.say(bytes(.retracted(attempt: 1))) },
        Words("a message of no known type") { peer, _ in try peer.say([0x77, 0x77, 0, 0]) },
        Words("a message of 64 KiB") { peer, _ in
            try peer.say([0, 3, 0xff, 0xff] + [UInt8](repeating: 0, count: 0xffff))
        },
        Words("half a message") { peer, _ in try peer.say(Array(request("ram", 0, 4096).prefix(9))) },
        Words("noise") { peer, random in
            let noise = (0..<2000).map { _ in UInt8.random(in: 0...255, using: &random) }
            try peer.say(noise)
        },
        Words("noise behind a request") { peer, random in
            let noise = (0..<2000).map { _ in UInt8.random(in: 0...255, using: &random) }
            try peer.say(request("ram", 0, 4096) + noise)
        },
        Words("noise on the channel for requested pages, and its end") { peer, random in
            let noise = (0..<100_000).map { _ in UInt8.random(in: 0...255, using: &random) }
            try peer.urgent?.writeAll(noise, deadline: .after(seconds: 1))
            if let urgent = peer.urgent { Socket.shutdown(urgent) }
            for page in 0..<UInt64(40) { try peer.say(request("ram", page << 14, 4096)) }
        },
        Words("a farewell in half a direction") { peer, _ in try Socket.finishSending(peer.main) },
    ]

    // MARK: What must hold

    /// Waits for the migration's end. - Returns: its state.
    private func judge(
        _ vm: VM, _ peer: PostcopyPeer, _ words: String, _ moment: PostcopyPeer.Moment, _ what: String
    ) -> String {
        var status = ""
        let isOver = vm.wait(seconds: 10) {
            status = (try? vm.migrationStatus()) ?? "the process ended"
            return !["setup", "active", "device", "postcopy-device", "postcopy-active"].contains(status)
        }
        let told = (try? vm.migration()) ?? [:]
        #expect(isOver, "\(what): it does not end: \(told) \(vm.log)")
        #expect(vm.process.poll() == nil, "\(what): \(vm.log)")
        let states = ["failed", "postcopy-paused", "x-unsettled", "completed"]
        #expect(states.contains(status), "\(what): \(told)")
        let reason = told["error-desc"]?.stringValue ?? ""
        #expect(status == "completed" || reason.count > 10, "\(what): '\(reason)'")
        #expect(!reason.contains("\u{1b}"), "\(what): \(reason)")
        // Never two, and one wherever the other cannot be.
        let runs = (try? vm.status()) == "running"
        #expect(runs == (status == "failed"), "\(what): \(status), \((try? vm.status()) ?? "")")
        let wasGivenBack = words == "SHUT 1" && moment < .pulled
        if peer.mayHaveGuest { #expect(!runs || wasGivenBack, "\(what): \(reason)") }
        // Towards a QEMU the kernel may have taken the whole package later: then nobody knows who reads it. READY has a Godwit commit.
        if moment <= (peer.isGodwit && words != "READY" ? .arrived : .rounds) {
            #expect(runs, "\(what): \(status), \(reason)")
        }
        if moment >= .pulled, !wasGivenBack {
            let mayComplete = moment == .whole && words == "SHUT 0"
            #expect(status == (mayComplete ? "completed" : "postcopy-paused"), "\(what): \(reason)")
        }
        if status == "postcopy-paused" {
            #expect(throws: QMPClientError.self, "\(what)") { try vm.client.execute("migrate_cancel") }
        }
        return status
    }

    private func end(_ vm: inout VM?, _ what: String) {
        guard let process = vm?.process, process.poll() == nil else { return vm = nil }
        _ = try? vm?.client.execute("quit")
        let status = process.wait(deadline: .after(seconds: 8))
        #expect(status == .exited(0), "\(what): \(String(describing: status)) \(vm?.log ?? "")")
        vm = nil
    }

    // MARK: Processes

    /// Begins a migration, and follows it to the moment wanted.
    private func meet(
        _ vm: VM, preempts: Bool, isGodwit: Bool, channels: Int = 1, rate: UInt64 = 0, _ what: String,
        _ read: (PostcopyPeer, () throws -> Void) throws -> Void
    ) throws -> PostcopyPeer {
        try vm.client.execute(
            "migrate-set-capabilities",
            [
                "capabilities": [
                    ["capability": "postcopy-ram", "state": true],
                    ["capability": "postcopy-preempt", "state": .bool(preempts)],
                ]
            ])
        try vm.client.execute(
            "migrate-set-parameters",
            [
                "max-bandwidth": JSON(256 << 10), "max-postcopy-bandwidth": JSON(rate),
                "x-postcopy-channels": JSON(UInt64(channels)),
            ])
        let peer = try PostcopyPeer(
            byteCount: Self.byteCount, preempts: preempts, isGodwit: isGodwit, channels: channels
        ) { try vm.migrate(to: $0) }
        do { try read(peer) { try vm.client.execute("migrate-start-postcopy") } } catch {
            throw TestObstacle("\(what): \(error); \((try? vm.migration()).map { "\($0)" } ?? ""), \(vm.log)")
        }
        return peer
    }

    private func start(_ name: String, _ image: MemoryImage) throws -> VM {
        let path = "\(bench.folder)/source.stream"
        try Descriptor.create(path).writeAll(GarbageTests.stream(of: image))
        let vm = try bench.startVM(
            name, ["--machine", "none", "--memory", "\(Self.byteCount)", "--incoming", "exec:cat \(path)"])
        try vm.waitForMigration("completed")
        return vm
    }
}
