import GuestPrograms
import Machine
import Migration
import Host
import Transport

@main
enum Godwit {
    static func main() throws {
        let args = CommandLine.arguments
        let mem = UInt64(args[3])! << 20
        let cpus = Int(args[4])!
        let vm = try VirtualMachine(MachineConfiguration(memoryByteCount: mem, cpuCount: cpus, boot: .guest(try GuestProgram(parsing: args[2]))), serial: try SerialPort(.standard))
        let vm2 = try VirtualMachine(MachineConfiguration(memoryByteCount: mem, cpuCount: cpus, isIncoming: true), serial: try SerialPort(.standard))
        try vm.resume()
        let m1 = Migrator(vm), m2 = Migrator(vm2)
        while (try? vm.guestStatus().isReady) != true { Clock.sleep(nanoseconds: 10_000_000) }
        m1.observe { print("src", $0) }
        m2.observe { print("dst", $0) }
        Clock.sleep(nanoseconds: UInt64(args[5])! * 1_000_000)
        try m2.acceptMigration(on: .init("tcp:127.0.0.1:0"))
        guard case .inet(_, let port) = m2.info().listening[0] else { return }
        do { let warm = try Mapping(anonymousByteCount: Int(min(mem, 8 << 30)) + (1 << 29)); try warm.advise(.hugePages); try warm.advise(.populate) }
        let t = Clock.monotonicNanoseconds
        try m1.migrate(to: .init("tcp:127.0.0.1:\(port)"))
        while ![.completed, .failed, .unsettled, .cancelled].contains(m1.info().status) { Clock.sleep(nanoseconds: 1_000_000) }
        print("took", (Clock.monotonicNanoseconds - t) / 1000)
        let i = m1.info(); print(i.ram!, i.setupNanoseconds!, i.downtime?.nanoseconds ?? 0)
        for p in i.downtime?.parts ?? [] { print(p.name, p.nanoseconds / 1000, terminator: " us, ") }
        print()
        Clock.sleep(nanoseconds: 500_000_000)
        print(try vm2.checkGuest())
        print("src", vm.runState, "dst", vm2.runState)
    }
}
