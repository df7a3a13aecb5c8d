import Accelerator
import Glibc
import GuestMemory
import Host
import Testing

@testable import KVM

private let hasKVM = unsafe access("/dev/kvm", R_OK | W_OK) == 0

@Suite(
    "changing memory under running vCPUs", .serialized,
    .enabled(if: hasKVM, "this machine has no /dev/kvm which this user may open"))
struct SlotRaceTests {
    @Test(
        "memory is exchanged behind readers, callers and page walkers: none fails, and none is stopped",
        .timeLimit(.minutes(1)))
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

    @Test("page tables that lie in exchanged memory are looked at again", .timeLimit(.minutes(1)))
    func pageTables() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let all = 0..<RacingGuest.arenaPages
                let guest = try RacingGuest([.walk, .walk, .read], showing: [(all, 1, false)])
                try Self.exchangeTables(guest)
                claim(guest.failed.isEmpty, "\(guest.failed)")
                claim(guest.slots.statistics.pauses == 0, "\(guest.slots.statistics)")
                guard try !KVMSystem().hasHardwarePaging else { return }
                // The test can fail: where KVM makes its own page tables of the guest's, they are stale unless it is told to forget.
                let forgetful = try RacingGuest([.walk, .walk, .read], showing: [(all, 1, false)], hasShadowPaging: false)
                try Self.exchangeTables(forgetful)
                claim(!forgetful.failed.isEmpty, "nobody saw stale translations")
            }
        }
    }

    @Test("a hole that opens inside a slot reads as all ones; the slot is split once, when a guest looks", .timeLimit(.minutes(1)))
    func holes() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let guest = try RacingGuest([.read, .read, .walk], showing: [(0..<1024, 1, false)])
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
                claim((1...6).contains(statistics.pauses) && statistics.splits >= 2, "\(statistics)")
            }
        }
    }

    @Test("what a guest writes to read-only memory is discarded; the range gets a slot of its own, once", .timeLimit(.minutes(1)))
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
                    claim(zip(before, after).dropFirst(50).allSatisfy { $0 < $1 }, "round \(round): RAM was not written")
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
}
