import Accelerator
import GuestMemory
import GuestPrograms
import Host
import Machine
import Synchronization
import TestSupport
import Testing

/// A watch that fails when it is told to.
private final class FailingWatch: WindowWatch {
    private let failures = Mutex(0)

    func fail(times: Int) { failures.withLock { $0 = times } }

    func shows(_ window: BlockWindow) throws(SystemError) {
        let mustFail = failures.withLock { left in
            defer { left = max(0, left - 1) }
            return left > 0
        }
        if mustFail { throw SystemError("watch", "a window", code: 12) }
    }

    func hides(_ addresses: Range<UInt>) {}
}

@Suite("changes of the layout that fail", .serialized)
struct DamagedLayoutTests {
    @Test(
        "what can be taken back leaves a guest that runs on; where the way back fails too, no vCPU ever runs again",
        .enabled(if: hasKVM, needsKVM), .timeLimit(.minutes(10)), arguments: [1, 2])
    func failures(count: Int) async {
        await #expect(processExitsWith: .success) { [count] in
            Child.run(seconds: 60) {
                let machine = try VirtualMachine.guest("dirty,working-set=1M,fill=1M", cpus: 2, backing: .memfd)
                let failed = Monitor<String?>(nil)
                machine.observe { event in
                    if case .internalError(let sentence) = event { failed.withLock { $0 = sentence } }
                }
                try machine.resume()
                try machine.awaitReady()
                let (memory, block) = (machine.memory, machine.memory.blocks[0])
                func show(_ offset: UInt64, insteadOf old: MemoryRegionID? = nil) throws -> MemoryRegionID {
                    var change = MemoryTransaction()
                    if let old { change.remove(old) }
                    let id = change.add(
                        .ram("again", block, offset: RAMOffset(offset), byteCount: 8 << 12), at: 0xd000_0000)
                    try memory.commit(change)
                    return id
                }
                let watch = FailingWatch()
                try machine.accelerator?.watchWindows(watch)
                let first = try show(32 << 20)
                watch.fail(times: count)
                do {
                    _ = try show(33 << 20, insteadOf: first)
                    Child.fail("a change succeeded that nobody could watch")
                } catch {
                    let words = "\(error)"
                    claim(words.contains("the way back failed") == (count == 2), words)
                }
                guard count == 2 else {
                    try machine.claimVerified("behind a change that was taken back")
                    let touches = try machine.guestStatus().touches
                    try waitFor("the guest to go on") { try machine.guestStatus().touches > touches }
                    _ = try show(33 << 20, insteadOf: first)
                    return machine.pause()
                }
                for turn in ["", "after a reset"] {
                    let sentence = failed.wait(deadline: .after(seconds: 10)) { $0 }
                    claim(sentence?.contains("nor left as it was") == true, "\(turn): \(sentence ?? "it runs on")")
                    try waitFor("the guest to be stopped \(turn)") { machine.runState == .internalError }
                    claim((try? machine.resume()) == nil, "\(turn): it was resumed")
                    failed.withLock { $0 = nil }
                    if turn.isEmpty {
                        try machine.reset()
                        try machine.resume()
                    }
                }
            }
        }
    }
}
