import Accelerator
import GuestMemory
import GuestPrograms
import Host
import Machine
import Synchronization
import TestSupport
import Testing

/// What the tests run with: small rings run full all the time.
enum Tracking: String, Codable, CaseIterable, Sendable {
    case log, ring, ring1024, ring4096

    var choice: DirtyTrackingChoice {
        switch self {
        case .log: .log
        case .ring: .ring(entryCount: nil)
        case .ring1024: .ring(entryCount: 1024)
        case .ring4096: .ring(entryCount: 4096)
        }
    }
}

@Suite("dirty tracking", .serialized, .enabled(if: hasKVM, needsKVM))
struct DirtyTrackingTests {
    @Test(
        "no page a guest writes is ever lost: a copy kept by tracking alone is guest memory", .timeLimit(.minutes(10)),
        arguments: [
            ("dirty,working-set=24M", 1), ("dirty,working-set=24M,random", 2), ("dirty,working-set=16M,heartbeat=0", 4),
            ("dirty,working-set=40M,fill=48M,random,stride=3", 4), ("probe,write,working-set=8M", 2),
        ], Tracking.allCases)
    func keepsUp(guest: (String, Int), tracking: Tracking) async {
        await #expect(processExitsWith: .success) {
            [program = guest.0 as String, cpus = guest.1 as Int, tracking] in
            Child.run(seconds: 15) {
                let machine = try VirtualMachine.guest(program, cpus: cpus, tracking: tracking.choice)
                try machine.resume()
                try machine.awaitReady()
                let shadow = try ShadowMemory(of: machine)
                try shadow.tracker.start()
                let before = try machine.guestStatus().touches
                for _ in 0..<8 {
                    try shadow.round()
                    Clock.sleep(nanoseconds: 3_000_000)
                }
                try shadow.finish()
                claim(try machine.guestStatus().touches > before, "the guest wrote nothing meanwhile")
                shadow.tracker.stop()
            }
        }
    }

    @Test(
        "pages that appear while the guest fills its memory are not lost either", .timeLimit(.minutes(10)),
        arguments: [(1, "anonymous"), (2, "anonymous"), (2, "memfd"), (4, "memfd")], [Tracking.log, .ring1024])
    func filling(with: (Int, String), tracking: Tracking) async {
        await #expect(processExitsWith: .success) {
            [cpus = with.0 as Int, backing = with.1 as String, tracking] in
            Child.run(seconds: 15) {
                let machine = try VirtualMachine.guest(
                    "idle,words=512,heartbeat=1ms", cpus: cpus, backing: RAMBacking(rawValue: backing)!,
                    tracking: tracking.choice)
                let shadow = try ShadowMemory(of: machine)
                try shadow.tracker.start()
                try shadow.round()
                try machine.resume()
                var rounds = 0
                while try !machine.guestStatus().isReady {
                    try shadow.round()
                    rounds += 1
                }
                claim(rounds > 2, "the guest was ready after \(rounds) rounds: nothing appeared while the log was read")
                try shadow.finish()
            }
        }
    }

    @Test("the test can fail: a copy that leaves out one reported range is found to be wrong", .timeLimit(.minutes(10)))
    func plantedBug() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 15) {
                let machine = try VirtualMachine.guest("dirty,working-set=16M,random")
                try machine.resume()
                try machine.awaitReady()
                let shadow = try ShadowMemory(of: machine)
                try shadow.tracker.start()
                try shadow.round()
                Clock.sleep(nanoseconds: 50_000_000)
                machine.pause()
                try shadow.collect()
                shadow.losesOneRange = true
                try shadow.copy()
                guard let lost = shadow.lost else { Child.fail("nothing was collected") }
                claim(try !shadow.differences().isEmpty, "the comparison does not see that \(lost) was left out")
                // Where the guest's status itself was left out, its memory contradicts it or is no guest's.
                let check = try? shadow.check()
                claim(check?.isVerified != true, "the checker does not see that \(lost) was left out")
            }
        }
    }

    @Test(
        "the first collect reports the allocated pages exactly, later ones what is written, and never a hole",
        .timeLimit(.minutes(10)),
        arguments: [Tracking.log, .ring4096])
    func idle(tracking: Tracking) async {
        await #expect(processExitsWith: .success) { [tracking] in
            Child.run(seconds: 15) {
                let machine = try VirtualMachine.guest(
                    "idle,fill=24M,heartbeat=10ms", mebibytes: 256, tracking: tracking.choice)
                try machine.resume()
                try machine.awaitReady()
                machine.pause()
                let block = machine.memory.blocks[0]
                let allocated = try block.pagesByPageTables()
                let shadow = try ShadowMemory(of: machine)
                try shadow.tracker.start()
                let first = try shadow.collect()
                claim(first == allocated, "\(first) pages reported first, \(allocated) are allocated")
                try block.forEachAllocatedRun { pages in
                    for page in pages { claim(shadow.bitmap.contains(page), "\(page) is allocated and not reported") }
                }
                try machine.resume()
                try shadow.copy()
                for round in 1...6 {
                    Clock.sleep(nanoseconds: 20_000_000)
                    let pages = try shadow.round()
                    claim(pages <= 24, "an idle guest wrote \(pages) pages in round \(round)")
                }
                try shadow.finish()
                let now = try block.pagesByPageTables()
                claim(now <= allocated + 8, "tracking allocated \(now - allocated) pages")
                try block.forEachAllocatedRun { pages in shadow.everReported.clear(pages) }
                claim(shadow.everReported.isEmpty, "\(shadow.everReported.count) pages were reported and never touched")
            }
        }
    }

    @Test(
        "tracking that was stopped starts afresh and misses nothing", .timeLimit(.minutes(10)),
        arguments: [Tracking.log, .ring4096])
    func again(tracking: Tracking) async {
        await #expect(processExitsWith: .success) { [tracking] in
            Child.run(seconds: 15) {
                let machine = try VirtualMachine.guest(
                    "dirty,working-set=16M,random", cpus: 2, tracking: tracking.choice)
                try machine.resume()
                try machine.awaitReady()
                for _ in 0..<3 {
                    let shadow = try ShadowMemory(of: machine)
                    try shadow.tracker.start()
                    for _ in 0..<3 { try shadow.round() }
                    try shadow.finish()
                    shadow.tracker.stop()
                    try machine.resume()
                    Clock.sleep(nanoseconds: 20_000_000)
                }
            }
        }
    }

    @Test(
        "a client that starts later takes over: what an earlier one still does is refused and loses nothing",
        .timeLimit(.minutes(10)),
        arguments: [Tracking.log, .ring4096])
    func takesOver(tracking: Tracking) async {
        await #expect(processExitsWith: .success) { [tracking] in
            Child.run(seconds: 15) {
                func refused(_ what: String, _ command: () throws -> Void) {
                    do { try command() } catch { return claim("\(error)".contains("dirty page tracking"), "\(error)") }
                    Child.fail("\(what) was not refused")
                }
                let machine = try VirtualMachine.guest(
                    "dirty,working-set=8M,fill=16M,random", tracking: tracking.choice)
                try machine.resume()
                try machine.awaitReady()
                let earlier = try ShadowMemory(of: machine)
                try earlier.tracker.start()
                refused("a second start of the same client") { try earlier.tracker.start() }
                try earlier.round()
                try earlier.collect()
                let later = try ShadowMemory(of: machine)
                try later.tracker.start()
                try later.round()
                Clock.sleep(nanoseconds: 20_000_000)
                refused("an earlier client's willSend") { try earlier.copy() }
                refused("an earlier client's collect") { try earlier.collect() }
                earlier.tracker.stop()
                try later.round()
                try later.finish()
            }
        }
    }

    @Test(
        "memory with more holes than are worth looking into is tracked as well", .timeLimit(.minutes(10)),
        arguments: ["anonymous", "memfd"], [Tracking.log, .ring])
    func fragmented(backing: String, tracking: Tracking) async {
        await #expect(processExitsWith: .success) { [backing, tracking] in
            Child.run(seconds: 15) {
                let machine = try VirtualMachine.guest(
                    "dirty,working-set=40M,random", cpus: 2, backing: RAMBacking(rawValue: backing)!,
                    tracking: tracking.choice)
                let block = machine.memory.blocks[0]
                for page in stride(from: 768, to: Int(block.pageCount), by: 2) {
                    block.mapping.store(UInt8(0), at: page * 4096)
                }
                let shadow = try ShadowMemory(of: machine)
                try shadow.tracker.start()
                try machine.resume()
                var rounds = 0
                while try rounds < 8 || !machine.guestStatus().isReady {
                    try shadow.round()
                    rounds += 1
                }
                for _ in 0..<4 { try shadow.round() }
                try shadow.finish()
            }
        }
    }

    @Test(
        "what this process writes into guest memory is tracked like the guest's own writes", .timeLimit(.minutes(10)),
        arguments: [Tracking.log, .ring4096])
    func hostWrites(tracking: Tracking) async {
        await #expect(processExitsWith: .success) { [tracking] in
            Child.run(seconds: 15) {
                let machine = try VirtualMachine.guest(
                    "dirty,working-set=8M,fill=8M", mebibytes: 64, tracking: tracking.choice)
                try machine.resume()
                try machine.awaitReady()
                let shadow = try ShadowMemory(of: machine)
                try shadow.tracker.start()
                let isOver = Atomic(false)
                let writes = Atomic(0)
                let memory = machine.memory
                let writer = try HostThread(name: "writer") {
                    var random = SeededRandom(seed: 7)
                    while !isOver.load(ordering: .relaxed) {
                        // Behind what the guest uses: across page borders, and pages that were holes.
                        let address = GuestPhysicalAddress((32 << 20) + random.next() % (24 << 20))
                        if random.next() % 4 == 0 {
                            try? memory.zero(at: address, byteCount: 5000)
                        } else {
                            try? memory.write(
                                [UInt8](repeating: UInt8(random.next() % 255 + 1), count: 300), at: address)
                        }
                        writes.add(1, ordering: .relaxed)
                    }
                }
                // On a busy machine ten rounds can be over before the writer was given a processor.
                var rounds = 0
                while rounds < 10 || writes.load(ordering: .relaxed) <= 100 {
                    try shadow.round()
                    rounds += 1
                }
                isOver.store(true, ordering: .relaxed)
                writer.join()
                try shadow.finish()
            }
        }
    }

    @Test(
        "a ring whose size is none is refused with the sizes there are, before there is a machine",
        arguments: [0, 1, 128, 1000, 1 << 30])
    func ringSizes(entries: Int) throws {
        let error = #expect(throws: MachineError.self) {
            try VirtualMachine.guest("idle", tracking: .ring(entryCount: entries))
        }
        let text = error?.description ?? ""
        #expect(
            text.contains("dirty-ring-size=\(entries)") && text.contains("a power of two of entries, 256 to "),
            "\(text)")
    }

    @Test("what a machine has is told: a ring is never protected by hand", arguments: Tracking.allCases)
    func facts(tracking: Tracking) throws {
        let accelerator = try #require(try VirtualMachine.guest("idle", tracking: tracking.choice).accelerator)
        let facts = accelerator.dirtyTracking
        #expect(accelerator.dirtyTracker(for: .migration).method == facts.method)
        switch tracking {
        case .log: #expect(facts.method == "log" && facts.ringEntries == nil)
        case .ring1024: #expect("\(facts)" == "ring of 1024 entries, manual protect off")
        case .ring, .ring4096:
            #expect(facts.method == "ring" && !facts.protectsManually)
            #expect(facts.ringEntries.map { $0 >= 4096 && $0.nonzeroBitCount == 1 } == true)
        }
    }

    @Test(
        "two clients at once each hear of every page, though what one collects is cleared", .timeLimit(.minutes(10)),
        arguments: [Tracking.log, .ring1024, .ring], [1, 4])
    func twoClients(tracking: Tracking, cpus: Int) async {
        await #expect(processExitsWith: .success) { [tracking, cpus] in
            Child.run(seconds: 15) {
                let machine = try VirtualMachine.guest(
                    "dirty,working-set=24M,random,heartbeat=0", cpus: cpus, tracking: tracking.choice)
                try machine.resume()
                try machine.awaitReady()
                let one = try ShadowMemory(of: machine)
                try one.tracker.start()
                for _ in 0..<3 { try one.round() }
                // Joins while the other is at work, collects at other times, and ends before it.
                let other = try ShadowMemory(of: machine, client: .measurement)
                try other.tracker.start()
                for turn in 0..<12 {
                    if turn % 3 != 1 { try one.round() }
                    if turn % 3 != 2 { try other.round() }
                    if turn % 4 == 0 { try one.collect() }
                    Clock.sleep(nanoseconds: 2_000_000)
                }
                try other.finish()
                other.tracker.stop()
                try machine.resume()
                for _ in 0..<3 { try one.round() }
                try one.finish()
                one.tracker.stop()
            }
        }
    }

    @Test(
        "two clients on two threads lose nothing to each other", .timeLimit(.minutes(10)),
        arguments: [Tracking.log, .ring4096])
    func racingClients(tracking: Tracking) async {
        await #expect(processExitsWith: .success) { [tracking] in
            Child.run(seconds: 15) {
                let machine = try VirtualMachine.guest(
                    "dirty,working-set=16M,random", cpus: 2, tracking: tracking.choice)
                try machine.resume()
                try machine.awaitReady()
                let other = try HostThread(name: "other") {
                    do {
                        let shadow = try ShadowMemory(of: machine, client: .measurement)
                        try shadow.tracker.start()
                        for _ in 0..<40 { try shadow.round() }
                        shadow.tracker.stop()
                        try shadow.tracker.start()
                        for _ in 0..<40 { try shadow.round() }
                        try shadow.finish()
                    } catch { Child.fail("the second client: \(error)") }
                }
                let shadow = try ShadowMemory(of: machine)
                try shadow.tracker.start()
                for _ in 0..<60 { try shadow.round() }
                other.join()
                try machine.resume()
                try shadow.round()
                try shadow.finish()
            }
        }
    }

    @Test(
        "a guest with RAM on both sides of the hole below 4 GiB is tracked in both", .timeLimit(.minutes(10)),
        arguments: [Tracking.log, .ring4096])
    func aboveFourGibibytes(tracking: Tracking) async {
        await #expect(processExitsWith: .success) { [tracking] in
            Child.run(seconds: 15) {
                let machine = try VirtualMachine.guest(
                    "probe,fill=none,write,stride=499,random", mebibytes: 5 << 10, cpus: 2, backing: .memfd,
                    tracking: tracking.choice)
                try Self.trackSparse(machine, above: PageIndex((3 << 30) / 4096), rounds: 6)
            }
        }
    }

    @Test(
        "a guest of 512 GiB costs what it has touched", .timeLimit(.minutes(10)),
        arguments: [Tracking.log, .ring4096])
    func halfATebibyte(tracking: Tracking) async {
        await #expect(processExitsWith: .success) { [tracking] in
            Child.run(seconds: 15) {
                let machine = try VirtualMachine.guest(
                    "probe,fill=none,write,stride=65521", mebibytes: 512 << 10, tracking: tracking.choice)
                try Self.trackSparse(machine, above: PageIndex((500 << 30) / 4096), rounds: 2, checks: false)
            }
        }
    }

    @Test("with a ring, the last collect costs what is dirty and not what there is", .timeLimit(.minutes(10)))
    func lastCollect() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 25) {
                /// The shortest of several last collects, in nanoseconds, and the pages it reported.
                func collect(mebibytes: UInt64) throws -> (nanoseconds: UInt64, pages: UInt64) {
                    let machine = try VirtualMachine.guest(
                        "dirty,working-set=16M,fill=16M,heartbeat=0", mebibytes: mebibytes,
                        tracking: .ring(entryCount: nil))
                    try machine.resume()
                    try machine.awaitReady()
                    let shadow = try ShadowMemory(of: machine)
                    try shadow.tracker.start()
                    try shadow.round()
                    var best = (nanoseconds: UInt64.max, pages: UInt64(0))
                    for _ in 0..<12 {
                        Clock.sleep(nanoseconds: 5_000_000)
                        machine.pause()
                        let began = Clock.monotonicNanoseconds
                        let pages = try shadow.collect()
                        let took = Clock.monotonicNanoseconds - began
                        if pages > 100, took < best.nanoseconds { best = (took, pages) }
                        try shadow.copy()
                        try machine.resume()
                    }
                    try shadow.finish(checks: false)
                    shadow.tracker.stop()
                    return best
                }
                let small = try collect(mebibytes: 1 << 10)
                let large = try collect(mebibytes: 512 << 10)
                claim(small.pages > 100 && large.pages > 100, "\(small.pages) and \(large.pages) pages were dirty")
                let ratio = Double(large.nanoseconds) / Double(small.nanoseconds)
                claim(ratio < 3, "\(large.nanoseconds) ns with 512 GiB, \(small.nanoseconds) ns with 1 GiB")
            }
        }
    }

    /// A guest that walks over all its RAM in large steps, from before its first page is touched.
    private static func trackSparse(
        _ machine: VirtualMachine, above high: PageIndex, rounds: Int, checks: Bool = true
    ) throws {
        let shadow = try ShadowMemory(of: machine)
        try shadow.tracker.start()
        try shadow.round()
        try machine.resume()
        try machine.awaitReady()
        for _ in 0..<rounds { try shadow.round() }
        try waitFor("the guest to have walked over all its memory") { try machine.guestStatus().passes >= 2 }
        // The checker reads all that a guest may have touched, which is too much to read here.
        try shadow.finish(checks: checks)
        let highRun = shadow.everReported.nextRun(from: high, limit: 1)
        claim(highRun != nil, "nothing was reported above \(high)")
        let allocated = try machine.memory.blocks[0].allocatedPages()
        claim(shadow.everReported.count <= allocated, "more pages were reported than ever touched")
    }
}
