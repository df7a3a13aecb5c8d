import Glibc
import GuestMemory
import GuestPrograms
import Host
import Machine
import TestSupport
import Testing

@Suite("machine state", .serialized, .enabled(if: hasKVM, needsKVM))
struct MachineStateTests {
    @Test(
        "a guest whose state and memory are moved to another machine verifies and goes on", .timeLimit(.minutes(10)),
        arguments: [
            ("dirty,working-set=8M,fill=8M,random", 1), ("dirty,working-set=8M,fill=8M", 4),
            ("probe,write,working-set=8M,fill=8M", 1), ("probe,working-set=8M,fill=8M", 4), ("idle,fill=4M", 1),
        ])
    func moves(guest: String, cpus: Int) async {
        await #expect(processExitsWith: .success) { [guest, cpus] in
            Child.run(seconds: 30) {
                let source = try VirtualMachine.guest(guest, cpus: cpus)
                try source.resume()
                try source.awaitReady()
                Clock.sleep(nanoseconds: 30_000_000)
                let destination = try source.move()
                let arrived = try destination.guestStatus()
                try destination.claimVerified("on arrival")
                func niceness() -> Set<Int32> {
                    Set(destination.cpuThreadIDs.map { getpriority(Int32(PRIO_PROCESS.rawValue), id_t($0)) })
                }
                let before = niceness()
                claim(
                    destination.startAfterMigration(running: true, by: Clock.monotonicNanoseconds + 10_000_000_000),
                    "no vCPU went in within 10 s")
                // Others of the host's threads do not keep it standing, where the host allows that to be said.
                let isAllowed = HostThread.runBeforeOthers()
                if isAllowed { HostThread.runAmongOthers() }
                claim(!isAllowed || niceness() != before, "the vCPUs of the guest that has arrived are in no hurry")
                destination.endHaste()
                claim(niceness() == before, "the vCPUs stay in a hurry: \(niceness())")
                try waitFor("every vCPU and the heartbeat to go on") {
                    let now = try destination.guestStatus()
                    return now.heartbeats > arrived.heartbeats
                        && zip(now.cpus, arrived.cpus).allSatisfy { now.kind == .idle || $0.touches > $1.touches }
                }
                try destination.claimVerified("after running on")
                let backwards = try destination.guestStatus().tscBackwards
                claim(backwards == 0, "the guest saw its TSC go backwards \(backwards) times")
            }
        }
    }

    @Test(
        "the guest's clocks go on where they were, whichever machine is older", .timeLimit(.minutes(10)),
        arguments: [0, 400, -400] as [Int])
    func clocks(sourceIsOlderByMilliseconds age: Int) async {
        await #expect(processExitsWith: .success) { [age] in
            Child.run(seconds: 20) {
                var source = try VirtualMachine.guest("dirty,working-set=4M,fill=4M,heartbeat=2ms", cpus: 2)
                if age > 0 { Clock.sleep(nanoseconds: UInt64(age) * 1_000_000) }
                let destination = try source.destination()
                if age < 0 {
                    Clock.sleep(nanoseconds: UInt64(-age) * 1_000_000)
                    source = try VirtualMachine.guest("dirty,working-set=4M,fill=4M,heartbeat=2ms", cpus: 2)
                }
                try source.resume()
                try waitFor("both vCPUs to work") { try source.guestStatus().cpus.allSatisfy { $0.touches > 0 } }
                source.pause()
                let began = Clock.monotonicNanoseconds
                let before = try source.guestStatus()
                let saved = try source.saveState()
                try source.copyMemory(to: destination)
                try destination.loadState(saved)
                destination.startAfterMigration(running: true)
                try waitFor("both vCPUs to look at their clocks") {
                    zip(try destination.guestStatus().cpus, before.cpus).allSatisfy { $0.touches > $1.touches + 1000 }
                }
                destination.pause()
                let after = try destination.guestStatus()
                let loaded = try destination.saveState()
                let elapsed = Clock.monotonicNanoseconds - began
                claim(after.tscBackwards == 0, "the guest saw its TSC go backwards \(after.tscBackwards) times")
                for (cpu, (now, then)) in zip(after.cpus, before.cpus).enumerated() {
                    claim(now.lastTSC > then.lastTSC, "vCPU \(cpu) went back from \(then.lastTSC) to \(now.lastTSC)")
                    // What passed since `began`, and since the guest's last look before that.
                    let limit = (elapsed / 1000 + 100_000) * after.tscKilohertz / 1000
                    claim(
                        now.lastTSC - then.lastTSC < limit,
                        "vCPU \(cpu): \(now.lastTSC - then.lastTSC) ticks passed in \(elapsed) ns")
                }
                for cpu in 0..<UInt32(2) {
                    let (old, new) = (saved.tsc(ofCPU: cpu), loaded.tsc(ofCPU: cpu))
                    let limit = (elapsed / 1000 + 100_000) * after.tscKilohertz / 1000
                    claim(
                        new > old && new - old < limit,
                        "the TSC of vCPU \(cpu) went from \(old) to \(new) in \(elapsed) ns")
                }
                let (old, new) = (saved.clockNanoseconds, loaded.clockNanoseconds)
                claim(
                    new > old && new - old < elapsed + 100_000_000,
                    "kvmclock went from \(old) to \(new) in \(elapsed) ns")
            }
        }
    }

    @Test(
        "a guest in real mode moves in the middle of a loop, of output and of HLT", .timeLimit(.minutes(10)),
        arguments: [BootCode.count, BootCode.flood, BootCode.ticks])
    func realMode(code: [UInt8]) async {
        await #expect(processExitsWith: .success) { [code] in
            Child.run(seconds: 20) {
                func count(_ machine: VirtualMachine) -> UInt32 {
                    machine.memory.blocks[0].mapping.load(at: 0x9000, as: UInt32.self)
                }
                var machine = try VirtualMachine.bootSector(code)
                try machine.resume()
                for _ in 0..<4 {
                    let before = count(machine)
                    try waitFor("the guest to count on") { count(machine) > before + 20 }
                    machine.pause()
                    let stopped = count(machine)
                    machine = try machine.move()
                    claim(count(machine) == stopped, "the count changed on the way")
                    machine.startAfterMigration(running: true)
                }
            }
        }
    }

    @Test("a guest whose vCPUs are just coming up is moved without losing one", .timeLimit(.minutes(10)))
    func comingUp() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 40) {
                var random = SeededRandom(seed: 5)
                for trial in 0..<5 {
                    let source = try VirtualMachine.guest("dirty,working-set=1M,fill=1M", mebibytes: 16, cpus: 6)
                    try source.resume()
                    Clock.sleep(nanoseconds: random.next() % 4_000_000)
                    let destination = try source.move()
                    destination.startAfterMigration(running: true)
                    try destination.awaitReady()
                    let active = try destination.guestStatus().cpusActive
                    claim(active == 6, "trial \(trial): \(active) of 6 vCPUs came up")
                }
            }
        }
    }

    @Test("state that does not fit is refused with a sentence that names it", .timeLimit(.minutes(10)))
    func refusals() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let source = try VirtualMachine.guest("idle,fill=1M", mebibytes: 16, cpus: 2)
                let states = try source.saveState()
                func refused(_ words: String..., change: (inout [DeviceState]) -> Void) throws {
                    var changed = states
                    change(&changed)
                    do {
                        try source.destination().loadState(changed)
                    } catch {
                        for word in words { claim("\(error)".contains(word), "'\(word)' is missing in: \(error)") }
                        return claim(!"\(error)".contains("\n"), "not one sentence: \(error)")
                    }
                    Child.fail("state with \(words) wrong was loaded")
                }
                try source.destination().loadState(states)
                try refused("godwit/flux", "no such device") {
                    $0.append(DeviceState(name: "godwit/flux", instance: 0, version: 1, body: []))
                }
                try refused("godwit/vcpu", "instance 2", "2 vCPUs") {
                    $0.append(DeviceState(name: "godwit/vcpu", instance: 2, version: 1, body: $0[4].body))
                }
                for (index, state) in states.enumerated() {
                    try refused(state.name, "version") { $0[index] = state.with(version: 99) }
                    try refused(state.name, "missing") { $0.remove(at: index) }
                    try refused(state.name, "twice") { $0.append(state) }
                    if !state.body.isEmpty {
                        try refused(state.name) { $0[index] = state.with(body: Array(state.body.dropLast())) }
                    }
                    try refused(state.name) { $0[index] = state.with(body: state.body + [0]) }
                }
                let vcpu = try #require(states.firstIndex { $0.name == "godwit/vcpu" })
                try refused("vcpu0", "processor features this host lacks") { states in
                    // The table is the first part (be16 number, be32 length), entries of ten words behind two.
                    var body = states[vcpu].body
                    for entry in stride(from: 6 + 8, to: body.count - 40, by: 40)
                    where body[entry..<entry + 4] == [1, 0, 0, 0] {
                        for byte in entry + 20..<entry + 28 { body[byte] = 0xff }
                        break
                    }
                    states[vcpu] = states[vcpu].with(body: body)
                }
            }
        }
    }

    @Test("random and damaged section bodies never trap", .timeLimit(.minutes(10)), arguments: [1, 2] as [UInt64])
    func fuzz(seed: UInt64) async {
        await #expect(processExitsWith: .success) { [seed] in
            Child.run(seconds: 30) {
                let source = try VirtualMachine.guest("idle,fill=1M", mebibytes: 16)
                let states = try source.saveState()
                var random = SeededRandom(seed: seed)
                var refused = 0
                for _ in 0..<6 {
                    let destination = try source.destination()
                    for _ in 0..<40 {
                        var changed = states
                        let index = Int(random.next() % UInt64(states.count))
                        var body = states[index].body
                        switch random.next() % 3 {
                        case 0: body = (0..<random.next() % 600).map { _ in UInt8(truncatingIfNeeded: random.next()) }
                        case 1: body = body.map { _ in UInt8(truncatingIfNeeded: random.next()) }
                        default:
                            for _ in 0..<1 + random.next() % 8 where !body.isEmpty {
                                body[Int(random.next() % UInt64(body.count))] = UInt8(truncatingIfNeeded: random.next())
                            }
                        }
                        changed[index] = states[index].with(body: body)
                        do { try destination.loadState(changed) } catch { refused += 1 }
                    }
                }
                claim(refused > 20, "only \(refused) of 240 damaged states were refused, seed \(seed)")
            }
        }
    }
}

extension VirtualMachine {
    /// Moves state and memory to a new machine, which is not started.
    func move() throws -> VirtualMachine {
        pause()
        let destination = try destination()
        try copyMemory(to: destination)
        try destination.loadState(try saveState())
        return destination
    }
}

extension DeviceState {
    func with(version: UInt32? = nil, body: [UInt8]? = nil) -> DeviceState {
        DeviceState(name: name, instance: instance, version: version ?? self.version, body: body ?? self.body)
    }
}

extension [DeviceState] {
    /// MSR 0x10 of a vCPU: part 8 of its section, a table of (be32 index, be64 value).
    func tsc(ofCPU number: UInt32) -> UInt64 {
        guard let body = first(where: { $0.name == "godwit/vcpu" && $0.instance == number })?.body else { return 0 }
        func integer(_ at: Int, _ count: Int) -> UInt64 { body[at..<at + count].reduce(0) { $0 << 8 | UInt64($1) } }
        var part = 0
        while part < body.count, integer(part, 2) != 8 { part += 6 + Int(integer(part + 2, 4)) }
        let table = stride(from: part + 6, to: part + 6 + Int(integer(part + 2, 4)), by: 12)
        return table.first { integer($0, 4) == 0x10 }.map { integer($0 + 4, 8) } ?? 0
    }

    /// The first word of `struct kvm_clock_data`.
    var clockNanoseconds: UInt64 {
        guard let state = first(where: { $0.name == "godwit/kvmclock" }) else { return 0 }
        return state.body.prefix(8).reversed().reduce(0) { $0 << 8 | UInt64($1) }
    }
}
