import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host
import Synchronization
import TestSupport
import Testing

@testable import KVM

@Suite(
    "changing memory under running vCPUs", .serialized,
    .enabled(if: hasKVM, needsKVM))
struct SlotRaceTests {
    @Test(
        "memory is exchanged behind readers, callers and page walkers: none fails, and none is stopped",
        .timeLimit(.minutes(10)))
    func exchanges() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let all = 0..<RacingGuest.arenaPages
                let guest = try RacingGuest([.read, .call, .walk], showing: [(all, 1, false)])
                try guest.awaitPasses()
                for round in 0..<400 {
                    let (one, two) = round % 2 == 0 ? (2, 1) : (1, 2)
                    switch round % 3 {
                    case 0: try guest.show([(all, one, false)])
                    case 1: try guest.show([(0..<500, one, true), (500..<520, two, false), (520..<1024, one, true)])
                    default: try guest.show([(0..<700, two, round % 4 == 0), (700..<1024, one, true)])
                    }
                    if round % 20 == 0 { try guest.awaitPasses() }
                    claim(guest.failed.isEmpty, "round \(round): \(guest.failed)")
                }
                try guest.awaitPasses()
                guest.stop()
                let statistics = guest.slots.statistics
                claim(guest.failed.isEmpty, "\(guest.failed)")
                claim(statistics.pauses == 0 && statistics.retries == 0, "\(statistics)")
                claim(statistics.commits == 400 && statistics.slots == 2, "\(statistics)")
            }
        }
    }

    /// Page tables of the arena come from one block and then the other; what the first says is wrong from then on.
    private static func exchangeTables(_ guest: RacingGuest) throws {
        let all = 0..<RacingGuest.arenaPages
        try guest.awaitPasses()
        for round in 0..<40 where guest.failed.isEmpty {
            let (old, new) = round % 2 == 0 ? (1, 2) : (2, 1)
            guest.spoil(new, false)
            try guest.show([(all, new, false)])
            guest.spoil(old, true)
            try guest.awaitPasses()
        }
        guest.stop()
    }

    @Test("page tables that lie in exchanged memory are looked at again", .timeLimit(.minutes(10)))
    func pageTables() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let all = 0..<RacingGuest.arenaPages
                let guest = try RacingGuest([.walk, .walk, .read], showing: [(all, 1, false)])
                try Self.exchangeTables(guest)
                claim(guest.failed.isEmpty, "\(guest.failed)")
                claim(guest.slots.statistics.pauses == 0, "\(guest.slots.statistics)")
                guard try KVMSystem().shadowPaging != .none else { return }
                // The test can fail: where KVM makes its own page tables of the guest's, they are stale unless it is told to forget.
                let forgetful = try RacingGuest(
                    [.walk, .walk, .read], showing: [(all, 1, false)], shadowPaging: ShadowPaging.none)
                try Self.exchangeTables(forgetful)
                claim(!forgetful.failed.isEmpty, "nobody saw stale translations")
            }
        }
    }

    @Test(
        "a hole that opens inside a slot reads as all ones; only where a guest writes there the slot is split",
        .timeLimit(.minutes(10)), arguments: [false, true])
    func holes(writes: Bool) async {
        await #expect(processExitsWith: .success) { [writes] in
            Child.run(seconds: 30) {
                let guest = try RacingGuest(
                    [.read, .walk] + (writes ? [.write] : []), showing: [(0..<1024, 1, false)], writeRange: 190..<310)
                for round in 0..<30 {
                    try guest.show([(0..<200, 1, false), (300..<600, 2, false), (601..<1024, 1, false)])
                    try guest.awaitPasses()
                    try guest.show([(round % 3 == 2 ? 100..<1024 : 0..<1024, round % 2 + 1, false)])
                    try guest.awaitPasses()
                    claim(guest.failed.isEmpty, "round \(round): \(guest.failed)")
                }
                guest.stop()
                let statistics = guest.slots.statistics
                claim(guest.failed.isEmpty, "\(guest.failed)")
                if writes {
                    claim((1...4).contains(statistics.pauses) && statistics.splits >= 1, "\(statistics)")
                } else {
                    claim(statistics.pauses == 0 && statistics.slots == 2 && statistics.retries == 0, "\(statistics)")
                }
            }
        }
    }

    @Test(
        "what a guest writes to read-only memory is discarded; the range gets a slot of its own, once",
        .timeLimit(.minutes(10)))
    func readOnly() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let guest = try RacingGuest(
                    [.write, .call, .walk], showing: [(0..<1024, 1, false)], writeRange: 0..<100)
                try guest.awaitPasses()
                let one = guest.memory.blocks[1].mapping
                for round in 0..<10 {
                    try guest.show([(0..<50, 1, true), (50..<1024, 1, false)])
                    let before = (0..<100).map { one.load(at: $0 * 4096 + 8, as: UInt64.self) }
                    try guest.awaitPasses()
                    let after = (0..<100).map { one.load(at: $0 * 4096 + 8, as: UInt64.self) }
                    claim(before[..<50] == after[..<50], "round \(round): read-only memory was written")
                    claim(
                        zip(before, after).dropFirst(50).allSatisfy { $0 < $1 }, "round \(round): RAM was not written")
                    try guest.show([(0..<1024, 1, false)])
                    try guest.awaitPasses()
                    claim(guest.failed.isEmpty, "round \(round): \(guest.failed)")
                }
                guest.stop()
                let statistics = guest.slots.statistics
                claim(statistics.promotions == 10 && statistics.pauses == 20, "\(statistics)")
            }
        }
    }

    @Test(
        "memory without a file is resized with every vCPU held, which none of them notices; done naively they fail",
        .timeLimit(.minutes(10)), arguments: SlotStrategy.allCases.map(\.rawValue))
    func anonymous(strategy: String) async {
        await #expect(processExitsWith: .success) { [strategy] in
            Child.run(seconds: 40) {
                let guest = try RacingGuest(
                    [.call, .walk], showing: [(0..<1024, 3, false)], strategy: SlotStrategy(rawValue: strategy)!)
                try guest.awaitPasses()
                var failed = false
                // On a busy machine a vCPU may not be on a processor in any one gap.
                let rounds = strategy == "naive" ? 2_000 : 60
                for round in 0..<rounds where !failed {
                    // All of it can be read in both.
                    try guest.show([(0..<900, 3, false), (900..<1024, 3, round % 2 == 0)])
                    try guest.awaitPasses()
                    failed = !guest.failed.isEmpty
                }
                guest.stop()
                let statistics = guest.slots.statistics
                switch SlotStrategy(rawValue: strategy)! {
                case .naive: claim(failed && statistics.pauses == 0, "no vCPU failed in \(rounds) gaps: \(statistics)")
                case .atomic, .pauseAll: claim(!failed && statistics.pauses == 60, "\(guest.failed), \(statistics)")
                }
            }
        }
    }

    /// Lets a guest write all over the arena while it changes, and looks whether every page that changed was reported.
    private static func writeAndChange(_ strategy: SlotStrategy, rounds: Int, tooEarly: Bool = false) throws -> UInt64 {
        let all = 0..<RacingGuest.arenaPages
        let log = LogReader()
        let guest = try RacingGuest(
            [.write, .write, .read], showing: [(all, 1, false)], strategy: strategy, observer: { log.attach(to: $0) })
        try guest.awaitPasses()
        var (random, lost) = (SeededRandom(seed: 11), UInt64(0))
        for round in 0..<rounds {
            let before = try guest.slots.hold.hold {
                try log.collect(guest.slots.slots)
                log.dirty = [:]
                return (1...3).map { guest.contents(of: $0) }
            }
            Clock.sleep(nanoseconds: random.next() % 1_000_000)
            let block = round % 5 == 4 ? 3 : round % 2 + 1
            let layout: [(pages: Range<Int>, block: Int, isReadOnly: Bool)] = [
                (0..<300, block, false), (300..<301, 1, false), (301..<1024, block, false),
            ]
            if tooEarly { for slot in guest.slots.slots { try log.willChange(slot, to: slot) } }
            log.isDeaf = tooEarly
            try guest.show(layout)
            log.isDeaf = false
            Clock.sleep(nanoseconds: random.next() % 1_000_000)
            try guest.slots.hold.hold {
                try log.collect(guest.slots.slots)
                for block in 1...3 {
                    let now = guest.contents(of: block)
                    for page in all where now[page] != before[block - 1][page] {
                        if log.dirty[block]?.contains(UInt64(page)) != true { lost += 1 }
                    }
                }
            }
            claim(guest.failed.isEmpty, "round \(round): \(guest.failed)")
        }
        guest.stop()
        return lost
    }

    @Test("no page that is written while it is exchanged or taken away is lost", .timeLimit(.minutes(10)))
    func dirtyPages() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 50) {
                let lost = try Self.writeAndChange(.atomic, rounds: 120)
                claim(lost == 0, "\(lost) pages were written and not reported")
                // The test can fail: what is asked before the exchange misses what is written until then.
                let missed = try Self.writeAndChange(.atomic, rounds: 120, tooEarly: true)
                claim(missed > 0, "nobody noticed that the log was read too early")
            }
        }
    }

    @Test("a change that is refused leaves the old layout as it was", .timeLimit(.minutes(10)))
    func refusals() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let log = LogReader()
                let guest = try RacingGuest(
                    [.call, .walk, .read], showing: [(0..<1024, 1, false)], limit: 5, observer: { log.attach(to: $0) })
                func refused(_ words: String, _ pieces: [(pages: Range<Int>, block: Int, isReadOnly: Bool)]) throws {
                    let before = guest.slots.slots
                    do {
                        try guest.show(pieces)
                        Child.fail("not refused: \(words)")
                    } catch let error as MemoryError {
                        claim(error.description.contains(words), "\(error)")
                    }
                    claim(guest.slots.slots == before, "the table changed: \(guest.slots.slots)")
                    try guest.awaitPasses()
                    claim(guest.failed.isEmpty, "\(words): \(guest.failed)")
                }
                try guest.awaitPasses()
                log.known = Set(guest.slots.slots.map(\.number))
                for _ in 0..<20 {
                    try refused(
                        "needs 6 memory slots, but this kernel's KVM has 5; use less memory or fewer regions",
                        [
                            (0..<1024, 2, false), (1025..<1026, 3, false), (1027..<1028, 3, false),
                            (1029..<1030, 3, false),
                        ])
                    // The listener fails once everything has been done: the window, a new slot, and what was told of them go back.
                    log.fails = true
                    try refused("the log is gone", [(0..<1024, 2, false), (1025..<1026, 3, false)])
                    log.fails = false
                    claim(log.known == Set(guest.slots.slots.map(\.number)), "the listener knows of \(log.known)")
                }
                guest.stop()
                claim(guest.slots.statistics.commits == 0, "\(guest.slots.statistics)")
                let one = guest.memory.blocks[2].mapping
                claim((0..<1024).allSatisfy { one.load(at: $0 * 4096 + 8, as: UInt64.self) == 0 }, "")
            }
        }
    }

    @Test(
        "vCPUs that change the layout themselves do not wait for themselves, nor for each other",
        .timeLimit(.minutes(10)))
    func changedByGuests() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let guest = try RacingGuest(
                    [.call, .write, .write, .walk], showing: [(0..<1024, 3, false)], writeRange: 1024..<1025)
                let changes = Atomic(0)
                let change: @Sendable () -> Void = { [weak guest] in
                    let count = changes.add(1, ordering: .relaxed).newValue
                    do { try guest?.show([(0..<900, 3, false), (900..<1024, 3, count % 2 == 0)]) } catch {
                        Child.fail("\(error)")
                    }
                }
                guest.whenWrittenBehind(change)
                for _ in 0..<50 {
                    change()
                    Clock.sleep(nanoseconds: 500_000)
                }
                try guest.awaitPasses(50)
                guest.stop()
                let statistics = guest.slots.statistics
                claim(guest.failed.isEmpty, "\(guest.failed)")
                claim(statistics.commits >= 150 && statistics.pauses >= 100, "\(statistics)")
            }
        }
    }

    @Test("a thousand random layouts under readers end with every slot as it should be", .timeLimit(.minutes(10)))
    func randomLayouts() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 55) {
                let seed = UInt64.random(in: 0..<1 << 32)
                var random = SeededRandom(seed: seed)
                let guest = try RacingGuest([.read, .read, .walk], showing: [(0..<1024, 1, false)])
                for round in 0..<1000 {
                    var pieces: [(pages: Range<Int>, block: Int, isReadOnly: Bool)] = []
                    var page = 0
                    while page < 1024 {
                        let end = page < 512 ? min(512, page + Int(random.next() % 300) + 1) : 1024
                        // The page walker's tables stay.
                        let block = page < 512 ? Int(random.next() % 7) : Int(random.next() % 2) + 1
                        let kind = block == 3 ? 3 : block > 4 ? 0 : (block - 1) % 2 + 1
                        if kind > 0 { pieces.append((page..<end, kind, page < 512 && random.next() % 3 == 0)) }
                        page = end
                    }
                    try guest.show(pieces)
                    if round % 25 == 0 { try guest.awaitPasses() }
                    claim(guest.failed.isEmpty, "seed \(seed), round \(round): \(guest.failed)")
                }
                guest.stop()
                claim(guest.failed.isEmpty, "seed \(seed): \(guest.failed)")
                for page in 0..<512 {
                    let address = GuestPhysicalAddress(RacingGuest.arena + UInt64(page) * 4096)
                    let shown = guest.slots.slots.flatMap(\.shown).first { $0.pages.contains(address.value / 4096) }
                    let wanted = guest.layout.range(at: address).map { range in
                        guest.memory.blocks.firstIndex { $0 === range.block }
                    }
                    claim(shown?.content.block == wanted, "seed \(seed): page \(page)")
                }
            }
        }
    }
}

/// The kernel's dirty log, read as a tracker does that nobody waits for: what it knows is asked for at each change.
private final class LogReader: SlotObserver, @unchecked Sendable {
    private var machine: Descriptor?
    /// Pages by block.
    var dirty: [Int: Set<UInt64>] = [:]
    var known: Set<UInt32> = []
    var fails = false
    var isDeaf = false

    func attach(to machine: Descriptor) -> LogReader {
        self.machine = machine
        return self
    }

    func willAdd(_ slot: Slot) -> Bool {
        known.insert(slot.number)
        return true
    }

    func wasRefused(_ slot: Slot) { known.remove(slot.number) }

    let isTracking = true

    func willChange(_ old: Slot, to new: Slot?) throws(AcceleratorError) {
        if new == nil { known.remove(old.number) }
        if fails, new != nil, old.pieces.first?.block == 1 { throw AcceleratorError("the log is gone") }
        guard !isDeaf else { return }
        try read(old, for: [old, new].compactMap(\.self))
    }

    func collect(_ slots: [Slot]) throws(AcceleratorError) {
        for slot in slots {
            known.insert(slot.number)
            try read(slot, for: [slot])
        }
    }

    private func read(_ slot: Slot, for slots: [Slot]) throws(AcceleratorError) {
        var words = [UInt64](repeating: 0, count: Int(slot.pageCount + 63) / 64)
        var request = unsafe kvm_dirty_log()
        unsafe request.slot = slot.number
        // SAFETY: the kernel writes one bit per page of the slot, rounded up to words.
        let status = unsafe words.withUnsafeMutableBytes { buffer in
            unsafe request.dirty_bitmap = buffer.baseAddress
            return unsafe gw_kvm_get_dirty_log(machine!.number, &request)
        }
        try kvm(status, "KVM_GET_DIRTY_LOG slot \(slot.number)")
        for slot in slots {
            for piece in slot.pieces {
                for page in piece.slotPages where words[Int(page / 64)] >> (page % 64) & 1 != 0 {
                    dirty[piece.block, default: []].insert(piece.firstPage.value + page - piece.slotPages.lowerBound)
                }
            }
        }
    }
}
