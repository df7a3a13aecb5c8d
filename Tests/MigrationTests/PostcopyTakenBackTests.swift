import Glibc
import GuestMemory
import Host
import Machine
import TestSupport
import Testing

@testable import Migration

/// Says that the guest shall move, with a limit that no attempt keeps which is bound by it. - Returns: both sides.
private func movesTooLate(
    _ terms: Migrator.PairTerms, from backing: RAMBacking = .anonymous, before act: (Migrator) throws -> Void = { _ in }
) throws -> (source: Migrator, destination: Migrator) {
    let source = try Migrator.source(Migrator.busyGuest, cpus: 2, backing: backing)
    try source.set(terms)
    var parameters = source.parameters
    parameters.downtimeLimitMilliseconds = 1
    try source.set(parameters)
    let destination = try source.pairDestination(terms)
    try source.migrate(to: try destination.listen())
    try waitFor("a round") { (source.info().ram?.dirtySyncCount ?? 0) > 1 || source.isOver }
    try act(destination)
    try source.startPostcopy()
    return (source, destination)
}

@Suite("Postcopy that is taken back, between two Godwits", .serialized, .enabled(if: hasKVM, needsKVM))
struct PostcopyTakenBackTests {
    @Test(
        "a move that would break the downtime limit is taken back: the guest runs on, and what it writes is not lost",
        .timeLimit(.minutes(10)), arguments: [false, true])
    func takenBack(preempts: Bool) async {
        await #expect(processExitsWith: .success) { [preempts] in
            Child.run(seconds: 90) {
                let (source, destination) = try movesTooLate(.init(cpus: 2, preempts: preempts))
                try source.claimArrival(at: destination, "at the end")
                let broken = source.info().brokenSwitchovers
                claim((1...4).contains(broken), "\(broken) attempts were broken off")
            }
        }
    }

    @Test(
        "memory of huge pages is shown again as it was when a move is taken back, and the next attempt succeeds",
        .timeLimit(.minutes(10)), .enabled(if: HugePagePool.has(80, of: .twoMebibytes), needsHugePages),
        arguments: [false, true])
    func hugePages(preempts: Bool) async {
        await #expect(processExitsWith: .success) { [preempts] in
            Child.run(seconds: 90) {
                guard let pool = HugePagePool(80, of: .twoMebibytes) else { Child.fail("no huge pages") }
                defer { withExtendedLifetime(pool) {} }
                let (source, destination) = try movesTooLate(
                    .init(cpus: 2, preempts: preempts, backing: "hugetlb=2M"), from: .hugetlb2M)
                try waitFor("an attempt to be broken off") { source.info().brokenSwitchovers > 0 || source.isOver }
                try source.claimArrival(at: destination, "at the end")
                let broken = source.info().brokenSwitchovers
                claim((1...4).contains(broken), "\(broken) attempts were broken off")
                try waitFor("memory to be huge", seconds: 30) { destination.info().hugeShare == 1 }
                try destination.claimGuestRuns("in huge pages")
            }
        }
    }

    @Test(
        "huge pages that cannot be shown again when a move is taken back: nothing starts on what is left, and the guest stays",
        .timeLimit(.minutes(10)), .enabled(if: HugePagePool.has(40, of: .twoMebibytes), needsHugePages))
    func cannotBeShownAgain() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                guard let pool = HugePagePool(40, of: .twoMebibytes) else { Child.fail("no huge pages") }
                defer { withExtendedLifetime(pool) {} }
                let (source, destination) = try movesTooLate(.init(cpus: 2, backing: "hugetlb=2M")) { destination in
                    // The destination prepared itself at ADVISE, long before. From here on the file cannot be mapped for writing.
                    guard let file = destination.machine.memory.blocks[0].file else { Child.fail("no file") }
                    let reading = try Descriptor.open("/proc/self/fd/\(file.descriptor.number)", O_RDONLY)
                    claim(dup2(reading.number, file.descriptor.number) >= 0, "dup2: \(errno)")
                }
                try source.awaitEnd(.failed, "at the source")
                let reason = source.info().errorDescription ?? ""
                claim(reason.contains("leaves holes in it"), reason)
                try source.claimGuestRuns("at the source")
                try destination.awaitEnd(.failed, "at the destination")
                claim(
                    destination.info().errorDescription?.contains("leaves holes in it") == true, "\(destination.info())"
                )
                claim(destination.machine.runState == .inMigrate, "the machine is \(destination.machine.runState)")
                claim((try? destination.machine.resume()) == nil, "the destination was started")
            }
        }
    }
}
