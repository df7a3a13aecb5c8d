import GuestMemory
import GuestPrograms
import Host
import Machine
import Migration
import TestSupport
import Testing
import Transport

extension Migrator {
    /// A source and a machine that waits for it, with UUIDs.
    fileprivate static func pair(_ ours: String?, _ theirs: String?) throws -> (source: Migrator, destination: Migrator)
    {
        var configuration = MachineConfiguration(
            memoryByteCount: 16 << 20, boot: .guest(try GuestProgram(parsing: "dirty,working-set=2M,fill=2M,rate=20M")))
        configuration.uuid = ours.flatMap { MachineUUID($0) }
        let machine = try VirtualMachine(configuration, serial: SerialPort(.none))
        try machine.resume()
        try waitFor("the guest to be ready") { try machine.guestStatus().isReady }
        var other = MachineConfiguration(memoryByteCount: 16 << 20, isIncoming: true)
        other.uuid = theirs.flatMap { MachineUUID($0) }
        return (Migrator(machine), Migrator(try VirtualMachine(other, serial: SerialPort(.none))))
    }
}

private let one = "6b8f0d3e-1c52-4a7e-9f30-2d4c5b6a7988"
private let other = "6B8F0D3E-1C52-4A7E-9F30-2D4C5B6A7989"

@Suite("what else a migration can be told", .serialized, .enabled(if: hasKVM, needsKVM))
struct MigrationSurfaceTests {
    @Test("validate-uuid refuses a destination with another UUID, before anything moves", .timeLimit(.minutes(10)))
    func uuid() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                for (ours, theirs, validates, arrives) in [
                    (one, other, true, false), (one, other, false, true), (one, one, true, true),
                    (one, nil, true, true),
                    (nil, other, true, true),
                ] as [(String?, String?, Bool, Bool)] {
                    let when = "from \(ours ?? "none") to \(theirs ?? "none")\(validates ? ", validated" : "")"
                    let (source, destination) = try Migrator.pair(ours, theirs)
                    try source.set(.validateUUID, validates)
                    try source.migrate(to: try destination.listen())
                    guard !arrives else {
                        try source.claimArrival(at: destination, when)
                        continue
                    }
                    try source.awaitEnd(.failed, when)
                    let sentence = source.info().errorDescription ?? ""
                    claim(sentence.contains(one) && sentence.contains(other.lowercased()), "\(when): \(sentence)")
                    try source.claimGuestRuns(when)
                    claim(destination.machine.runState == .inMigrate, "\(when): two guests run")
                    // Nothing was touched: the right one may still come.
                    try source.set(.validateUUID, false)
                    try source.migrate(to: .tcp(host: "127.0.0.1", port: destination.port))
                    try source.claimArrival(at: destination, "\(when), without")
                }
            }
        }
    }

    @Test(
        "release-ram gives the source's memory back once the guest runs elsewhere, and not before",
        .timeLimit(.minutes(10)), arguments: RAMBacking.unreserved.map(\.rawValue))
    func releaseRAM(backing: String) async {
        await #expect(processExitsWith: .success) { [backing] in
            Child.run(seconds: 40) {
                let machine = try VirtualMachine(
                    MachineConfiguration(
                        memoryByteCount: 48 << 20,
                        boot: .guest(try GuestProgram(parsing: "dirty,working-set=4M,fill=24M,rate=50M")),
                        backing: RAMBacking(rawValue: backing)!), serial: SerialPort(.none))
                try machine.resume()
                let source = Migrator(machine)
                try waitFor("the guest to be ready") { try machine.guestStatus().isReady }
                let block = machine.memory.blocks[0]
                func allocated() throws -> UInt64 {
                    try block.allocatedRuns(in: block.pages).reduce(0) {
                        $0 + $1.upperBound.value - $1.lowerBound.value
                    }
                }
                for releases in [false, true] {
                    try source.set(.releaseRAM, releases)
                    let destination = try source.destination()
                    if !releases {
                        try source.change { $0.maxBandwidthBytesPerSecond = 10 << 20 }
                        try source.migrate(to: try destination.listen())
                        try waitFor("pages") { (source.info().ram?.normal ?? 0) > 500 }
                        try source.cancel()
                        try source.awaitEnd(.cancelled)
                        try source.claimGuestRuns("after a cancel")
                        try source.change { $0.maxBandwidthBytesPerSecond = 0 }
                        continue
                    }
                    let pages = try allocated()
                    claim(pages > 24 << 8, "the guest has only \(pages) pages")
                    try source.migrate(to: try destination.listen())
                    try source.claimArrival(at: destination, "with release-ram")
                    try waitFor("the memory to be given back") { try allocated() == 0 }
                    try destination.claimGuestRuns("after the source's memory went")
                }
            }
        }
    }

    @Test(
        "without return-path a socket is one-way: no two-phase handover, the migration is over when its reader has read all",
        .timeLimit(.minutes(10)), arguments: [false, true], [false, true])
    func oneWay(multifd: Bool, tls: Bool) async {
        await #expect(processExitsWith: .success) { [multifd, tls] in
            Child.run(seconds: 40) {
                let source = try Migrator.source("dirty,working-set=4M,fill=12M,random,rate=60M", mebibytes: 32)
                let destination = try source.destination()
                for side in [source, destination] {
                    try side.set(.multifd, multifd)
                    if tls { try side.useTLS(side === source ? .client : .server) }
                }
                try source.set(.returnPath, false)
                try source.migrate(to: try destination.listen())
                try source.claimArrival(at: destination, "without a return path")
                claim(source.info().rule == .oneWay, "the rule is \(String(describing: source.info().rule))")
            }
        }
    }

    @Test(
        "what needs answers cannot be on without return-path, in whatever order it is asked for",
        .timeLimit(.minutes(10)))
    func needsReturnPath() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 20) {
                let source = try Migrator.source("idle,fill=1M", mebibytes: 16)
                func refusal(_ changes: [(capability: MigrationCapability, on: Bool)]) -> String {
                    do { try source.set(changes) } catch { return "\(error)" }
                    return "nothing"
                }
                for capability in [MigrationCapability.switchoverAck, .resumable, .verify] {
                    let words = "Capability '\(capability.rawValue)' requires capability 'return-path'"
                    claim(refusal([(capability, true), (.returnPath, false)]).contains(words), "\(capability)")
                    claim(source.isOn(.returnPath) && !source.isOn(capability), "it was set in part")
                    try source.set(.returnPath, false)
                    claim(refusal([(capability, true)]).contains(words), "\(capability)")
                    try source.set([(capability, true), (.returnPath, true)])
                    claim(refusal([(.returnPath, false)]).contains(words), "\(capability)")
                    try source.set(capability, false)
                }
            }
        }
    }
}

extension Migrator {
    /// Where it listens.
    fileprivate var port: String {
        guard case .inet(_, let port)? = info().listening.first else { Child.fail("it does not listen") }
        return port
    }
}
