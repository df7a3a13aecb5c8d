import GuestMemory
import GuestPrograms
import Host
import Machine
import Migration
import MigrationStream
import TestSupport
import Testing
import Transport

extension Migrator {
    /// Pages go over so many channels from now on.
    fileprivate func useChannels(_ count: Int, _ change: (inout MigrationParameters) -> Void = { _ in }) throws {
        var parameters = parameters
        parameters.multifdChannels = UInt64(count)
        change(&parameters)
        try set(parameters)
        try set(.multifd, true)
    }

    /// What the log will say.
    fileprivate func notices() -> Monitor<[String]> {
        let notices = Monitor<[String]>([])
        observe { event in if case .notice(let sentence) = event { notices.withLock { $0.append(sentence) } } }
        return notices
    }
}

@Suite("live migration over several channels", .serialized, .enabled(if: hasKVM, needsKVM))
struct MultifdMigrationTests {
    @Test(
        "a guest that writes moves over 1 to 64 channels, to a destination that was told nothing of them",
        .timeLimit(.minutes(10)), arguments: [1, 2, 8, 64])
    func channels(count: Int) async {
        await #expect(processExitsWith: .success) { [count] in
            Child.run(seconds: 60) {
                let source = try Migrator.source("dirty,working-set=8M,fill=40M,random,rate=200M", cpus: 2)
                try source.useChannels(count)
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try source.claimArrival(at: destination, "over \(count) channels")
                let (sent, received) = (source.info().ram!, destination.info().ram!)
                claim(sent.multifdBytes > sent.normal * 4096, "\(sent.multifdBytes) bytes over channels")
                claim(sent.transferred - sent.multifdBytes < 256 << 10, "pages went over the main channel: \(sent)")
                claim(sent.multifdBytes == received.multifdBytes, "\(received) came of \(sent)")
                claim(sent.normal == received.normal && sent.duplicate == received.duplicate, "\(received), \(sent)")
                claim(source.info().rule == .twoPhase, "the rule is not that of two Godwits")
            }
        }
    }

    @Test("it works over a unix socket, too", .timeLimit(.minutes(10)))
    func unix() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let source = try Migrator.source("dirty,working-set=4M,fill=16M,rate=100M")
                try source.useChannels(4)
                let destination = try source.destination()
                let address = MigrationAddress.unix(path: temporaryPath("channels"))
                defer { Descriptor.remove(temporaryPath("channels")) }
                try destination.acceptMigration(on: address)
                try source.migrate(to: address)
                try source.claimArrival(at: destination, "over a unix socket")
                Descriptor.remove(temporaryPath("channels"))
            }
        }
    }

    @Test(
        "zero pages travel by each of the three ways, with either kind of synchronization", .timeLimit(.minutes(10)),
        arguments: ZeroPageDetection.allCases.map(\.rawValue), [false, true])
    func zeroPages(detection: String, afterEachSection: Bool) async {
        await #expect(processExitsWith: .success) { [detection, afterEachSection] in
            Child.run(seconds: 40) {
                let source = try Migrator.source("dirty,working-set=8M,fill=24M,random,rate=100M")
                // Memory that was touched and is zero.
                let block = source.machine.memory.blocks[0]
                for page in 0..<512 { block.mapping.zero(at: 56 << 20 | page << 12, count: 4096) }
                try source.useChannels(3) {
                    $0.zeroPageDetection = detection
                    $0.flushesMultifdAfterEachSection = afterEachSection
                }
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try source.claimArrival(at: destination, "with \(detection)")
                let (sent, received) = (source.info().ram!, destination.info().ram!)
                if detection == "none" {
                    claim(sent.duplicate == 0, "\(sent.duplicate) zero pages")
                } else {
                    claim(sent.duplicate >= 512, "only \(sent.duplicate) zero pages")
                }
                claim(sent.normal == received.normal && sent.duplicate == received.duplicate, "\(received), \(sent)")
                // A zero record takes nine bytes of the main channel.
                let main = sent.transferred - sent.multifdBytes
                claim(main <= sent.duplicate * 9 + 256 << 10, "\(main) bytes over the main channel")
            }
        }
    }

    @Test(
        "cancelled at any moment, the guest runs on where it was, and the next migration completes",
        .timeLimit(.minutes(10)), arguments: [20_261_121] as [UInt64])
    func cancelled(seed: UInt64) async {
        await #expect(processExitsWith: .success) { [seed] in
            Child.run(seconds: 80) {
                var random = SeededRandom(seed: seed)
                let source = try Migrator.source(
                    "dirty,working-set=4M,fill=16M,random,rate=100M", mebibytes: 32, cpus: 2)
                try source.useChannels(4) { $0.maxBandwidthBytesPerSecond = 200 << 20 }
                for trial in 0..<12 {
                    let when = "in trial \(trial) of seed \(seed)"
                    let destination = try source.destination()
                    try source.migrate(to: try destination.listen())
                    Clock.sleep(nanoseconds: random.next() % (trial % 2 == 0 ? 5_000_000 : 60_000_000))
                    do { try source.cancel() } catch {
                        claim("\(error)".contains("too late to cancel"), "\(when): \(error)")
                    }
                    try waitFor("the end \(when), it is \(source.info().status)") { source.isOver }
                    if source.info().status == .completed {
                        Child.fail("\(when): the cancel came too late; take another seed")
                    }
                    claim(source.info().status == .cancelled, "\(when): \(source.info().errorDescription ?? "failed")")
                    try source.claimGuestRuns(when)
                    claim(destination.machine.runState == .inMigrate, "\(when): two guests run")
                    destination.shutDown()
                }
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try source.claimArrival(at: destination, "after cancelled migrations")
            }
        }
    }

    @Test(
        "a channel that dies ends the migration at both ends; the guest runs on and moves later",
        .timeLimit(.minutes(10)),
        arguments: [32, 64, 1000, 64 + 1344, 5000, 3 << 20])
    func dies(bytes: Int) async {
        await #expect(processExitsWith: .success) { [bytes] in
            Child.run(seconds: 60) {
                let source = try Migrator.source("dirty,working-set=8M,fill=40M,random,rate=100M")
                // With one all pages go there: whichever thread is quicker may send them all.
                try source.useChannels(bytes < 5000 ? 2 : 1)
                let first = try source.destination()
                let notices = first.notices()
                let proxy = try ChannelProxy(to: try first.listen(), striking: 1, .cut(after: bytes))
                try source.migrate(to: proxy.address)
                try source.awaitEnd(.failed, "with a channel cut after \(bytes) bytes")
                let sentence = source.info().errorDescription ?? ""
                claim(sentence.contains("channel") && !sentence.contains("\n"), "the source says '\(sentence)'")
                try source.claimGuestRuns("after a channel was cut")
                try waitFor("the destination's sentence") {
                    first.info().errorDescription != nil || notices.withLock { !$0.isEmpty }
                }
                claim(first.machine.runState == .inMigrate, "two guests run")
                let second = try source.destination()
                try source.migrate(to: try second.listen())
                try source.claimArrival(at: second, "after a channel was cut")
            }
        }
    }

    @Test(
        "bytes that are no packet are refused with a sentence, and nobody's guest is lost", .timeLimit(.minutes(10)),
        arguments: [
            (64, "begins no packet"), (64 + 1344 + 11, "unknown flags 0xff"), (64 + 1344 + 326, "is no page of"),
        ])
    func spoiled(place: Int, words: String) async {
        await #expect(processExitsWith: .success) { [place, words] in
            Child.run(seconds: 40) {
                let source = try Migrator.source("dirty,working-set=8M,fill=40M,random,rate=100M")
                // The only one: its first packet behind SYNC has pages.
                try source.useChannels(1)
                let destination = try source.destination()
                let proxy = try ChannelProxy(to: try destination.listen(), striking: 1, .spoil(at: place))
                try source.migrate(to: proxy.address)
                try source.awaitEnd(.failed, "with byte \(place) spoiled")
                try source.claimGuestRuns("with byte \(place) spoiled")
                try waitFor("the destination's sentence") { destination.info().errorDescription != nil }
                let sentence = destination.info().errorDescription ?? ""
                claim(sentence.contains(words) && sentence.contains("channel 0"), "the destination says '\(sentence)'")
                claim(destination.machine.runState == .inMigrate, "two guests run")
            }
        }
    }

    @Test("strangers that greet as channels are turned away, and the migration goes on", .timeLimit(.minutes(10)))
    func stranger() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 40) {
                let source = try Migrator.source("dirty,working-set=4M,fill=24M,random,rate=100M")
                try source.useChannels(2) { $0.maxBandwidthBytesPerSecond = 100 << 20 }
                let destination = try source.destination()
                let notices = destination.notices()
                let address = try destination.listen()
                guard case .tcp(let host, let port) = address else { Child.fail("no port") }
                func connect(_ bytes: [UInt8]) throws -> Descriptor {
                    let socket = try Socket.connect(host: host, port: port, deadline: .after(seconds: 5))
                    try socket.writeAll(bytes)
                    return socket
                }
                let mark = MultifdGreeting.Mark(migration: MigrationIdentifier(high: 1, low: 1), channels: 2)
                let early = try connect(MultifdGreeting(channel: 0, mark: mark).bytes)
                let plain = try connect(MultifdGreeting(channel: 0).bytes)
                let broken = try connect([0x11, 0x22, 0x33, 0x44] + [UInt8](repeating: 0xff, count: 60))
                let silent = try connect([0x11, 0x22, 0x33])
                try source.migrate(to: address)
                try waitFor("pages") { (source.info().ram?.multifdBytes ?? 0) > 1 << 20 }
                // Pages from somebody else while the channels are busy.
                let codec = MultifdCodec(blocks: [RAMBlockDescription(name: "ram", length: 64 << 20)])
                let packet = codec.head(of: MultifdPacket(number: 1, normal: [0])) + [UInt8](repeating: 7, count: 4096)
                let late = try connect(MultifdGreeting(channel: 0, mark: mark).bytes + packet)
                try source.claimArrival(at: destination, "past strangers")
                for socket in [early, plain, broken, late] {
                    claim(try socket.read(upTo: 1)?.isEmpty != false, "a stranger was told something")
                }
                let said = notices.withLock { $0 }
                for words in ["another migration", "set the capability multifd", "version 4294967295"] {
                    claim(said.contains { $0.contains(words) }, "nobody said '\(words)': \(said)")
                }
                _ = silent
            }
        }
    }

    @Test(
        "a channel that never arrives ends the migration after ten seconds, with its number", .timeLimit(.minutes(10)))
    func tooFew() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 40) {
                let source = try Migrator.source("dirty,working-set=4M,fill=24M,rate=100M")
                try source.useChannels(3)
                let destination = try source.destination()
                let proxy = try ChannelProxy(to: try destination.listen(), striking: 2, .swallow)
                try source.migrate(to: proxy.address)
                try source.awaitEnd(.failed, "with two of three channels")
                let sentence = source.info().errorDescription ?? ""
                claim(sentence.contains("only 2 of 3 channels"), "the source says '\(sentence)'")
                try source.claimGuestRuns("after a channel was missing")
                claim(destination.machine.runState == .inMigrate, "two guests run")
            }
        }
    }

    @Test(
        "a channel whose migration never begins, and a connection that says nothing, are closed after ten seconds",
        .timeLimit(.minutes(10)))
    func silent() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let source = try Migrator.source("idle,fill=1M", mebibytes: 16)
                let destination = try source.destination()
                let notices = destination.notices()
                guard case .tcp(let host, let port) = try destination.listen() else { Child.fail("no port") }
                let mark = MultifdGreeting.Mark(migration: MigrationIdentifier(high: 1, low: 1), channels: 2)
                let began = Clock.monotonicNanoseconds
                for bytes in [MultifdGreeting(channel: 0, mark: mark).bytes, [0x11]] {
                    let socket = try Socket.connect(host: host, port: port, deadline: .after(seconds: 5))
                    try socket.writeAll(bytes)
                    claim(try socket.read(upTo: 1)?.isEmpty != false, "it was told something")
                }
                let seconds = Double(Clock.monotonicNanoseconds - began) / 1e9
                claim((20..<25).contains(seconds), "two strangers, one after the other, took \(seconds) s")
                try waitFor("two notices") { notices.withLock { $0.count } == 2 }
            }
        }
    }

    @Test("all channels together keep a bandwidth limit", .timeLimit(.minutes(10)), arguments: [2, 16])
    func bandwidth(count: Int) async {
        await #expect(processExitsWith: .success) { [count] in
            Child.run(seconds: 40) {
                let source = try Migrator.source("idle,fill=40M,words=512")
                let limit: UInt64 = 20 << 20
                try source.useChannels(count) {
                    $0.maxBandwidthBytesPerSecond = limit
                    $0.downtimeLimitMilliseconds = 20
                }
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try waitFor("the first bytes") { (source.info().ram?.transferred ?? 0) > 1 << 20 }
                let began = (at: Clock.monotonicNanoseconds, bytes: source.info().ram?.transferred ?? 0)
                Clock.sleep(nanoseconds: 1_200_000_000)
                let ended = (at: Clock.monotonicNanoseconds, bytes: source.info().ram?.transferred ?? 0)
                let rate = Double(ended.bytes - began.bytes) * 1e9 / Double(ended.at - began.at)
                claim(source.info().status == .active, "the migration was over too early")
                // What the channels have reserved may go out at once: a packet each.
                let slack = Double(count * 16 * 4096)
                claim(rate <= Double(limit) * 1.05 + slack, "\(UInt64(rate)) bytes/s are more than \(limit)")
                claim(rate >= Double(limit) * 0.2, "\(UInt64(rate)) bytes/s are far below \(limit)")
                var parameters = source.parameters
                parameters.maxBandwidthBytesPerSecond = 0
                try source.set(parameters)
                try source.claimArrival(at: destination, "with a limit")
            }
        }
    }

    @Test("what brings one connection only is refused, and so are numbers out of range", .timeLimit(.minutes(10)))
    func refused() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 20) {
                let source = try Migrator.source("idle,fill=2M", mebibytes: 16)
                func refusal(_ command: () throws -> Void) -> String {
                    do { try command() } catch { return "\(error)" }
                    return "nothing"
                }
                for count: UInt64 in [0, 65] {
                    var parameters = MigrationParameters()
                    parameters.multifdChannels = count
                    let words = refusal { try source.set(parameters) }
                    claim(words.contains("multifd-channels \(count): between 1 and 64"), words)
                }
                try source.useChannels(2)
                for address in [MigrationAddress.command("cat > /dev/null"), .descriptor("x")] {
                    let words = refusal { try source.migrate(to: address) }
                    claim(words.contains("need tcp: or unix:"), words)
                }
                try source.claimGuestRuns("after refusals")
            }
        }
    }
}
