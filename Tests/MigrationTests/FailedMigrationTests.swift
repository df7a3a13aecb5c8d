import GuestMemory
import GuestPrograms
import Host
import Machine
import Migration
import TestSupport
import Testing
import Transport

@Suite("migration that fails", .serialized, .enabled(if: hasKVM, needsKVM))
struct FailedMigrationTests {
    @Test(
        "cancelled at any moment, the guest runs on where it was, and the next migration completes",
        .timeLimit(.minutes(10)), arguments: [20_261_121] as [UInt64])
    func cancelled(seed: UInt64) async {
        await #expect(processExitsWith: .success) { [seed] in
            Child.run(seconds: 50) {
                var random = SeededRandom(seed: seed)
                let source = try Migrator.source(
                    "dirty,working-set=4M,fill=16M,random,rate=100M", mebibytes: 32, cpus: 2)
                var parameters = MigrationParameters()
                parameters.maxBandwidthBytesPerSecond = 200 << 20
                try source.set(parameters)
                var early = 0
                for trial in 0..<20 {
                    let when = "in trial \(trial) of seed \(seed)"
                    let destination = try source.destination()
                    try source.migrate(to: try destination.listen())
                    // Half of them while the connection and tracking are set up.
                    Clock.sleep(nanoseconds: random.next() % (trial % 2 == 0 ? 3_000_000 : 60_000_000))
                    do { try source.cancel() } catch {
                        claim("\(error)".contains("too late to cancel"), "\(when): \(error)")
                    }
                    try waitFor("the end \(when), it is \(source.info().status)") { source.isOver }
                    if source.info().status == .completed {
                        Child.fail("\(when): the cancel came too late; take another seed")
                    }
                    claim(source.info().status == .cancelled, "\(when): \(source.info().errorDescription ?? "failed")")
                    early += 1
                    try source.claimGuestRuns(when)
                    claim(destination.machine.runState == .inMigrate, "\(when): two guests run")
                    destination.shutDown()
                }
                claim(early > 0, "no migration was cancelled")
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try source.claimArrival(at: destination, "after \(early) cancelled migrations")
            }
        }
    }

    @Test(
        "cancelled while it is being set up, a migration leaves nothing behind that stops the next",
        .timeLimit(.minutes(10)))
    func cancelledEarly() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 40) {
                var random = SeededRandom(seed: 3)
                let source = try Migrator.source("idle,fill=2M", mebibytes: 16)
                var destination = try source.destination()
                var address = try destination.listen()
                for trial in 0..<120 {
                    try source.migrate(to: address)
                    let end = Clock.monotonicNanoseconds + random.next() % 900_000
                    while Clock.monotonicNanoseconds < end {}
                    try? source.cancel()
                    try waitFor("the end of trial \(trial)") { source.isOver }
                    if source.info().status == .completed { return }
                    let sentence = source.info().errorDescription ?? ""
                    claim(!sentence.contains("tracking"), "trial \(trial): \(sentence)")
                    if destination.info().status == .failed {
                        destination = try source.destination()
                        address = try destination.listen()
                    }
                }
                try source.claimGuestRuns("after early cancels")
            }
        }
    }

    @Test(
        "a destination that never stops talking is left before its words cost memory, with the guest running",
        .timeLimit(.minutes(10)))
    func chatter() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 40) {
                let source = try Migrator.source("idle,fill=2M", mebibytes: 16)
                let (sourceEnd, farEnd) = try Socket.pair()
                source.keep(sourceEnd, as: "out")
                // PONGs to a PING nobody sent.
                let pongs = [[UInt8]](repeating: [0, 2, 0, 4, 0, 0, 0, 7], count: 8192).flatMap { $0 }
                let (sent, isLeft) = (Monitor(0), Monitor(false))
                _ = try HostThread(name: "chatter") {
                    while (try? farEnd.writeAll(pongs)) != nil { sent.withLock { $0 += pongs.count } }
                    isLeft.withLock { $0 = true }
                }
                try source.migrate(to: .descriptor("out"))
                try source.awaitEnd(.failed, "after chatter")
                let reason = source.info().errorDescription ?? ""
                claim(reason.contains("goes on answering what it was not asked"), "the sentence is '\(reason)'")
                try waitFor("the end of the connection") { isLeft.withLock { $0 } }
                let taken = sent.withLock { $0 }
                claim(taken < 4 << 20, "\(taken) bytes of chatter were taken")
                try source.claimGuestRuns("after chatter")
            }
        }
    }

    @Test(
        "a migration whose peer stopped taking data is cancelled, and the next one completes", .timeLimit(.minutes(10)))
    func stalled() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 40) {
                let source = try Migrator.source("dirty,working-set=4M,fill=48M,words=512", mebibytes: 64)
                let stalling = try source.destination()
                let (sourceEnd, proxyEnd) = try Socket.pair()
                let (proxyFarEnd, destinationEnd) = try Socket.pair()
                source.keep(sourceEnd, as: "out")
                stalling.keep(destinationEnd, as: "in")
                try stalling.acceptMigration(on: .descriptor("in"))
                // Passes on 4 MiB, then takes nothing any more and keeps the connection.
                _ = try HostThread(name: "forward") {
                    var left = 4 << 20
                    while left > 0, let bytes = try? proxyEnd.read(upTo: 65536), !bytes.isEmpty {
                        left -= bytes.count
                        try? proxyFarEnd.writeAll(bytes)
                    }
                }
                _ = try HostThread(name: "backward") {
                    while let bytes = try? proxyFarEnd.read(upTo: 4096), !bytes.isEmpty {
                        try? proxyEnd.writeAll(bytes)
                    }
                }
                try source.migrate(to: .descriptor("out"))
                var sent: UInt64 = 0
                try waitFor("the stall") {
                    let before = sent
                    Clock.sleep(nanoseconds: 200_000_000)
                    sent = source.info().ram?.transferred ?? 0
                    return sent > 1 << 20 && sent == before
                }
                try source.cancel()
                try source.awaitEnd(.cancelled, "after a stall")
                try source.claimGuestRuns("after a stall")
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try source.claimArrival(at: destination, "after a stalled migration")
            }
        }
    }

    @Test(
        "a destination of another size, kind or vCPU count says so; the guest runs on at the source",
        .timeLimit(.minutes(10)), arguments: ["memory", "kind", "vCPUs"])
    func mismatch(what: String) async {
        await #expect(processExitsWith: .success) { [what] in
            Child.run(seconds: 30) {
                let source = try Migrator.source("dirty,working-set=4M,fill=8M,random", mebibytes: 32, cpus: 2)
                let destination =
                    switch what {
                    case "memory": try source.destination(mebibytes: 48)
                    case "kind": try source.destination(kind: .none)
                    default: try source.destination(cpus: 1)
                    }
                let notices = Monitor<[String]>([])
                destination.observe { event in
                    if case .notice(let sentence) = event { notices.withLock { $0.append(sentence) } }
                }
                try source.migrate(to: try destination.listen())
                try source.awaitEnd(.failed, "to another \(what)")
                let sentence = source.info().errorDescription ?? ""
                claim(!sentence.isEmpty && !sentence.contains("\n"), "the source says '\(sentence)'")
                try source.claimGuestRuns("after a migration to another \(what)")
                try waitFor("the destination's sentence") {
                    notices.withLock { !$0.isEmpty } || destination.info().errorDescription != nil
                }
                let theirs = notices.withLock { $0.first } ?? destination.info().errorDescription ?? ""
                let words = ["memory": "ram", "kind": "machine", "vCPUs": "godwit/vcpu"][what]!
                claim(theirs.contains(words), "the destination says '\(theirs)', not a word of \(words)")
                claim(destination.machine.runState == .inMigrate, "the destination is \(destination.machine.runState)")
            }
        }
    }

    @Test(
        "a destination that nobody listens at is named in one sentence, and the guest runs on", .timeLimit(.minutes(10))
    )
    func refused() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 20) {
                let source = try Migrator.source("idle,fill=1M", mebibytes: 16)
                for (address, words) in [
                    (MigrationAddress.unix(path: "/nonexistent/socket"), "unix:/nonexistent/socket"),
                    (.file(path: "/nonexistent/file", offset: 0), "/nonexistent/file"), (.descriptor("none"), "none"),
                    (.command("exit 3"), "exit 3"),
                ] {
                    try source.migrate(to: address)
                    try source.awaitEnd(.failed, "to \(address)")
                    let sentence = source.info().errorDescription ?? ""
                    claim(sentence.contains(words), "\(address): \(sentence)")
                    try source.claimGuestRuns("after \(address)")
                }
            }
        }
    }

    @Test("commands and parameters that do not fit are refused with a sentence", .timeLimit(.minutes(10)))
    func commands() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 20) {
                func refused(_ words: String, _ command: () throws -> Void) {
                    do { try command() } catch { return claim("\(error)".contains(words), "\(error)") }
                    Child.fail("nothing was refused where '\(words)' should be")
                }
                let source = try Migrator.source("dirty,working-set=4M,fill=24M,words=512", mebibytes: 32)
                var parameters = MigrationParameters()
                parameters.downtimeLimitMilliseconds = 2_000_001
                refused("downtime-limit 2000001") { try source.set(parameters) }
                claim(source.parameters == MigrationParameters(), "a refused parameter was set")
                refused("'-incoming' was not specified") { try source.acceptMigration(on: .tcp(host: "", port: "0")) }
                refused("no migration waits") { try source.proceed() }
                refused("no migration is unsettled") { try source.settle(.resumeHere) }
                try source.cancel()

                let destination = try source.destination()
                let address = try destination.listen()
                refused("already been started") { try destination.acceptMigration(on: address) }
                refused("itself waiting") { try destination.migrate(to: address) }

                parameters = MigrationParameters()
                parameters.maxBandwidthBytesPerSecond = 4 << 20
                try source.set(parameters)
                try source.migrate(to: address)
                refused("migration process in progress") { try source.migrate(to: address) }
                refused("not while a migration is under way") { try source.set(.events, false) }
                parameters.maxBandwidthBytesPerSecond = 0
                try source.set(parameters)
                try source.claimArrival(at: destination, "once it may be fast")
                refused("already handed over") { try source.migrate(to: address) }
            }
        }
    }

    @Test(
        "with pause-before-switchover the guest stops and waits for a word, or goes on here", .timeLimit(.minutes(10)))
    func switchoverOnWord() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let source = try Migrator.source("dirty,working-set=4M,fill=8M,rate=50M", mebibytes: 32)
                try source.set(.pauseBeforeSwitchover, true)
                for goesOn in [false, true] {
                    let destination = try source.destination()
                    try source.migrate(to: try destination.listen())
                    try waitFor("pre-switchover") { source.info().status == .preSwitchover }
                    let stopped = try source.machine.guestStatus()
                    Clock.sleep(nanoseconds: 30_000_000)
                    claim(try source.machine.guestStatus() == stopped, "the guest runs while the switch is awaited")
                    if goesOn {
                        try source.proceed()
                        try source.claimArrival(at: destination, "after a word")
                    } else {
                        try source.cancel()
                        try source.awaitEnd(.cancelled)
                        try source.claimGuestRuns("after a cancel before the switch")
                    }
                }
            }
        }
    }
}
