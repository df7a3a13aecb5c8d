import GuestMemory
import GuestPrograms
import Host
import KVM
import Machine
import Synchronization
import TestSupport
import Testing

@Suite("processors held for a change of the memory layout", .serialized, .enabled(if: hasKVM, needsKVM))
struct HeldProcessorsTests {
    /// A view whose first range is in two parts, the second read-only.
    private static func view(_ view: FlatView, withLast byteCount: UInt64) -> FlatView {
        func part(_ range: FlatRange, _ skipped: UInt64, _ byteCount: UInt64, readOnly: Bool) -> FlatRange {
            FlatRange(
                guestAddress: range.guestAddress + skipped, byteCount: byteCount, block: range.block,
                offset: RAMOffset(range.offset.value + skipped), isReadOnly: readOnly)
        }
        let first = view.ranges[0]
        let rest = first.byteCount - byteCount
        return FlatView(
            [part(first, 0, rest, readOnly: false), part(first, rest, byteCount, readOnly: true)]
                + view.ranges.dropFirst())
    }

    @Test(
        "a slot is cut in two and joined, the machine paused, resumed and reset at the same time: nobody waits for ever",
        .timeLimit(.minutes(10)), arguments: [1, 4])
    func together(cpus: Int) async {
        await #expect(processExitsWith: .success) { [cpus] in
            Child.run(seconds: 50) {
                let machine = try VirtualMachine.guest("dirty,working-set=8M,fill=8M", mebibytes: 64, cpus: cpus)
                guard let accelerator = machine.accelerator as? KVMAccelerator else { Child.fail("no KVM") }
                let listener = accelerator.memoryListener
                let whole = machine.memory.view
                let cut = Self.view(whole, withLast: 4 << 20)
                try machine.resume()
                try machine.awaitReady()
                let isOver = Atomic(false)
                let changer = try HostThread(name: "changer") {
                    var (old, new) = (whole, cut)
                    while !isOver.load(ordering: .relaxed) {
                        do {
                            try listener.commit(FlatViewChange(old: old, new: new, removed: [], added: []))
                        } catch { Child.fail("\(error)") }
                        swap(&old, &new)
                    }
                }
                for round in 0..<60 {
                    if round % 20 == 19 { try machine.reset() }
                    machine.pause()
                    let before = machine.runState
                    claim(before == .paused, "the machine is \(before) after a pause")
                    try machine.resume()
                    Clock.sleep(nanoseconds: 2_000_000)
                }
                try machine.awaitReady(seconds: 30)
                let touches = try machine.guestStatus().touches
                try waitFor("the guest to go on") { try machine.guestStatus().touches > touches }
                isOver.store(true, ordering: .relaxed)
                changer.join()
                machine.pause()
                try machine.claimVerified("after the changes")
                let statistics = accelerator.memorySlotStatistics
                claim(statistics.pauses >= 20 && statistics.commits >= 40, "\(statistics)")
            }
        }
    }
}
