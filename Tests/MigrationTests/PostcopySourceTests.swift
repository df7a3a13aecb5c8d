import Accelerator
import Glibc
import GuestMemory
import GuestPrograms
import Host
import Machine
import MigrationStream
import TestSupport
import Testing
import Transport

@testable import Migration

@Suite("The source of postcopy, before a destination that follows a script", .serialized, .timeLimit(.minutes(10)))
struct PostcopySourceTests {
    private static let byteCount: UInt64 = 8 << 20
    /// Every fourth page was never touched, and every other fourth holds zeros that were written.
    private static func kind(_ page: UInt64) -> Int { Int(page % 4) }

    /// A machine without a guest, and the other end of its migration, which has got as far as the package.
    private final class Trial {
        let source: Migrator
        private(set) var destination: ScriptedDestination!
        var urgent: Descriptor?

        /// - Parameters:
        ///   - rate: of what nobody asks for, bytes per second.
        ///   - starts: say at once that the guest shall move.
        init(rate: UInt64 = 0, preempts: Bool = false, starts: Bool = true) throws {
            let machine = try VirtualMachine(
                MachineConfiguration(kind: .none, memoryByteCount: byteCount, backing: .memfd),
                serial: SerialPort(.none))
            for page in 0..<byteCount / 4096 where PostcopySourceTests.kind(page) != 0 {
                let isZero = PostcopySourceTests.kind(page) == 1
                machine.memory.blocks[0].mapping.store(isZero ? 0 : page | 1 << 40, at: Int(page) * 4096 + 8)
            }
            try machine.resume()
            source = Migrator(machine)
            try source.set(.postcopyRAM, true)
            if preempts { try source.set(.postcopyPreempt, true) }
            var parameters = MigrationParameters()
            // Precopy is to be under way still when the guest is told to move.
            parameters.maxBandwidthBytesPerSecond = 64 << 10
            parameters.maxPostcopyBandwidthBytesPerSecond = rate
            try source.set(parameters)
            let listener = try Socket.listen(host: "127.0.0.1", port: "0")
            try source.migrate(to: .tcp(host: "127.0.0.1", port: "\(Socket.localPort(of: listener) ?? 0)"))
            destination = ScriptedDestination(try #require(try Socket.accept(listener)), byteCount: byteCount)
            try destination.read { $0 == .command(.ping(Wire.godwitPing)) }
            if preempts { urgent = try Socket.accept(listener) }
            if starts { try source.startPostcopy() }
        }

        /// The destination's process is gone.
        func drop() {
            destination = nil
            urgent = nil
        }

        var status: MigrationStatus { source.info().status }

        func awaitStatus(_ wanted: MigrationStatus) throws {
            let deadline = Deadline.after(seconds: 20)
            while status != wanted {
                guard !deadline.hasPassed else {
                    throw ScriptedDestination.Obstacle(
                        "the migration is \(status), not \(wanted): \(source.info().errorDescription ?? "")")
                }
                Clock.sleep(nanoseconds: 1_000_000)
            }
        }

        /// Waits for a page that was asked for.
        func await(_ offset: UInt64) throws {
            while destination.pages[offset] == nil { guard try destination.next() != nil else { return } }
        }

        func finish() throws {
            try destination.read { $0 == .endOfStream }
            try destination.say(.shut(0))
            try awaitStatus(.completed)
        }

        /// Every page that was to come came once, as it is here.
        func expectWhole() {
            var wrong: [UInt64] = []
            for page in 0..<byteCount / 4096 {
                let arrival = destination.pages[page * 4096]
                let own = source.machine.memory.blocks[0].mapping.read(at: Int(page) * 4096, count: 4096)
                let isAsItShouldBe =
                    PostcopySourceTests.kind(page) == 0
                    ? arrival == nil || arrival == .init(times: 1, bytes: own) : arrival == .init(times: 1, bytes: own)
                if !isAsItShouldBe { wrong.append(page) }
            }
            #expect(wrong.isEmpty, "pages \(wrong.prefix(10)) of \(wrong.count)")
        }
    }

    @Test(
        "nothing was sent before: the destination forgets all that comes, gets the state in one package, and each page once"
    )
    func wholeStream() throws {
        let trial = try Trial()
        try trial.destination.readToPackage()
        // What precopy sent came before DISCARD, and is forgotten only where it is still to come.
        let early = trial.destination.pages
        trial.destination.pages = [:]
        try trial.finish()
        let commands = trial.destination.items.compactMap { item -> PostcopyCommand? in
            if case .command(.postcopy(let command)) = item { command } else { nil }
        }
        #expect(commands.first == .advise(PostcopyAdvice(blockPageSizes: 4096)))
        #expect(trial.destination.package.first == .command(.postcopy(.listen)))
        #expect(trial.destination.package.suffix(2) == [.command(.ping(3)), .command(.postcopy(.run))])
        #expect(trial.destination.package.contains { if case .device = $0 { true } else { false } })
        let forgotten = Set(
            trial.destination.discarded.flatMap { range in
                stride(from: range.offset, to: range.offset + range.length, by: 4096)
            })
        #expect(forgotten == Set(trial.destination.pages.keys))
        #expect(forgotten.isDisjoint(with: early.keys) && !forgotten.isEmpty)
        trial.destination.pages.merge(early) { after, _ in after }
        trial.expectWhole()
        #expect(trial.source.machine.runState == .postMigrate)
        #expect(!trial.destination.items.contains { if case .vmDescription = $0 { true } else { false } })
    }

    @Test(
        "a requested page does not wait for the limit, comes once however often it is asked for, and the walk goes on behind it"
    )
    func requested() throws {
        // A page takes two seconds.
        let trial = try Trial(rate: 2048)
        try trial.destination.readToPackage()
        let began = Clock.monotonicNanoseconds
        for page in [1023, 514, 514, 514, 1023] as [UInt64] { try trial.destination.ask(page * 4096) }
        for page in [1023, 514] as [UInt64] { try trial.await(page * 4096) }
        // Of holes, too.
        try trial.destination.ask(1000 * 4096)
        try trial.destination.ask(1000 * 4096, length: 4 * 4096)
        for page in 1000...1003 as ClosedRange<UInt64> { try trial.await(page * 4096) }
        #expect(Clock.monotonicNanoseconds - began < 2_000_000_000)
        let requests = trial.source.info().ram?.postcopyRequests
        #expect(requests == 7)
        try trial.source.change { $0.maxPostcopyBandwidthBytesPerSecond = 0 }
        let before = trial.destination.pages.count
        var behind: [UInt64] = []
        while behind.count < 4 {
            guard case .page(_, let offset)? = try trial.destination.next() else { continue }
            behind.append(offset / 4096)
        }
        #expect(before < 20)
        // Neighbours of what was asked for, then the walk.
        #expect(behind.allSatisfy { $0 > 1003 || (515...518).contains($0) } || behind.first! < 4, "\(behind)")
        try trial.finish()
        trial.expectWhole()
    }

    @Test(
        "where a stream of requests leads comes next, in front of the walk, with the rest and at its rate; each page once",
        arguments: [false, true])
    func foreseen(preempts: Bool) throws {
        // Twenty pages a second.
        let trial = try Trial(rate: 80 << 10, preempts: preempts)
        try trial.destination.readToPackage()
        var decoder = trial.destination.urgentDecoder()
        var buffer = ReceiveBuffer()
        let asked: [UInt64] = [203, 243, 283]
        for page in asked {
            try trial.destination.ask(page * 4096)
            if let urgent = trial.urgent {
                try trial.destination.readPage(urgent, &decoder, &buffer)
            } else {
                try trial.await(page * 4096)
            }
        }
        var behind: [UInt64] = []
        while behind.count < 12 {
            guard case .page(_, let offset)? = try trial.destination.next() else { continue }
            behind.append(offset / 4096)
        }
        // One or two may have been under way.
        let stream = behind.drop { $0 != 323 }.prefix(4)
        #expect(Array(stream) == [323, 363, 403, 443] && behind.firstIndex(of: 323) ?? 12 <= 4, "\(behind)")
        try trial.source.change { $0.maxPostcopyBandwidthBytesPerSecond = 0 }
        try trial.finish()
        trial.expectWhole()
    }

    @Test("with a channel of their own, requested pages come there, from its first byte on, and the rest beside them")
    func preempts() throws {
        let trial = try Trial(rate: 2048, preempts: true)
        let urgent = try #require(trial.urgent)
        try trial.destination.readToPackage()
        var decoder = trial.destination.urgentDecoder()
        var buffer = ReceiveBuffer()
        for page in [7, 2000, 6, 4] as [UInt64] {
            try trial.destination.ask(page * 4096)
            try trial.destination.readPage(urgent, &decoder, &buffer)
            #expect(trial.destination.pages[page * 4096]?.times == 1)
        }
        try trial.source.change { $0.maxPostcopyBandwidthBytesPerSecond = 0 }
        try trial.finish()
        trial.expectWhole()
        #expect(try decoder.next(from: &buffer) == nil)
        try trial.destination.readPage(urgent, &decoder, &buffer)
    }

    @Test(
        "requests that no destination of sound mind makes end in a sentence; the source keeps what it has",
        arguments: [
            "outside", "across the end", "unaligned", "empty", "unknown block", "no block", "endless",
            "unknown message", "a bitmap", "answers without end",
        ])
    func hostile(what: String) throws {
        let trial = try Trial(rate: 4096)
        try trial.destination.readToPackage()
        try trial.awaitStatus(.postcopyActive)
        let end = Self.byteCount
        var writer = StreamWriter()
        func add(_ block: String, _ offset: UInt64, _ length: UInt32) {
            writer.message(.postcopy(.requestPages(PageRequest(block: block, offset: offset, length: length))))
        }
        var words = "RAM block"
        switch what {
        case "outside": add("ram", end, 4096)
        case "across the end": add("ram", end - 4096, 8192)
        case "unaligned": add("ram", 17, 4096)
        case "empty": add("ram", 0, 0)
        case "unknown block": add("rom", 0, 4096)
        case "no block":
            // REQ_PAGES, which names none.
            writer.append([0, 4, 0, 12] + [UInt8](repeating: 0, count: 8) + [0, 0, 16, 0])
            words = "requested last"
        case "unknown message":
            writer.append([0x77, 0x77, 0, 0])
            words = "0x7777"
        case "a bitmap":
            writer.message(.postcopy(.receivedBitmap(block: "ram", byteCount: end / 4096 / 8)))
            writer.append([UInt8](repeating: 0xff, count: Int(end) / 4096 / 8))
            words = "was not asked"
        case "answers without end":
            for _ in 0..<200 { writer.message(.pong(4)) }
            words = "goes on answering"
        default:
            for _ in 0..<1000 { add("ram", 8 * 4096, 4096) }
            words = "without end"
        }
        let bytes = writer.take()
        for _ in 0..<(what == "endless" ? 1000 : 1) {
            // The source may have had enough.
            guard (try? trial.destination.main.writeAll(bytes)) != nil else { break }
        }
        try trial.awaitStatus(.postcopyPaused)
        let sentence = trial.source.info().errorDescription ?? ""
        #expect(sentence.contains(words) && sentence.contains("stays here"), "\(sentence)")
        #expect(trial.source.machine.runState == .postMigrate)
        #expect(throws: MigrationError.self) { try trial.source.cancel() }
        #expect(throws: MigrationError.self) { try trial.source.migrate(to: .unix(path: "/nowhere")) }
        trial.source.shutDown()
    }

    @Test(
        "who speaks of pages before the guest moved ends the migration, and the guest goes on here",
        arguments: [false, true])
    func tooEarly(bitmap: Bool) throws {
        let trial = try Trial(starts: false)
        try trial.awaitStatus(.active)
        if bitmap {
            try trial.destination.say(
                .postcopy(.receivedBitmap(block: "ram", byteCount: Self.byteCount / 4096 / 8)))
        } else {
            try trial.destination.ask(0)
        }
        try trial.awaitStatus(.failed)
        let words = bitmap ? "was not asked" : "before it has the guest"
        #expect(trial.source.info().errorDescription?.contains(words) == true)
        #expect(trial.source.machine.runState == .running)
    }

    @Test(
        "a connection that ends before the state arrived leaves doubt, which an operator settles one way or the other",
        arguments: [false, true])
    func doubt(settlesHere: Bool) throws {
        let trial = try Trial(rate: 4096, starts: false)
        trial.destination.deafFrom = 3
        try trial.source.startPostcopy()
        try trial.destination.readToPackage()
        #expect(trial.status == .postcopyDevice)
        Socket.shutdown(trial.destination.main)
        try trial.awaitStatus(.unsettled)
        #expect(trial.source.machine.runState == .postMigrate)
        try trial.source.settle(settlesHere ? .resumeHere : .startedThere)
        try trial.awaitStatus(settlesHere ? .failed : .postcopyPaused)
        #expect(trial.source.machine.runState == (settlesHere ? .running : .postMigrate))
    }

    @Test(
        "the connection is cut at any byte: who has RUN has the guest alone, and nobody is left without a word",
        arguments: [20_261_121, 5] as [UInt64])
    func cut(seed: UInt64) throws {
        var random = SeededRandom(seed: seed)
        var endings: [MigrationStatus: Int] = [:]
        for number in 0..<60 {
            let trial = try Trial(rate: 256 << 10, preempts: random.next() % 3 == 0, starts: false)
            let cut = 60 + Int(random.next() % (1 << (6 + random.next() % 13)))
            trial.destination.bytesUntilCut = cut
            trial.destination.deafFrom = random.next() % 3 == 0 ? 3 : .max
            try trial.source.startPostcopy()
            _ = try? trial.destination.read { _ in false }
            // What was not read makes a reset of the close that the end of the trial is; this is an end, or half of one.
            if random.next() % 2 == 0 { Socket.shutdown(trial.destination.main) }
            let hasGuest = trial.destination.hasPackage
            trial.drop()
            let deadline = Deadline.after(seconds: 20)
            while ![.failed, .unsettled, .postcopyPaused].contains(trial.status), !deadline.hasPassed {
                Clock.sleep(nanoseconds: 500_000)
            }
            let when: Comment = "trial \(number) of seed \(seed), cut after \(cut) bytes: \(trial.status)"
            let runs = trial.source.machine.runState == .running
            #expect(!(hasGuest && runs), when)
            #expect(runs == (trial.status == .failed), when)
            #expect([.failed, .unsettled, .postcopyPaused].contains(trial.status), when)
            endings[trial.status, default: 0] += 1
            trial.source.shutDown()
        }
        print("postcopy: cut 60 times with seed \(seed): \(endings)")
        #expect(endings.count == 3)
    }

    @Test(
        "a guest that writes all the time moves between two rounds: what the destination has in the end is what the guest left",
        .enabled(if: hasKVM, needsKVM), arguments: ["log", "ring"])
    func running(tracking: String) async {
        await #expect(processExitsWith: .success) { [tracking] in
            Child.run(seconds: 60) {
                let byteCount: UInt64 = 16 << 20
                let machine = try VirtualMachine(
                    MachineConfiguration(
                        memoryByteCount: byteCount, cpuCount: 2,
                        boot: .guest(try GuestProgram(parsing: "dirty,working-set=2M,fill=8M,random")),
                        dirtyTracking: tracking == "ring" ? .ring(entryCount: 4096) : .log),
                    serial: SerialPort(.none))
                try machine.resume()
                try waitFor("the guest to be ready") { try machine.guestStatus().isReady }
                let source = Migrator(machine)
                try source.set(.postcopyRAM, true)
                try source.change { $0.maxBandwidthBytesPerSecond = 20 << 20 }
                let listener = try Socket.listen(host: "127.0.0.1", port: "0")
                try source.migrate(to: .tcp(host: "127.0.0.1", port: "\(Socket.localPort(of: listener) ?? 0)"))
                guard let main = try Socket.accept(listener) else { Child.fail("nobody came") }
                let destination = ScriptedDestination(
                    main, byteCount: byteCount, catalogue: machine.sectionCatalogue)
                destination.forgets = true
                var rounds = 0
                try destination.read {
                    if $0 == .ramRound(final: false) { rounds += 1 }
                    return rounds == 3
                }
                try source.startPostcopy()
                try destination.readToPackage()
                // Asked for all over, while the rest comes.
                for page in stride(from: 0, to: byteCount / 4096, by: 37) {
                    if destination.pages[page * 4096] == nil { try destination.ask(page * 4096) }
                }
                try destination.read { $0 == .endOfStream }
                try destination.say(.shut(0))
                try source.awaitEnd()
                claim(machine.runState == .postMigrate, "the source is \(machine.runState)")
                claim(destination.repeated.isEmpty, "\(destination.repeated.count) pages came twice")
                claim(!destination.discarded.isEmpty, "nothing was left to follow")
                let mapping = machine.memory.blocks[0].mapping
                let zeros = [UInt8](repeating: 0, count: 4096)
                for page in 0..<Int(byteCount) / 4096 {
                    let there = destination.pages[UInt64(page) * 4096]?.bytes ?? zeros
                    claim(
                        there == mapping.read(at: page * 4096, count: 4096), "page \(page) is not as the guest left it")
                }
            }
        }
    }
}
