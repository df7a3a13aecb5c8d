import GuestMemory
import GuestPrograms
import Host
import Machine
import TestSupport
import Testing

@Suite("running machine", .serialized, .enabled(if: hasKVM, needsKVM))
struct RunningMachineTests {
    @Test(
        "a boot sector loads what follows it by int 13h, prints it and leaves with its status", .timeLimit(.minutes(10))
    )
    func loader() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 15) {
                let serial = try SerialPort(.unix(temporaryPath("loader")))
                let line = try SerialLine(path: temporaryPath("loader"))
                Clock.sleep(nanoseconds: 50_000_000)
                let machine = try VirtualMachine.bootSector(
                    BootCode.loader(sector1: "by geometry, ", sector2: "by number"), serial: serial)
                let status = machine.exitStatus()
                try machine.resume()
                let value = status.wait(deadline: .after(seconds: 10)) { $0 }
                claim(value == 0x2b, "the guest left with \(value.map(String.init) ?? "nothing")")
                claim(machine.runState == .shutdown, "the machine is \(machine.runState)")
                line.awaitText("both sectors") { $0 == "by geometry, by number" }
                serial.close()
            }
        }
    }

    @Test(
        "a guest that resets the machine starts afresh, once for each reset", .timeLimit(.minutes(10)),
        arguments: [BootCode.resetByPort92, BootCode.resetByKeyboardController]
            + (hasHardwareVirtualization ? [BootCode.tripleFault] : []))
    func resets(how: [UInt8]) async {
        await #expect(processExitsWith: .success) { [how] in
            Child.run(seconds: 15) {
                let serial = try SerialPort(.unix(temporaryPath("reset")))
                let line = try SerialLine(path: temporaryPath("reset"))
                Clock.sleep(nanoseconds: 50_000_000)
                let machine = try VirtualMachine.bootSector(BootCode.countBoots(then: how), serial: serial)
                let status = machine.exitStatus()
                let resets = Monitor(0)
                machine.observe { if $0 == .reset(byGuest: true) { resets.withLock { $0 += 1 } } }
                try machine.resume()
                let value = status.wait(deadline: .after(seconds: 10)) { $0 }
                claim(
                    value == 0x2b,
                    "the guest left with \(value.map(String.init) ?? "nothing") "
                        + "after \"\(line.text)\", the machine is \(machine.runState)")
                line.awaitText("four boots") { $0 == "1234" }
                Clock.sleep(nanoseconds: 100_000_000)
                let count = resets.withLock { $0 }
                claim(count == 3, "\(count) resets were reported for three")
                claim(machine.runState == .shutdown, "the machine is \(machine.runState)")
                serial.close()
            }
        }
    }

    @Test(
        "1 to 64 vCPUs come up by INIT and SIPI, also after a reset", .timeLimit(.minutes(10)),
        arguments: [1, 2, 8, 64])
    func processors(count: Int) async {
        await #expect(processExitsWith: .success) { [count] in
            Child.run(seconds: 40) {
                let machine = try VirtualMachine.guest("dirty,working-set=4M,fill=4M", cpus: count)
                try machine.resume()
                for when in ["power-on", "a reset"] {
                    try machine.awaitReady(seconds: 30)
                    let active = try machine.guestStatus().cpusActive
                    claim(active == count, "\(active) of \(count) vCPUs came up after \(when)")
                    try machine.claimVerified(when)
                    try machine.reset()
                }
            }
        }
    }

    @Test("a pause stops every vCPU; a resume lets all of them go on", .timeLimit(.minutes(10)), arguments: [1, 4])
    func pauses(cpus: Int) async {
        await #expect(processExitsWith: .success) { [cpus] in
            Child.run(seconds: 30) {
                let machine = try VirtualMachine.guest("dirty,working-set=8M,fill=8M,random", cpus: cpus)
                try machine.resume()
                try machine.awaitReady()
                for _ in 0..<5 {
                    machine.pause()
                    let stopped = try machine.guestStatus()
                    Clock.sleep(nanoseconds: 20_000_000)
                    claim(try machine.guestStatus() == stopped, "the guest went on while the machine was paused")
                    try machine.resume()
                    try waitFor("every vCPU to go on") {
                        let now = try machine.guestStatus()
                        return zip(now.cpus, stopped.cpus).allSatisfy { $0.touches > $1.touches }
                    }
                }
                try machine.claimVerified("after five pauses")
            }
        }
    }

    @Test("500 pauses and resumes under load neither hang nor harm the guest", .timeLimit(.minutes(10)))
    func pausesOften() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 40) {
                let machine = try VirtualMachine.guest("dirty,working-set=8M,fill=8M,random,heartbeat=1ms", cpus: 4)
                try machine.resume()
                try machine.awaitReady()
                let isOver = Monitor(false)
                let asker = try HostThread(name: "asker") {
                    while !isOver.withLock({ $0 }) { _ = machine.whileStopped { machine.memory.byteCount } }
                }
                var random = SeededRandom(seed: 11)
                for _ in 0..<500 {
                    machine.pause()
                    if random.next() % 4 == 0 { Clock.sleep(nanoseconds: random.next() % 300_000) }
                    try machine.resume()
                    if random.next() % 2 == 0 { Clock.sleep(nanoseconds: random.next() % 300_000) }
                }
                isOver.withLock { $0 = true }
                asker.join()
                let before = try machine.guestStatus().touches
                try waitFor("the guest to go on") { try machine.guestStatus().touches > before }
                try machine.claimVerified("after 500 pauses")
            }
        }
    }

    @Test(
        "a guest's last word is heard, also when a migration stops the guest at that moment", .timeLimit(.minutes(10)))
    func lastWord() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 50) {
                let machine = try VirtualMachine.bootSector(BootCode.leave)
                let ends = Monitor(0)
                machine.observe { if case .shutdown = $0 { ends.withLock { $0 += 1 } } }
                var random = SeededRandom(seed: 20_261_121)
                var refusals = 0
                // How long the guest needs to its end, on this host.
                var typical: UInt64 = 0
                for trial in 1...500 {
                    let began = Clock.monotonicNanoseconds
                    try machine.resume()
                    if trial <= 20 {
                        while ends.withLock({ $0 }) < trial {}
                        typical = trial == 1 ? .max : min(typical, Clock.monotonicNanoseconds - began)
                        try machine.reset()
                        continue
                    }
                    let end = began + random.next() % (typical + typical / 4)
                    while Clock.monotonicNanoseconds < end, ends.withLock({ $0 }) < trial {}
                    do {
                        let wasRunning = try machine.stopForMigration()
                        claim(ends.withLock { $0 } < trial, "trial \(trial): a guest that has left is migrated")
                        machine.resumeAfterMigration(wasRunning: wasRunning)
                    } catch {
                        refusals += 1
                        claim("\(error)".contains("came to its end"), "trial \(trial): \(error)")
                    }
                    try waitFor("the end of the guest in trial \(trial)") { ends.withLock { $0 } == trial }
                    claim(machine.runState == .shutdown, "trial \(trial): the machine is \(machine.runState)")
                    try machine.reset()
                }
                claim(refusals > 0, "no migration met the end of the guest; it needs \(typical) ns")
            }
        }
    }

    @Test("every command that does not fit the run state is refused with a sentence and changes nothing")
    func runStates() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 15) {
                func refused(_ words: String, _ machine: VirtualMachine, _ command: () throws -> Void) {
                    let before = machine.runState
                    do {
                        try command()
                        Child.fail("in state \(before) nothing was refused where '\(words)' should be")
                    } catch { claim("\(error)".contains(words), "in state \(before): \(error)") }
                    claim(machine.runState == before, "a refused command changed \(before) to \(machine.runState)")
                }
                func expect(_ state: RunState, _ machine: VirtualMachine) {
                    claim(machine.runState == state, "the machine is \(machine.runState), not \(state)")
                }
                let machine = try VirtualMachine.bootSector(BootCode.count)
                expect(.prelaunch, machine)
                machine.pause()
                expect(.paused, machine)
                try machine.resume()
                try machine.resume()
                expect(.running, machine)
                machine.startAfterMigration(running: false)
                expect(.running, machine)
                claim(try machine.stopForMigration(), "the guest ran and that was not said")
                expect(.finishMigrate, machine)
                machine.pause()
                refused("a migration is about to finish", machine) { try machine.resume() }
                refused("system_reset: not while", machine) { try machine.reset() }
                machine.resumeAfterMigration(wasRunning: true)
                expect(.running, machine)
                _ = try machine.stopForMigration()
                machine.handOver()
                expect(.postMigrate, machine)
                machine.pause()
                refused("must not run twice", machine) { try machine.resume() }
                refused("system_reset: not while", machine) { try machine.reset() }
                machine.resumeAfterMigration(wasRunning: false)
                expect(.paused, machine)
                try machine.reset()
                expect(.paused, machine)

                let incoming = try machine.destination()
                expect(.inMigrate, incoming)
                incoming.pause()
                incoming.resumeAfterMigration(wasRunning: true)
                refused("waits for an incoming migration", incoming) { try incoming.resume() }
                refused("system_reset: not while", incoming) { try incoming.reset() }
                incoming.startAfterMigration(running: false)
                expect(.paused, incoming)
                // It is not run: nothing was loaded, and its vCPU would only fail at the reset vector.
                refused("not told what to boot", incoming) { try incoming.reset() }

                let leaving = try VirtualMachine.bootSector(BootCode.loader(sector1: "", sector2: ""))
                try leaving.resume()
                try waitFor("the guest to leave") { leaving.runState == .shutdown }
                refused("has shut down; reset it first", leaving) { try leaving.resume() }
                try leaving.reset()
                expect(.paused, leaving)
            }
        }
    }

    @Test(
        "an impossible machine is refused with a sentence",
        arguments: [
            (0, UInt64(64) << 20, "0 vCPUs"), (65, 64 << 20, "65 vCPUs"), (1, 4097, "not a multiple of the page size"),
            (1, 512 << 10, "less than the minimum"), (1, 0, "memory size 0"), (1, 1 << 60, "memory"),
        ])
    func configurations(cpus: Int, bytes: UInt64, words: String) throws {
        let error = #expect(throws: MachineError.self) {
            try VirtualMachine(
                MachineConfiguration(memoryByteCount: bytes, cpuCount: cpus, isIncoming: true),
                serial: SerialPort(.none))
        }
        #expect(error?.description.contains(words) == true, "\(error?.description ?? "")")
    }
}

extension VirtualMachine {
    /// The status the guest leaves with, once it has.
    func exitStatus() -> Monitor<Int32?> {
        let status = Monitor<Int32?>(nil)
        observe { event in
            if case .shutdown(let value) = event { status.withLock { $0 = value } }
        }
        return status
    }
}
