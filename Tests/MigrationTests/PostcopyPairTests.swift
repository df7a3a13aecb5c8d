import GuestMemory
import Host
import Machine
import TestSupport
import Testing
import Transport

@testable import Migration

@Suite("Postcopy between two Godwits", .serialized)
struct PostcopyPairTests {
    private static let pairs: [Migrator.PairTerms] = [
        .init(), .init(cpus: 2, rounds: 1), .init(cpus: 4, rounds: 2, isPaced: true), .init(cpus: 2, preempts: true),
        .init(rounds: 1, preempts: true, isPaced: true), .init(cpus: 2, rounds: 1, channels: 2),
        .init(cpus: 4, rounds: 1, preempts: true, channels: 3, isUnix: true),
        .init(cpus: 4, preempts: true, urgentChannels: 4),
        .init(cpus: 2, rounds: 1, preempts: true, urgentChannels: 16, isPaced: true),
    ]

    @Test(
        "a running guest moves before its memory, and is right while and after that follows",
        .enabled(if: hasKVM, needsKVM), .timeLimit(.minutes(10)), arguments: pairs)
    func runningGuest(terms: Migrator.PairTerms) async {
        await #expect(processExitsWith: .success) { [terms] in
            Child.run(seconds: 90) {
                let source = try Migrator.source(Migrator.busyGuest, cpus: terms.cpus)
                try source.set(terms)
                let destination = try source.pairDestination(terms)
                let path = temporaryPath("pair")
                let address: MigrationAddress
                if terms.isUnix {
                    try destination.acceptMigration(on: .unix(path: path))
                    address = .unix(path: path)
                } else {
                    address = try destination.listen()
                }
                try source.move(to: address, after: terms.rounds)
                // On a busy host its last page may have come before anybody looks.
                try waitFor("its switch") { source.isOver || source.info().status == .postcopyActive }
                if terms.isPaced, source.info().status == .postcopyActive {
                    try destination.claimGuestRuns("with pages missing")
                    claim(source.machine.runState == .postMigrate, "the source is \(source.machine.runState)")
                }
                // All of it comes as slowly, when the switch came before the first round had sent anything.
                try waitFor("the end, \(source.info().ram, default: "nothing")", seconds: 60) {
                    source.isOver || source.info().status == .postcopyPaused
                }
                try source.claimArrival(at: destination, "\(terms): \(destination.info().errorDescription ?? "")")
                let (sent, got) = (source.info(), destination.info())
                claim(sent.rule == .twoPhase, "the rule was \(String(describing: sent.rule))")
                claim(sent.ram?.postcopyRequests == got.ram?.postcopyRequests, "requests differ")
                claim(got.ram?.postcopyBytes ?? 0 > 0, "nothing came behind the guest")
                claim(
                    got.pageLatency?.count ?? 0 >= got.ram?.postcopyRequests ?? .max,
                    "\(String(describing: got.pageLatency?.count)) latencies")
            }
        }
    }

    @Test(
        "a destination that cannot load the state has the guest run on at the source",
        .enabled(if: hasKVM, needsKVM), .timeLimit(.minutes(10)))
    func cannotLoad() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                let source = try Migrator.source(Migrator.busyGuest)
                try source.set(Migrator.PairTerms())
                let destination = try source.pairDestination(cpus: 2)
                try source.move(to: try destination.listen())
                try source.awaitEnd(.failed)
                claim(source.info().errorDescription?.contains("gave up") == true, "\(source.info())")
                try source.claimGuestRuns("at the source")
                try destination.awaitEnd(.failed)
                claim(destination.machine.runState == .inMigrate, "\(destination.machine.runState)")
            }
        }
    }

    @Test("a destination without the capability is refused before anything moves", .timeLimit(.minutes(10)))
    func notAllowed() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 30) {
                let source = Migrator(
                    try VirtualMachine(MachineConfiguration(memoryByteCount: 8 << 20), serial: SerialPort(.none)))
                try source.set(.postcopyRAM, true)
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try source.awaitEnd(.failed)
                let reason = source.info().errorDescription ?? ""
                claim(reason.contains("set the capability there"), reason)
                try waitFor("the destination to wait for another") { destination.info().status == .none }
            }
        }
    }

    @Test(
        "a connection that is lost when the guest has moved pauses both sides, and the guest runs on as far as it can",
        .enabled(if: hasKVM, needsKVM), .timeLimit(.minutes(10)), arguments: [0, 1])
    func lostAfterStart(struck: Int) async {
        await #expect(processExitsWith: .success) { [struck] in
            Child.run(seconds: 60) {
                let terms = Migrator.PairTerms(cpus: 2, preempts: struck > 0, isPaced: true)
                let source = try Migrator.source(Migrator.busyGuest, cpus: 2)
                try source.set(terms)
                let destination = try source.pairDestination(terms)
                let proxy = try ChannelProxy(
                    to: try destination.listen(), striking: struck, .cut(after: struck == 0 ? .max : 64 << 10))
                try source.move(to: proxy.address, after: 1)
                if struck == 0 { try source.awaitStatus(.postcopyActive, "after its switch") }
                if struck == 0 { proxy.cutAll() }
                try source.awaitStatus(.postcopyPaused, "at the source")
                try destination.awaitStatus(.postcopyPaused, "at the destination")
                claim(source.machine.runState == .postMigrate, "the source is \(source.machine.runState)")
                claim(destination.machine.runState == .running, "the guest is \(destination.machine.runState)")
            }
        }
    }
}
