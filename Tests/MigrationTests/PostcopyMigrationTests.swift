import GuestMemory
import Host
import Machine
import Synchronization
import TestSupport
import Testing
import Transport

@testable import Migration
@testable import MigrationStream

extension Migrator {
    /// A destination that takes postcopy, with RAM of that kind.
    func postcopyDestination(_ backing: String = "anonymous") throws -> Migrator {
        let migrator = Migrator(
            try VirtualMachine(
                MachineConfiguration(
                    kind: machine.configuration.kind, memoryByteCount: machine.configuration.memoryByteCount,
                    cpuCount: machine.configuration.cpuCount, backing: RAMBacking(rawValue: backing) ?? .anonymous,
                    isIncoming: true),
                serial: SerialPort(.none)))
        try migrator.set(.postcopyRAM, true)
        return migrator
    }

    /// RAM alone, with something in most of its pages.
    static func memoryAlone(mebibytes: UInt64) throws -> Migrator {
        let machine = try VirtualMachine(
            MachineConfiguration(kind: .none, memoryByteCount: mebibytes << 20), serial: SerialPort(.none))
        let mapping = machine.memory.blocks[0].mapping
        for page in 0..<Int(mebibytes << 8) where page % 7 != 3 {
            for word in 0..<8 { mapping.store(UInt64(page * 8 + word) | 1 << 60, at: page * 4096 + word * 504) }
        }
        return Migrator(machine)
    }

    func claimMemory(of source: Migrator, _ when: String) {
        for (mine, theirs) in zip(machine.memory.blocks, source.machine.memory.blocks) {
            for start in stride(from: 0, to: Int(mine.byteCount), by: 1 << 20) {
                let (here, there) = (mine.read(at: start, count: 1 << 20), theirs.read(at: start, count: 1 << 20))
                claim(here == there, "\(when): memory differs between \(start) and \(start + 1 << 20)")
            }
        }
    }
}

private func pages(_ range: Range<UInt64>) -> Range<PageIndex> {
    PageIndex(range.lowerBound)..<PageIndex(range.upperBound)
}

/// What a source says before RUN, and words of the refusal.
private let nonsenseBeforeRun: [(String, @Sendable (ScriptedPostcopySource) throws -> Void)] = [
    ("outside", { try $0.discard([pages(200..<300)]) }),
    (
        "whole pages",
        { try $0.command(.discard(.init(block: "ram", ranges: [.init(offset: 1, length: 4096)]))) }
    ),
    (
        "does not exist",
        { try $0.command(.discard(.init(block: "rom", ranges: [.init(offset: 0, length: 4096)]))) }
    ),
    ("bytes, not 1 to", { try $0.say { $0.append([8, 0, 7, 0, 4, 0x7f, 0xff, 0xff, 0xff]) } }),
    (
        "stands in a package",
        {
            var package = try $0.package()
            package = Array(package.dropLast(5)) + [8, 0, 9, 0, 0] + package.suffix(5)
            try $0.send(package: package)
        }
    ),
    (
        "more than 16384 sections and commands",
        {
            var writer = StreamWriter()
            for number in 0..<20_000 as Range<UInt32> { writer.command(.ping(number)) }
            let package = try $0.package()
            try $0.send(package: Array(package.prefix(5)) + writer.bytes + package.dropFirst(5))
        }
    ),
    ("out of turn", { try $0.command(.listen) }),
    ("out of turn", { try $0.command(.run) }),
    (
        "out of turn",
        {
            try $0.discard([pages(0..<1)])
            try $0.pages([pages(0..<1)])
        }
    ),
    ("out of turn", { try $0.send(package: Array($0.package().dropFirst(5))) }),
    (
        "ended inside a package",
        {
            try $0.send(package: Array($0.package().dropLast(5)))
        }
    ),
]

/// What a source does behind RUN, and its name.
private let nonsenseBehindRun: [(String, @Sendable (ScriptedPostcopySource) throws -> Void)] = [
    (
        "a page outside",
        {
            try $0.say {
                $0.ramRound(final: false, id: 2); $0.be64(0xfff_f000 | 0x28)
            }
        }
    ),
    ("a command of a recovery", { try $0.command(.resume) }),
    (
        "RAM that ends too early",
        {
            try $0.pages([], final: true); try $0.end()
        }
    ),
    ("the end without RAM", { try $0.end() }),
    (
        "a page cut off",
        {
            try $0.say {
                $0.ramRound(final: false, id: 2); $0.be64(0x3000 | 8); $0.name("ram");
                $0.append([1, 2, 3])
            }
            try $0.channel.finish()
        }
    ),
    ("the connection lost", { $0.channel.cancel() }),
]

@Suite("postcopy, destination", .serialized)
struct PostcopyMigrationTests {
    @Test(
        "a running guest is fetched by what it touches, and verifies while most of it is missing",
        .enabled(if: hasKVM, needsKVM), .timeLimit(.minutes(10)),
        arguments: [(1, false, "anonymous"), (2, false, "memfd"), (4, true, "anonymous"), (4, true, "memfd")])
    func runningGuest(cpus: Int, hasUrgentChannel: Bool, backing: String) async {
        await #expect(processExitsWith: .success) { [cpus, hasUrgentChannel, backing] in
            Child.run(seconds: 60) {
                let source = try Migrator.source("dirty,working-set=4M,fill=8M,random,rate=50M", cpus: cpus)
                let destination = try source.postcopyDestination(backing)
                let script = try ScriptedPostcopySource(of: source.machine, to: try destination.listen())
                let urgent = hasUrgentChannel ? try script.connect() : nil
                try script.open()
                let block = source.machine.memory.blocks[0]
                // A round of precopy, while the guest writes on: some of it is out of date afterwards.
                let early = try block.allocatedRuns(in: block.pages)
                try script.pages(early)
                _ = try source.machine.stopForMigration()
                let all = try block.allocatedRuns(in: block.pages)
                try script.discard(all)
                try script.send(package: script.package())
                script.waitToHear(.pong(4))
                // No background: the guest gets what it asks for.
                let done = Atomic(false)
                let check = try HostThread(name: "check") {
                    do { try destination.claimGuestRuns("with pages missing") } catch { Child.fail("\(error)") }
                    done.store(true, ordering: .releasing)
                }
                while !done.load(ordering: .acquiring) { try script.serve(on: urgent, quietMilliseconds: 50) }
                check.join()
                claim(destination.info().status == .postcopyActive, "it is \(destination.info().status)")
                claim(!script.requests.isEmpty, "nothing was asked for")
                claim(
                    Set(script.requests.map(\.offset)).count == script.requests.count, "a page was asked for twice")
                // All of it, what came already too.
                try script.pages(all, final: true)
                try script.end()
                try destination.awaitEnd(.completed, "at its end")
                script.waitToHear(.shut(0))
                try destination.claimGuestRuns("with all of its memory")
                let histogram = destination.info().pageLatency
                claim(
                    histogram?.count == UInt64(script.requests.count),
                    "\(String(describing: histogram?.count)) latencies")
                print(
                    "postcopy: \(cpus) vCPUs, \(backing): \(script.requests.count) pages asked for, p50 "
                        + "\((histogram?.nanoseconds(atMille: 500) ?? 0) / 1000) us, p99 "
                        + "\((histogram?.nanoseconds(atMille: 990) ?? 0) / 1000) us")
            }
        }
    }

    @Test(
        "memory that its own process touches waits for its pages: each comes once, in whatever order",
        .timeLimit(.minutes(10)), arguments: ["anonymous", "memfd"])
    func memoryAlone(backing: String) async {
        await #expect(processExitsWith: .success) { [backing] in
            Child.run(seconds: 60) {
                let source = try Migrator.memoryAlone(mebibytes: 8)
                let destination = try source.postcopyDestination(backing)
                let script = try ScriptedPostcopySource(of: source.machine, to: try destination.listen())
                try script.open()
                // The last quarter is never sent before, and the first not again.
                try script.pages([pages(0..<1500)])
                try script.discard([pages(500..<700), pages(701..<702), pages(1000..<2048)])
                try script.send(package: script.package())
                script.waitToHear(.pong(4))
                try script.serve(readers: 3, of: destination, against: source)
                let asked = Set(script.requests.map { $0.offset >> 12 })
                claim(asked.count == script.requests.count, "a page was asked for twice")
                claim(asked.allSatisfy { (500..<2048).contains($0) }, "a page was asked for that is here")
                // Pages that are here already stay as they are.
                try script.pages([pages(0..<2048)])
                try script.pages([], final: true)
                try script.end()
                try destination.awaitEnd(.completed, "at its end")
                destination.claimMemory(of: source, "at the end")
            }
        }
    }

    @Test(
        "the last page of the channel for requested pages may come in one breath with its last word, and noise is no such channel",
        .timeLimit(.minutes(10)))
    func urgentEnd() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                let source = try Migrator.memoryAlone(mebibytes: 1)
                let destination = try source.postcopyDestination()
                let script = try ScriptedPostcopySource(of: source.machine, to: try destination.listen())
                try script.open()
                try script.pages([pages(0..<256)])
                for noise in ["GET / HTTP/1.1\r\n\r\n", "\u{0}\u{0}\u{0}\u{0}\u{0}\u{0}\u{0}\u{8}\u{3}rom"] {
                    let stranger = try script.connect()
                    try stranger.send(Array(noise.utf8))
                    var answer: [UInt8] = []
                    claim(try stranger.receive(appendingTo: &answer, upTo: 1) == 0, "a stranger was not turned away")
                }
                try script.discard([pages(5..<7), pages(9..<10)])
                try script.send(package: script.package())
                script.waitToHear(.pong(4))
                let urgent = try script.connect()
                var last = StreamWriter()
                last.endOfRecords()
                try script.records(of: [pages(5..<7), pages(9..<10)], on: urgent, and: last.bytes)
                try script.pages([], final: true)
                let began = Clock.monotonicNanoseconds
                try script.end()
                try destination.awaitEnd(.completed, "at its end")
                // Nor was it waited for in vain.
                claim(Clock.monotonicNanoseconds - began < 5_000_000_000, "it took long")
                destination.claimMemory(of: source, "at the end")
            }
        }
    }

    @Test("a connection that is lost in the package, at whatever byte, starts nothing", .timeLimit(.minutes(10)))
    func lostInPackage() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                let source = try Migrator.memoryAlone(mebibytes: 1)
                for cut in stride(from: 0, to: 200, by: 7) {
                    let destination = try source.postcopyDestination()
                    let script = try ScriptedPostcopySource(of: source.machine, to: try destination.listen())
                    try script.open()
                    try script.discard([pages(3..<200)])
                    let package = try script.package()
                    try script.command(.packaged(byteCount: UInt32(package.count)))
                    guard cut < package.count else { break }
                    try script.channel.send(Array(package.prefix(cut)))
                    try script.channel.finish()
                    try destination.awaitEnd(.failed, "cut at byte \(cut)")
                    claim(destination.machine.runState == .inMigrate, "the guest is \(destination.machine.runState)")
                    // Nobody waits for anything any more.
                    claim(
                        destination.machine.memory.blocks[0].read(at: 5 << 12, count: 8) == [0, 0, 0, 0, 0, 0, 0, 0], ""
                    )
                }
            }
        }
    }

    @Test(
        "nonsense before RUN is refused in a sentence, and starts nothing",
        .timeLimit(.minutes(10)))
    func nonsense() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 90) {
                let source = try Migrator.memoryAlone(mebibytes: 1)
                for (words, act) in nonsenseBeforeRun {
                    let destination = try source.postcopyDestination()
                    let script = try ScriptedPostcopySource(of: source.machine, to: try destination.listen())
                    try script.open()
                    try? act(script)
                    try? script.channel.finish()
                    // What was refused before memory was touched leaves a destination that waits for another source.
                    try waitFor("\(words): the end") {
                        let info = destination.info()
                        return info.errorDescription != nil && [.failed, .none].contains(info.status)
                    }
                    let reason = destination.info().errorDescription ?? ""
                    claim(
                        reason.contains(words) || words == "ended inside a package", "'\(words)' is not in: \(reason)")
                    claim(destination.machine.runState == .inMigrate, "\(words): \(destination.machine.runState)")
                }
            }
        }
    }

    @Test("nonsense behind RUN leaves a guest that runs on, and waits for what is missing", .timeLimit(.minutes(10)))
    func nonsenseBehind() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 90) {
                let source = try Migrator.memoryAlone(mebibytes: 1)
                for (name, act) in nonsenseBehindRun {
                    let destination = try source.postcopyDestination()
                    let script = try ScriptedPostcopySource(of: source.machine, to: try destination.listen())
                    try script.open()
                    try script.pages([pages(0..<100)])
                    try script.discard([pages(3..<50)])
                    try script.send(package: script.package())
                    script.waitToHear(.pong(4))
                    try waitFor("\(name): the guest to run") { destination.machine.runState == .running }
                    try script.pages([pages(3..<10)])
                    try waitFor("\(name): seven pages") { destination.info().ram?.remaining == 40 << 12 }
                    try act(script)
                    try waitFor("\(name): postcopy-paused, it is \(destination.info().status)", seconds: 30) {
                        destination.info().status == .postcopyPaused
                    }
                    claim(destination.machine.runState == .running, "\(name): it is \(destination.machine.runState)")
                    claim(
                        destination.machine.memory.blocks[0].read(at: 9 << 12, count: 4096)
                            == source.machine.memory.blocks[0].read(at: 9 << 12, count: 4096), "\(name): a page differs"
                    )
                    claim(
                        destination.info().ram?.remaining == 40 << 12,
                        "\(name): \(destination.info().ram?.remaining ?? 0)")
                }
            }
        }
    }

    @Test(
        "a guest whose source is lost runs on until it touches what is missing, and can be stopped then",
        .enabled(if: hasKVM, needsKVM), .timeLimit(.minutes(10)))
    func runsOn() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                let source = try Migrator.source("dirty,working-set=4M,fill=16M,random,rate=50M", cpus: 2)
                let destination = try source.postcopyDestination()
                let script = try ScriptedPostcopySource(of: source.machine, to: try destination.listen())
                try script.open()
                _ = try source.machine.stopForMigration()
                let block = source.machine.memory.blocks[0]
                let all = try block.allocatedRuns(in: block.pages)
                try script.discard(all)
                try script.send(package: script.package())
                script.waitToHear(.pong(4))
                try waitFor("the first request") { !script.requests.isEmpty }
                try script.serve(quietMilliseconds: 100) { script.requests.count > 40 }
                script.channel.cancel()
                try waitFor("postcopy-paused") { destination.info().status == .postcopyPaused }
                Clock.sleep(nanoseconds: 200_000_000)
                // The vCPUs sleep in the kernel for pages that nobody sends: they can be stopped, and the process ended, all the same.
                destination.machine.pause()
                claim(destination.machine.runState == .paused, "it is \(destination.machine.runState)")
                try destination.machine.resume()
                destination.shutDown()
            }
        }
    }

    @Test(
        "a process that ends while pages are missing stops its vCPUs before these read as zeroes, and who waits for one is told",
        .enabled(if: hasKVM, needsKVM), .timeLimit(.minutes(10)), arguments: ["anonymous", "memfd"])
    func endsWithPagesMissing(backing: String) async {
        await #expect(processExitsWith: .success) { [backing] in
            Child.run(seconds: 60) {
                let source = try Migrator.source("dirty,working-set=4M,fill=16M,random,rate=50M", cpus: 2)
                let destination = try source.postcopyDestination(backing)
                let script = try ScriptedPostcopySource(of: source.machine, to: try destination.listen())
                try script.open()
                _ = try source.machine.stopForMigration()
                let block = source.machine.memory.blocks[0]
                try script.discard(try block.allocatedRuns(in: block.pages))
                try script.send(package: script.package())
                script.waitToHear(.pong(4))
                try script.serve(quietMilliseconds: 100) { script.requests.count > 40 }
                script.channel.cancel()
                try waitFor("postcopy-paused") { destination.info().status == .postcopyPaused }
                let outcome = Monitor<String?>(nil)
                // It holds the vCPUs, and lets them go when it has ended.
                _ = try HostThread.detached(name: "checker") {
                    let words: String
                    do { words = "\(try destination.machine.checkGuest())" } catch { words = "\(error)" }
                    outcome.withLock { $0 = words }
                }
                Clock.sleep(nanoseconds: 200_000_000)
                claim(outcome.withLock { $0 } == nil, "nobody waits: \(outcome.withLock { $0 } ?? "")")
                destination.shutDown()
                let sentence = outcome.wait(deadline: .after(seconds: 10)) { $0 }
                claim(sentence?.contains("do not come any more") == true, sentence ?? "it still waits")
                // Every page can be read now, and zeroes stand where nothing came: the guest does not go on with them.
                let mapping = destination.machine.memory.blocks[0].mapping
                func all() -> [UInt8] { mapping.read(at: 0, count: mapping.byteCount) }
                Clock.sleep(nanoseconds: 100_000_000)
                let before = all()
                destination.machine.pause()
                try? destination.machine.resume()
                Clock.sleep(nanoseconds: 300_000_000)
                claim(all() == before, "the guest runs on with zeroes")
            }
        }
    }
}
