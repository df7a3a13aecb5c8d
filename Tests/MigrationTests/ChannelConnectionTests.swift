import Glibc
import GuestMemory
import Host
import Machine
import Migration
import MigrationStream
import Synchronization
import TestSupport
import Testing
import Transport

/// A proxy at whose other end everything arrives later, as over a long line, or not before it is let go.
final class LongLine: Sendable {
    private let listener: Descriptor
    private let port: String
    private let delayNanoseconds: UInt64
    /// Nothing passes.
    let isHeld = Monitor(false)

    init(to address: MigrationAddress, milliseconds: UInt64) throws {
        guard case .tcp(_, let port) = address else { Child.fail("the line leads to a TCP port") }
        listener = try Socket.listen(host: "127.0.0.1", port: "0")
        self.port = port
        delayNanoseconds = milliseconds * 1_000_000
        try HostThread.detached(name: "line") { [self] in
            while let source = try? Socket.accept(listener) {
                guard let target = try? Socket.connect(host: "127.0.0.1", port: self.port, deadline: .after(seconds: 5))
                else { return }
                for (from, to) in [(source, target), (target, source)] {
                    try? HostThread.detached(name: "line-way") { [self] in
                        while let bytes = try? from.read(upTo: 1 << 20), !bytes.isEmpty {
                            if delayNanoseconds > 0 { Clock.sleep(nanoseconds: delayNanoseconds) }
                            isHeld.wait { $0 ? nil : () }
                            guard (try? to.writeAll(bytes)) != nil else { break }
                        }
                        Socket.shutdown(to)
                    }
                }
            }
        }
    }

    var address: MigrationAddress { .tcp(host: "127.0.0.1", port: "\(Socket.localPort(of: listener) ?? 0)") }
}

extension Migrator {
    /// TLS with a key that both sides have, on every channel from now on.
    func useTLS(_ endpoint: TLSCredentials.Endpoint) throws {
        let folder = temporaryPath("keys")
        if unsafe mkdir(folder, 0o700) == 0 {
            try Descriptor.create("\(folder)/keys.psk").writeAll(Array("qemu:00112233445566778899\n".utf8))
        }
        try security.add(
            .credentials(try TLSCredentials("tls0", pskFolder: folder, endpoint: endpoint)), id: "tls0")
        var parameters = parameters
        parameters.tlsCredentials = "tls0"
        try set(parameters)
    }

    /// What the log says, of all kinds of notices.
    func log() -> Monitor<[String]> {
        let log = Monitor<[String]>([])
        observe { event in if case .notice(let sentence) = event { log.withLock { $0.append(sentence) } } }
        return log
    }

    func change(_ body: (inout MigrationParameters) -> Void) throws {
        var parameters = parameters
        body(&parameters)
        try set(parameters)
    }
}

/// Threads of this process that belong to an outgoing migration.
private func outgoingThreads() -> [String] {
    let names = ["migration-send", "migration-retur", "migration-conn", "multifd-conn", "multifd-send"]
    let tasks = (try? FileSystem.names(inFolder: "/proc/self/task")) ?? []
    return tasks.compactMap { task in
        let name = (try? Descriptor.contents(of: "/proc/self/task/\(task)/comm")).map {
            String(decoding: $0.prefix { $0 != 10 }, as: UTF8.self)
        }
        return name.flatMap { name in names.contains { name.hasPrefix($0) } ? name : nil }
    }
}

@Suite("connections of a migration", .serialized, .enabled(if: hasKVM, needsKVM))
struct ChannelConnectionTests {
    @Test(
        "64 channels through TLS over a line of 200 ms there and back come before the destination loses patience; it says once how they are secured",
        .timeLimit(.minutes(10)))
    func longLine() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                let source = try Migrator.source("idle,fill=2M", mebibytes: 16)
                try source.useTLS(.client)
                try source.change {
                    $0.multifdChannels = 64
                    // The line alone takes most of the default.
                    $0.downtimeLimitMilliseconds = 10_000
                }
                try source.set(.multifd, true)
                let destination = try source.destination()
                try destination.useTLS(.server)
                let log = destination.log()
                let line = try LongLine(to: try destination.listen(), milliseconds: 100)
                let began = Clock.monotonicNanoseconds
                try source.migrate(to: line.address)
                try waitFor("the migration to begin, it is \(source.info().errorDescription ?? "connecting")") {
                    ![.none, .setup].contains(source.info().status)
                }
                let seconds = Double(Clock.monotonicNanoseconds - began) / 1e9
                claim(seconds < 8, "to connect took \(seconds) s")
                try source.claimArrival(at: destination, "over a long line")
                let notices = log.withLock { $0.filter { $0.contains("TLS 1.3") } }
                claim(notices.count == 1, "the destination says \(notices)")
            }
        }
    }

    @Test(
        "a cancel while connections are made leaves neither a thread nor a connection behind", .timeLimit(.minutes(10)),
        arguments: [20_261_121] as [UInt64])
    func cancelled(seed: UInt64) async {
        await #expect(processExitsWith: .success) { [seed] in
            Child.run(seconds: 80) {
                var random = SeededRandom(seed: seed)
                let source = try Migrator.source("idle,fill=1M", mebibytes: 16)
                try source.change {
                    $0.multifdChannels = 8
                    // It must not be over before the cancel.
                    $0.maxBandwidthBytesPerSecond = 100_000
                }
                try source.set(.multifd, true)
                for trial in 0..<30 {
                    let destination = try source.destination()
                    try source.migrate(to: try destination.listen())
                    Clock.sleep(nanoseconds: random.next() % 6_000_000)
                    try source.cancel()
                    try waitFor("the end of trial \(trial), it is \(source.info().status)") { source.isOver }
                    claim(source.info().status == .cancelled, "trial \(trial): \(source.info())")
                    destination.shutDown()
                }
                try waitFor("the threads \(outgoingThreads()) to end", seconds: 10) { outgoingThreads().isEmpty }
                try source.claimGuestRuns("after cancelled connections")
            }
        }
    }

    @Test(
        "with a limit below a page per second channels go on, and wake up when it is raised", .timeLimit(.minutes(10)))
    func slowest() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 40) {
                let source = try Migrator.source("idle,fill=2M", mebibytes: 16)
                try source.change {
                    $0.multifdChannels = 4
                    $0.maxBandwidthBytesPerSecond = 4000
                }
                try source.set(.multifd, true)
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try waitFor("a first page") { (source.info().ram?.normal ?? 0) >= 1 }
                Clock.sleep(nanoseconds: 1_500_000_000)
                let pages = source.info().ram?.normal ?? 0
                claim(pages < 8, "\(pages) pages at 4000 bytes per second")
                try source.change { $0.maxBandwidthBytesPerSecond = 0 }
                let began = Clock.monotonicNanoseconds
                try source.claimArrival(at: destination, "after the limit was raised")
                let seconds = Double(Clock.monotonicNanoseconds - began) / 1e9
                claim(seconds < 15, "it took \(seconds) s")
            }
        }
    }

    @Test(
        "rounds that were measured under a low limit do not hold up the switch once it is raised",
        .timeLimit(.minutes(10)))
    func raised() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 80) {
                let source = try Migrator.source("dirty,working-set=128K,fill=12M,rate=4M", mebibytes: 16)
                try source.change {
                    $0.multifdChannels = 2
                    $0.maxBandwidthBytesPerSecond = 4_000_000
                    $0.downtimeLimitMilliseconds = 20
                }
                try source.set(.multifd, true)
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                // What the guest writes meanwhile is more than 20 ms at this rate, and too little to measure another one with.
                try waitFor("ten looks, it is \(source.info().status)", seconds: 40) {
                    (source.info().ram?.dirtySyncCount ?? 0) >= 10
                }
                claim(source.info().status == .active, "the limit holds up nothing: \(source.info().status)")
                try source.change { $0.maxBandwidthBytesPerSecond = 0 }
                let began = Clock.monotonicNanoseconds
                try source.claimArrival(at: destination, "after the limit was raised")
                let seconds = Double(Clock.monotonicNanoseconds - began) / 1e9
                claim(seconds < 15, "it took \(seconds) s")
            }
        }
    }

    @Test(
        "a peer that is told much and reads nothing holds up nobody: the next one is answered at once, and the real source gets in",
        .timeLimit(.minutes(10)))
    func deafPeer() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 40) {
                let source = try Migrator.source("idle,fill=1M", mebibytes: 16)
                let destination = try source.destination()
                let log = destination.log()
                guard case .tcp(let host, let port) = try destination.listen() else { Child.fail("no port") }
                let deaf = try Socket.connect(host: host, port: port, deadline: .after(seconds: 5))
                try HostThread.detached(name: "deaf") {
                    var writer = StreamWriter()
                    writer.header()
                    writer.configuration(machine: "godwit-pc-1")
                    writer.command(.openReturnPath)
                    try? deaf.writeAll(writer.take())
                    for _ in 0..<2000 { writer.command(.ping(7)) }
                    let many = writer.take()
                    // Far more answers than the sockets between us hold.
                    for _ in 0..<2000 where (try? deaf.writeAll(many)) == nil { return }
                }
                try waitFor("the deaf peer to be given up", seconds: 20) {
                    log.withLock { $0.contains { $0.contains("does not read what it is told") } }
                }
                let began = Clock.monotonicNanoseconds
                let stranger = try Socket.connect(host: host, port: port, deadline: .after(seconds: 5))
                try stranger.writeAll([UInt8](repeating: 7, count: 64))
                claim(try stranger.read(upTo: 1)?.isEmpty != false, "a stranger was told something")
                let seconds = Double(Clock.monotonicNanoseconds - began) / 1e9
                claim(seconds < 3, "a stranger was kept for \(seconds) s")
                try source.migrate(to: .tcp(host: host, port: port))
                try source.claimArrival(at: destination, "past a deaf peer")
            }
        }
    }
}
