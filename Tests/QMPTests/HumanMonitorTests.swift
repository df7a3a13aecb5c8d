import Host
import Testing

@testable import QMP

@Suite(.timeLimit(.minutes(10))) struct HumanMonitorTests {
    @Test("commands act as in QMP, and refusals are told in the text")
    func acting() throws {
        let vm = try MonitoredMachine(name: "erna")
        #expect(try vm.human("info status") == "VM status: paused (prelaunch)\r\n")
        #expect(try vm.human("  cont ") == "")
        #expect(try vm.human("info status") == "VM status: running\r\n")
        #expect(try vm.human("s") == "")
        #expect(try vm.human("info status") == "VM status: paused\r\n")
        #expect(try vm.human("info name") == "erna\r\n")
        #expect(try vm.human("info kvm") == "kvm support: disabled\r\n")
        #expect(try vm.human("info migrate") == "")
        #expect(try vm.human("migrate_continue x") == "Error: Parameter 'state' does not accept value 'x'\r\n")
        #expect(try vm.human("migrate -d bla").hasPrefix("Error: migration address \"bla\""))
        #expect(vm.eventNames == ["RESUME", "STOP"])
        #expect(
            try vm.refusal("human-monitor-command", ["command-line": "xp 0", "cpu-index": 3])
                == "Parameter 'cpu-index' expects a CPU number")
    }

    @Test("info mtree prints the regions and what the guest sees of them")
    func memoryTree() throws {
        let vm = try MonitoredMachine()
        let all = try vm.human("info mtree")
        #expect(all.contains("address-space: memory\r\n"))
        #expect(all.contains("0000000000000000-00003fffffffffff (prio 0, container): system\r\n"))
        let view = try vm.human("info mtree -f")
        #expect(view.hasPrefix("FlatView #0\r\n") && view.contains("(prio 0, ram): ram @ram 0000000000000000\r\n"))
        #expect(all.hasSuffix(view))
        #expect(try vm.human("info mtree -x").contains("extraneous"))
    }

    @Test("unknown words and wrong operands are named")
    func wrong() throws {
        let vm = try MonitoredMachine()
        #expect(try vm.human("") == "")
        #expect(try vm.human("nonsense x") == "unknown command: 'nonsense'\r\n")
        #expect(try vm.human("info nonsense") == "unknown command: 'info nonsense'\r\n")
        #expect(try vm.human("help nonsense") == "unknown command: 'nonsense'\r\n")
        #expect(
            try vm.human("info migrate xx")
                == "migrate: extraneous characters at the end of line\r\n"
                + "Try \"help info migrate\" for more information\r\n")
        #expect(try vm.human("pmemsave 0 16").contains("3 operands"))
        #expect(try vm.human("pmemsave 0 x y").contains("'x' is no number"))
        #expect(try vm.human("xp /4s 0").contains("'s'"))
        #expect(try vm.human("xp /0xb 0").contains("count 0"))
        #expect(try vm.human("xp /99999999999999999999xb 0").contains("count"))
        #expect(try vm.human("xp").contains("one address"))
        #expect(try vm.human("xp 0x").contains("'0x'"))
        #expect(try vm.human("help").contains("xp /fmt addr"))
        #expect(try vm.human("help s") == "stop|s -- stop emulation\r\n")
    }

    @Test("words end at spaces, quotes hold them together")
    func words() {
        #expect(HumanMonitor.words(of: #" a  "b c" d"e"\x "f\"g\\" "" "#) == ["a", "b c", #"de\x"#, #"f"g\"#, ""])
    }

    @Test("pmemsave takes a quoted path")
    func dump() throws {
        let vm = try MonitoredMachine()
        let folder = try TemporaryFolder()
        try vm.write([1, 2, 3], at: 0x1000)
        #expect(try vm.human("pmemsave 0x1000 4 \"\(folder["a b"])\"") == "")
        #expect(try Descriptor.contents(of: folder["a b"]) == [1, 2, 3, 0])
    }
}
