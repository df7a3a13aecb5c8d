import Glibc
import Host
import QMP
import TestSupport
import Testing

@testable import MigrationStream

/// `GODWIT_FAULT_SEED` replays what was sent, `GODWIT_GARBAGE_CASES` says how much.
@Suite("A destination of postcopy stands whatever comes on its channels", .serialized, .timeLimit(.minutes(10)))
struct PostcopyGarbageTests {
    private let bench: Workbench
    private let seed = TestEnvironment.number("GODWIT_FAULT_SEED") ?? .random(in: 0..<1_000_000)
    private static let cases = TestEnvironment.number("GODWIT_GARBAGE_CASES") ?? 12
    private static let byteCount: UInt64 = 2 << 20
    /// Of what it has before a stranger comes, RAM not counted. A package may have 64 MiB.
    private static let mostGrowth: UInt64 = 80 << 20

    init() throws { bench = try Workbench() }

    @Test(
        "real streams of postcopy, damaged in any part and on either channel, end in a sentence, and never in a trap",
        // A Godwit's channel for requested pages begins with a greeting, and is refused like those of multifd.
        arguments: zip([false, false, true], [false, true, false]))
    func damagedStreams(fromGodwit isGodwit: Bool, preempts: Bool) throws {
        print(
            "garbage: postcopy of a \(isGodwit ? "Godwit" : "QEMU") "
                + "\(preempts ? "with" : "without") a channel for requested pages, seed \(seed)")
        let image = try MemoryImage("\(bench.folder)/image", byteCount: Self.byteCount, content: .mixed, seed: seed)
        let recording = try record(image, preempts: preempts, isGodwit: isGodwit)
        try #require(recording.parts.count == 5 && recording.urgent.isEmpty == !preempts)
        // As it is, it brings the guest here.
        var destination: VM? = try start("whole")
        try replay(recording, to: destination!, patience: 5000)
        try destination!.waitForMigration("completed")
        try destination!.saveMemory(Self.byteCount, to: "\(bench.folder)/saved")
        #expect(try image.difference(from: "\(bench.folder)/saved") == nil, "seed \(seed)")
        end(&destination, "whole")

        var random = SeededRandom(seed: seed &+ (preempts ? 1 : 0) &+ (isGodwit ? 2 : 0))
        var endings: [String: Int] = [:]
        var growth: UInt64 = 0
        for number in 0..<Self.cases {
            var damaged = recording
            let what = "seed \(seed), case \(number): \(Self.damage(&damaged, &random))"
            let vm = try destination ?? start("destination-\(number)")
            destination = vm
            let before = vm.peakMemory
            try replay(damaged, to: vm)
            let ending = ending(of: vm, what)
            growth = max(growth, vm.peakMemory - min(before, vm.peakMemory))
            endings[ending, default: 0] += 1
            // One that still waits takes the next, but the same migration of a Godwit's only once.
            if ending != "waits" || isGodwit { end(&destination, what) }
        }
        end(&destination, "the last one")
        let tally = endings.sorted { $0.key < $1.key }.map { "\($0.value) \($0.key)" }.joined(separator: ", ")
        print("garbage: of \(Self.cases) damaged streams of postcopy \(tally); at most \(growth >> 20) MiB more memory")
        #expect(growth <= Self.mostGrowth, "seed \(seed)")
        // Damage that nothing notices would say that nothing was tried.
        #expect((endings["failed"] ?? 0) + (endings["postcopy-paused"] ?? 0) > 0, "seed \(seed): \(tally)")
    }

    @Test("noise beside a postcopy under way costs nothing: the guest arrives")
    func noiseBeside() throws {
        let image = try MemoryImage("\(bench.folder)/image", byteCount: Self.byteCount, content: .data, seed: seed)
        let recording = try record(image, preempts: true, isGodwit: false)
        var destination: VM? = try start("beside")
        let port = try destination!.port()
        var random = SeededRandom(seed: seed &+ 99)
        let seed = seed
        try replay(recording, to: destination!, patience: 5000) {
            for _ in 0..<10 {
                let noise = (0..<Int.random(in: 4...3000, using: &random)).map { _ in
                    UInt8.random(in: 0...255, using: &random)
                }
                let stranger = try Socket.connect(host: "127.0.0.1", port: port, deadline: .after(seconds: 5))
                try? stranger.writeAll(noise, deadline: .after(seconds: 5))
                try? Socket.finishSending(stranger)
                try stranger.wait(for: .readable, deadline: .after(seconds: 5), operation: "seed \(seed): receive")
            }
        }
        try destination!.waitForMigration("completed")
        try destination!.saveMemory(Self.byteCount, to: "\(bench.folder)/saved")
        #expect(try image.difference(from: "\(bench.folder)/saved") == nil, "seed \(seed)")
        end(&destination, "beside")
    }

    // MARK: Channels that were greeted

    /// What is said on one of them, behind its greeting.
    private struct ChannelWords: Sendable {
        let name: String
        /// The migration goes on and ends well, whatever it was.
        var isHarmless = false
        /// It comes on a connection more, in place of a greeting.
        var isStranger = false
        var closes = false
        let bytes: @Sendable (_ greeting: [UInt8], _ page: [UInt8], inout SeededRandom) -> [UInt8]
    }

    private static func record(_ head: UInt64, _ block: String = "ram", _ contents: [UInt8] = []) -> [UInt8] {
        var writer = StreamWriter()
        writer.be64(head)
        if !block.isEmpty { writer.name(block) }
        writer.append(contents)
        return writer.bytes
    }

    private static func noise(_ random: inout SeededRandom) -> [UInt8] {
        (0..<2000).map { _ in UInt8.random(in: 0...255, using: &random) }
    }

    private static let blank = [UInt8](repeating: 0, count: 4096)

    private static let channelWords: [ChannelWords] = [
        .init(name: "noise") { noise(&$2) },
        .init(name: "a page outside RAM") { _, _, _ in record(byteCount | 8, "ram", blank) },
        .init(name: "zeroes far outside RAM") { _, _, _ in record(.max << 12 | 2, "ram", [0]) },
        .init(name: "a page of another block") { _, _, _ in record(8, "rom", blank) },
        .init(name: "a page of no block") { _, _, _ in record(0x28, "", blank) },
        .init(name: "a record of no known kind") { _, _, _ in record(0x800) },
        .init(name: "a section of a stream") { _, _, _ in [2, 0, 0, 0, 2] + record(8, "ram", blank) },
        .init(name: "a page cut off", closes: true) { _, _, _ in record(8, "ram", Array(blank.prefix(100))) },
        .init(name: "its end", closes: true) { _, _, _ in [] },
        .init(name: "its last word", isHarmless: true) { _, _, _ in record(0x10, "") },
        // The first of them is as it should be, and all others are too late.
        .init(name: "a page a million times", isHarmless: true) { _, page, _ in
            let again = record(0x22, "", [0])
            return record(8, "ram", page) + [[UInt8]](repeating: again, count: 1_000_000).flatMap { $0 }
        },
        .init(name: "a channel that is here already", isHarmless: true, isStranger: true) { greeting, _, _ in greeting
        },
        .init(name: "noise with a greeting", isHarmless: true, isStranger: true) { $0 + noise(&$2) },
        .init(name: "a channel of another migration", isHarmless: true, isStranger: true) { greeting, _, _ in
            var greeting = greeting
            greeting[45] ^= 1
            return greeting
        },
        .init(name: "channel 200", isHarmless: true, isStranger: true) { greeting, _, random in
            var greeting = greeting
            greeting[24] = 200
            return greeting + noise(&random)
        },
    ]

    @Test(
        "whatever comes on a channel of a Godwit that was greeted: a sentence, bounded memory, and one who has the guest",
        arguments: [false, true])
    func onChannels(isStarted: Bool) throws {
        let image = try MemoryImage("\(bench.folder)/image", byteCount: Self.byteCount, content: .mixed, seed: seed)
        let recording = try record(image, preempts: true, isGodwit: true, channels: 3)
        try #require(recording.parts.count == 5 && recording.greetings.count == 3 && recording.commitEnd > 0)
        let page = Array(try Descriptor.contents(of: image.path).prefix(4096))
        var random = SeededRandom(seed: seed)
        for (number, words) in Self.channelWords.enumerated() {
            let what = "seed \(seed): \(words.name) \(isStarted ? "behind" : "before") COMMIT"
            var destination: VM? = try start("channels-\(number)")
            let vm = destination!
            let before = vm.peakMemory
            let said = words.bytes(recording.greetings[1], page, &random)
            try say(said, words, recording, to: vm, isStarted: isStarted, what)
            let ending = ending(of: vm, what)
            #expect(ending == (words.isHarmless ? "completed" : isStarted ? "postcopy-paused" : "failed"), "\(what)")
            #expect(vm.peakMemory - before <= Self.mostGrowth, "\(what)")
            if words.isHarmless {
                try vm.saveMemory(Self.byteCount, to: "\(bench.folder)/saved")
                #expect(try image.difference(from: "\(bench.folder)/saved") == nil, "\(what)")
            }
            end(&destination, what)
        }
    }

    /// A Godwit's stream with all its channels, and those bytes on one of them, or beside them.
    private func say(
        _ bytes: [UInt8], _ words: ChannelWords, _ recording: PostcopyPeer.Recording, to vm: VM, isStarted: Bool,
        _ what: String
    ) throws {
        let port = try vm.port()
        let deadline = Deadline.after(seconds: 20)
        func connect() throws -> Descriptor {
            try Socket.connect(host: "127.0.0.1", port: port, deadline: .after(seconds: 5))
        }
        let main = try connect()
        try main.writeAll(Array(recording.parts[...PostcopyPeer.Recording.packagePart].joined()), deadline: deadline)
        var heard: [UInt8] = []
        Self.listen(main, &heard, until: recording.answer, milliseconds: 5000)
        var channels: [Descriptor] = []
        for greeting in recording.greetings {
            let channel = try connect()
            try channel.writeAll(greeting, deadline: deadline)
            channels.append(channel)
        }
        // What comes with the greeting itself is turned away, and costs nothing.
        #expect(vm.wait(seconds: 5) { vm.threadNames.filter { $0.hasPrefix("postcopy-recv-") }.count == 3 }, "\(what)")
        let rest = recording.parts[PostcopyPeer.Recording.packagePart + 1]
        if isStarted {
            try main.writeAll(Array(rest.prefix(recording.commitEnd)), deadline: deadline)
            #expect(vm.wait(seconds: 5) { (try? vm.status()) == "running" }, "\(what): \(vm.log)")
        }
        let channel = words.isStranger ? try connect() : channels[1]
        // It may be closed on us.
        try? channel.writeAll(bytes, deadline: deadline)
        if words.closes { Socket.shutdown(channel) }
        if words.isHarmless {
            let left = isStarted ? Array(rest.dropFirst(recording.commitEnd)) : rest
            try main.writeAll(left, deadline: deadline)
            Self.listen(main, &heard, until: Self.bytes(of: .shut(0)), milliseconds: 10_000)
        } else {
            // Until it has had enough, and not because of anything else.
            #expect(
                vm.wait(seconds: 10) {
                    ["failed", "postcopy-paused"].contains((try? vm.migrationStatus()) ?? "")
                }, "\(what): \(vm.log)")
        }
        Socket.shutdown(main)
    }

    // MARK: Damage

    /// Damages a stream. - Returns: how, in words.
    private static func damage(_ recording: inout PostcopyPeer.Recording, _ random: inout SeededRandom) -> String {
        // Each part is as likely as any other, however short.
        let part = Int.random(in: 0..<(recording.urgent.isEmpty ? 5 : 6), using: &random)
        var bytes = part == 5 ? recording.urgent : recording.parts[part]
        guard !bytes.isEmpty else { return "part \(part) is empty" }
        let place = Int.random(in: 0..<bytes.count, using: &random)
        let span = place..<min(bytes.count, place + Int.random(in: 1...64, using: &random))
        let words: String
        switch Int.random(in: 0..<7, using: &random) {
        case 0:
            bytes.removeSubrange(place...)
            if part < 5 { for later in recording.parts.indices where later > part { recording.parts[later] = [] } }
            words = "cut off"
        case 1:
            bytes.insert(contentsOf: bytes[span], at: place)
            words = "\(span.count) bytes twice"
        case 2:
            bytes.removeSubrange(span)
            words = "\(span.count) bytes missing"
        case 3:
            bytes.insert(contentsOf: span.map { _ in UInt8.random(in: 0...255, using: &random) }, at: place)
            words = "\(span.count) bytes of noise"
        case 4:
            bytes += bytes
            words = "all of it twice"
        default:
            for _ in 0..<Int.random(in: 1...4, using: &random) {
                // Heads and names stand at a part's beginning.
                let limit = Bool.random(using: &random) ? min(bytes.count, 120) : bytes.count
                bytes[Int.random(in: 0..<limit, using: &random)] ^= 1 << UInt8.random(in: 0..<8, using: &random)
            }
            words = "flipped"
        }
        if part == 5 { recording.urgent = bytes } else { recording.parts[part] = bytes }
        return "\(words), from byte \(place) of part \(part)"
    }

    // MARK: Sending

    /// Sends it all, and closes once the destination had its say.
    /// - Parameters:
    ///   - patience: so long an answer is waited for, in milliseconds.
    ///   - meanwhile: done behind the package.
    private func replay(
        _ recording: PostcopyPeer.Recording, to vm: VM, patience: UInt64 = 250, meanwhile: () throws -> Void = {}
    ) throws {
        let port = try vm.port()
        let main = try Socket.connect(host: "127.0.0.1", port: port, deadline: .after(seconds: 5))
        let deadline = Deadline.after(seconds: 10)
        // It may close on us anywhere.
        let first = Array(recording.parts[...PostcopyPeer.Recording.packagePart].joined())
        guard (try? main.writeAll(first, deadline: deadline)) != nil else { return }
        var heard: [UInt8] = []
        Self.listen(main, &heard, until: recording.answer, milliseconds: patience)
        try meanwhile()
        var urgent: Descriptor?
        if !recording.urgent.isEmpty {
            let socket = try Socket.connect(host: "127.0.0.1", port: port, deadline: .after(seconds: 5))
            try? socket.writeAll(recording.urgent, deadline: deadline)
            urgent = socket
        }
        let rest = Array(recording.parts[(PostcopyPeer.Recording.packagePart + 1)...].joined())
        try? main.writeAll(rest, deadline: deadline)
        Self.listen(main, &heard, until: Self.bytes(of: .shut(0)), milliseconds: patience)
        try? Socket.finishSending(main)
        if let urgent { try? Socket.finishSending(urgent) }
        Self.listen(main, &heard, until: [], milliseconds: 2000)
    }

    private static func bytes(of message: ReturnPathMessage) -> [UInt8] {
        var writer = StreamWriter()
        writer.message(message)
        return writer.bytes
    }

    /// Until those bytes came last, the connection ends (empty: only then), or the time is over.
    private static func listen(_ main: Descriptor, _ heard: inout [UInt8], until end: [UInt8], milliseconds: UInt64) {
        let deadline = Deadline.after(milliseconds: milliseconds)
        while end.isEmpty || !heard.suffix(4096).contains(end) {
            guard (try? main.wait(for: .readable, deadline: deadline, operation: "receive")) != nil,
                let bytes = try? main.read(upTo: 1 << 16), !bytes.isEmpty
            else { return }
            heard += bytes
        }
    }

    // MARK: What becomes of it

    private func ending(of vm: VM, _ what: String) -> String {
        var ending = ""
        let isOver = vm.wait(seconds: 15) {
            guard vm.process.poll() == nil else { return true }
            switch (try? vm.migrationStatus()) ?? "" {
            case "completed": ending = "completed"
            case "failed": ending = "failed"
            case "postcopy-paused": ending = "postcopy-paused"
            case "none": ending = "waits"
            default: return false
            }
            return true
        }
        #expect(vm.process.poll() == nil, "\(what): the process ended: \(vm.log)")
        #expect(isOver, "\(what): it does not end: \((try? vm.migration()).map { "\($0)" } ?? "") \(vm.log)")
        #expect(!vm.log.contains("Fatal error") && !vm.log.contains("crashed"), "\(what): \(vm.log)")
        switch ending {
        case "failed":
            let reason = (try? vm.migration())?["error-desc"]?.stringValue ?? ""
            #expect(reason.count > 10 && (try? vm.status()) == "inmigrate", "\(what): \(reason)")
        case "postcopy-paused":
            let now = try? vm.migration()
            // What was still being placed when the connection ended was all there was.
            if now?["status"] == "completed" { return "completed" }
            let reason = now?["error-desc"]?.stringValue ?? ""
            #expect(reason.contains("the guest runs on as far as its memory is here"), "\(what): \(reason)")
            #expect((try? vm.status()) == "running", "\(what): \(vm.log)")
        default: break
        }
        return ending
    }

    /// It ends when it is told to, whoever waits for a page.
    private func end(_ vm: inout VM?, _ what: String) {
        guard let process = vm?.process, process.poll() == nil else { return vm = nil }
        _ = try? vm?.client.execute("quit")
        let status = process.wait(deadline: .after(seconds: 5))
        #expect(status == .exited(0), "\(what): \(String(describing: status)) \(vm?.log ?? "")")
        vm = nil
    }

    // MARK: Processes

    private func start(_ name: String) throws -> VM {
        let vm = try bench.startVM(
            name, ["--machine", "none", "--memory", "\(Self.byteCount)", "--incoming", "defer"])
        try vm.allowPostcopy()
        try vm.client.execute("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
        return vm
    }

    private func record(
        _ image: MemoryImage, preempts: Bool, isGodwit: Bool, channels: Int = 1
    ) throws -> PostcopyPeer.Recording {
        let path = "\(bench.folder)/source.stream"
        try Descriptor.create(path).writeAll(GarbageTests.stream(of: image))
        let source = try bench.startVM(
            "source", ["--machine", "none", "--memory", "\(Self.byteCount)", "--incoming", "exec:cat \(path)"])
        try source.waitForMigration("completed")
        try source.allowPostcopy(preempts: preempts)
        try source.client.execute(
            "migrate-set-parameters",
            [
                "max-bandwidth": JSON(512 << 10), "max-postcopy-bandwidth": JSON(8 << 20),
                "x-postcopy-channels": JSON(UInt64(channels)),
            ])
        let peer = try PostcopyPeer(
            byteCount: Self.byteCount, preempts: preempts, isGodwit: isGodwit, channels: channels
        ) { try source.migrate(to: $0) }
        try peer.read(to: .pulled) { try source.client.execute("migrate-start-postcopy") }
        for page in stride(from: UInt64(3), to: 500, by: 23) where !(preempts && isGodwit) {
            try peer.say(.postcopy(.requestPages(PageRequest(block: "ram", offset: page << 12, length: 4096))))
        }
        try peer.read(to: .whole) {}
        let recording = try peer.recording()
        try peer.say(.shut(0))
        try source.waitForMigration("completed")
        try source.client.execute("quit")
        return recording
    }
}

extension VM {
    func allowPostcopy(preempts: Bool = false) throws {
        var capabilities: [JSON] = [["capability": "postcopy-ram", "state": true]]
        if preempts { capabilities.append(["capability": "postcopy-preempt", "state": true]) }
        try client.execute("migrate-set-capabilities", ["capabilities": .array(capabilities)])
    }
}
