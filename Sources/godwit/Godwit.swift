import GuestPrograms
import Machine
import Host

@main
enum Godwit {
    static func main() throws {
        let args = CommandLine.arguments
        let serial = try SerialPort(.standard)
        let boot: BootSource
        if args[1] == "guest" { boot = .guest(try GuestProgram(parsing: args[2])) }
        else { boot = .plan(try BootSector(file: args[2], image: Descriptor.contents(of: args[2])).plan) }
        let t0 = Clock.monotonicNanoseconds
        let vm = try VirtualMachine(MachineConfiguration(memoryByteCount: UInt64(args[3])! << 20, cpuCount: Int(args[4])!, boot: boot), serial: serial)
        print("made in", (Clock.monotonicNanoseconds - t0) / 1000, "us")
        vm.observe { print("event", $0) }
        try vm.resume()
        Clock.sleep(nanoseconds: UInt64(args[5])! * 1_000_000)
        let t1 = Clock.monotonicNanoseconds
        vm.pause()
        print("paused in", (Clock.monotonicNanoseconds - t1) / 1000, "us")
        let t2 = Clock.monotonicNanoseconds
        let s = try vm.saveState()
        print("saved in", (Clock.monotonicNanoseconds - t2) / 1000, "us", s.map { "\($0.name):\($0.body.count)" })
        if args[1] == "guest" { print(try vm.checkGuest()) }
        let vm2 = try VirtualMachine(MachineConfiguration(memoryByteCount: UInt64(args[3])! << 20, cpuCount: Int(args[4])!, isIncoming: true), serial: try SerialPort(.none))
        let t3 = Clock.monotonicNanoseconds
        try vm2.loadState(s)
        print("loaded in", (Clock.monotonicNanoseconds - t3) / 1000, "us")
    }
}
