import Host
import Machine
import Synchronization
import Testing

@testable import QMP

@Suite(.timeLimit(.minutes(10))) struct MachineCommandTests {
    @Test("query-status, stop, cont and system_reset follow the run state, and tell STOP, RESUME and RESET")
    func runStates() throws {
        let vm = try MonitoredMachine()
        #expect(try vm.run("query-status") == ["status": "prelaunch", "running": false, "singlestep": false])
        try vm.run("cont")
        #expect(try vm.run("query-status") == ["status": "running", "running": true, "singlestep": false])
        try vm.run("stop")
        try vm.run("stop")
        #expect(try vm.run("query-status")["status"] == "paused")
        try vm.run("cont")
        try vm.run("system_reset")
        #expect(vm.eventNames == ["RESUME", "STOP", "RESUME", "RESET"])
        let reset = vm.events.withLock { $0.last?.data }
        #expect(reset == ["guest": false, "reason": "host-qmp-system-reset"])
    }

    @Test("what the machine is: name, accelerator, memory, machines, no vCPU")
    func description() throws {
        let vm = try MonitoredMachine(megabytes: 3, name: "erna")
        #expect(try vm.run("query-name") == ["name": "erna"])
        #expect(try vm.run("query-uuid") == ["UUID": "00000000-0000-0000-0000-000000000000"])
        #expect(try vm.run("query-kvm") == ["enabled": false, "present": true])
        #expect(try vm.run("query-memory-size-summary") == ["base-memory": JSON(3 << 20), "plugged-memory": 0])
        #expect(try vm.run("query-cpus-fast") == [])
        let machines = try #require(try vm.run("query-machines").arrayValue)
        #expect(machines.compactMap { $0["name"]?.stringValue } == ["godwit-pc-1", "none"])
        #expect(machines[0]["alias"] == "pc" && machines[0]["cpu-max"] == 64)
        let names = vm.commands.table.names
        #expect(names.contains("migrate") && names.contains("human-monitor-command") && names.contains("quit"))
        #expect(try vm.run("query-commands").arrayValue?.count == names.count)
    }

    @Test("a machine that waits for a migration refuses cont, stop, system_reset and migrate with reasons")
    func incoming() throws {
        let vm = try MonitoredMachine(incoming: true)
        #expect(try vm.run("query-status")["status"] == "inmigrate")
        #expect(try vm.refusal("cont").hasPrefix("cont: the machine waits for an incoming migration"))
        #expect(try vm.refusal("stop").hasPrefix("stop: the machine waits for an incoming migration"))
        #expect(try vm.refusal("system_reset") == "system_reset: not while the machine is inmigrate")
        #expect(try vm.refusal("migrate", ["uri": "tcp:127.0.0.1:1"]).contains("waiting for an incoming migration"))
        #expect(try vm.refusal("system_powerdown").contains("no power button"))
    }

    @Test("queries are answered while a command holds the machine")
    func neverBlocked() throws {
        let vm = try MonitoredMachine()
        let (held, release) = (Monitor(false), Monitor(false))
        let holder = try HostThread(name: "holder") {
            vm.machine.whileStopped {
                held.withLock { $0 = true }
                release.wait(deadline: .after(seconds: 20)) { $0 ? () : nil }
            }
        }
        held.wait { $0 ? () : nil }
        let done = Monitor(false)
        let asker = try HostThread(name: "asker") {
            for query in vm.commands.table.names where query.hasPrefix("query-") { _ = try? vm.run(query) }
            done.withLock { $0 = true }
        }
        #expect(done.wait(deadline: .after(seconds: 10)) { $0 ? true : nil } == true)
        release.withLock { $0 = true }
        holder.join()
        asker.join()
    }

    @Test("quit is answered first, then SHUTDOWN is told, then the process is asked to end")
    func quit() throws {
        let vm = try MonitoredMachine()
        let path = "/tmp/godwit-qmp-quit-\(UInt32.random(in: 0 ... .max)).sock"
        let server = try QMPServer(sockets: [ControlSocket(path: path)], table: vm.commands.table)
        defer { server.stop() }
        vm.commands.sendEvents { server.post($0, data: $1) }
        var client = try RawClient(path: path)
        try client.send("{\"execute\":\"quit\",\"id\":7}\n")
        #expect(try client.line() == ["return": [:], "id": 7])
        let event = try client.line()
        #expect(event?["event"] == "SHUTDOWN")
        #expect(event?["data"] == ["guest": false, "reason": "host-qmp-quit"])
        #expect(vm.quits.wait(deadline: .after(seconds: 5)) { $0 == 1 ? true : nil } == true)
    }

    @Test("without a built-in guest there is nothing to check, and that is said")
    func noGuest() throws {
        let vm = try MonitoredMachine()
        for command in ["x-check-guest", "x-query-guest", "x-guest-histogram", "x-reset-guest-gap"] {
            #expect(try !vm.refusal(command).isEmpty)
        }
    }

    @Test("a UUID is 8-4-4-4-12 hexadecimal digits, told in lower case, and nothing else is one")
    func uuids() {
        let text = "6b8f0d3e-1c52-4a7e-9f30-2d4c5b6a7988"
        #expect(MachineUUID(text)?.description == text && MachineUUID(text.uppercased())?.description == text)
        #expect(MachineUUID(text) == MachineUUID(high: 0x6b8f_0d3e_1c52_4a7e, low: 0x9f30_2d4c_5b6a_7988))
        #expect(MachineUUID("00000000-0000-0000-0000-00000000000a")?.description.hasSuffix("-00000000000a") == true)
        for wrong in [
            "", "6b8f0d3e1c524a7e9f302d4c5b6a7988", "6b8f0d3e-1c52-4a7e-9f30-2d4c5b6a798", text + "0", text + "-",
            "6b8f0d3e-1c52-4a7e-9f30-2d4c5b6a798g", "+b8f0d3e-1c52-4a7e-9f30-2d4c5b6a7988", "{\(text)}",
            "6b8f0d3-e1c52-4a7e-9f30-2d4c5b6a7988", "６b8f0d3e-1c52-4a7e-9f30-2d4c5b6a7988",
        ] { #expect(MachineUUID(wrong) == nil, "\(wrong)") }
    }
}
