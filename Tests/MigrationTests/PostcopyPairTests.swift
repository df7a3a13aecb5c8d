import GuestMemory
import Host
import Machine
import TestSupport
import Testing
import Transport

@testable import Migration

extension Migrator {
    /// What both sides are told.
    fileprivate struct Terms: Sendable, Codable, CustomTestStringConvertible {
        var cpus = 1
        /// Rounds before the guest is told to move; `nil`: it is told at once.
        var rounds: UInt64?
        var preempts = false
        var urgentChannels: UInt64 = 1
        var channels: UInt64 = 0
        var isUnix = false
        var isPaced = false

        var testDescription: String {
            let when = rounds.map { "after \($0) rounds" } ?? "at once"
            return
                "\(cpus) vCPUs, \(when)\(preempts ? ", \(urgentChannels) urgent" : "")\(channels > 0 ? ", \(channels) channels" : "")"
                + (isUnix ? ", unix" : "") + (isPaced ? ", paced" : "")
        }

        var capabilities: [(capability: MigrationCapability, on: Bool)] {
            [(.postcopyRAM, true), (.postcopyPreempt, preempts), (.multifd, channels > 0)]
        }
    }

    /// A machine like this one that takes postcopy.
    fileprivate func pairDestination(_ terms: Terms = Terms(), cpus: Int? = nil) throws -> Migrator {
        let destination = try destination(cpus: cpus)
        try destination.set(terms.capabilities)
        return destination
    }

    fileprivate func set(_ terms: Terms) throws {
        try set(terms.capabilities)
        var parameters = MigrationParameters()
        // The guest is to be told before precopy comes to its end by itself.
        parameters.maxBandwidthBytesPerSecond = 64 << 20
        parameters.downtimeLimitMilliseconds = 0
        parameters.postcopyChannels = terms.urgentChannels
        if terms.channels > 0 { parameters.multifdChannels = terms.channels }
        if terms.isPaced { parameters.maxPostcopyBandwidthBytesPerSecond = 1 << 20 }
        try set(parameters)
    }

    fileprivate func awaitStatus(_ status: MigrationStatus, _ when: String) throws {
        try waitFor("\(status) \(when), it is \(info().status): \(info().errorDescription ?? "no error")") {
            info().status == status
        }
    }

    /// Migrates, and tells the guest to move.
    fileprivate func move(to address: MigrationAddress, after rounds: UInt64? = nil) throws {
        try migrate(to: address)
        if let rounds {
            try waitFor("\(rounds) rounds") { (info().ram?.dirtySyncCount ?? 0) > rounds || isOver }
        } else {
            try waitFor("the migration to begin") { info().status != .setup }
        }
        try startPostcopy()
    }
}

private let dirty = "dirty,working-set=4M,fill=24M,random,rate=200M"

@Suite("Postcopy between two Godwits", .serialized)
struct PostcopyPairTests {
    private static let pairs: [Migrator.Terms] = [
        .init(), .init(cpus: 2, rounds: 1), .init(cpus: 4, rounds: 2, isPaced: true), .init(cpus: 2, preempts: true),
        .init(rounds: 1, preempts: true, isPaced: true), .init(cpus: 2, rounds: 1, channels: 2),
        .init(cpus: 4, rounds: 1, preempts: true, channels: 3, isUnix: true),
        .init(cpus: 4, preempts: true, urgentChannels: 4),
        .init(cpus: 2, rounds: 1, preempts: true, urgentChannels: 16, isPaced: true),
    ]

    @Test(
        "a running guest moves before its memory, and is right while and after that follows",
        .enabled(if: hasKVM, needsKVM), .timeLimit(.minutes(10)), arguments: pairs)
    fileprivate func runningGuest(terms: Migrator.Terms) async {
        await #expect(processExitsWith: .success) { [terms] in
            Child.run(seconds: 90) {
                let source = try Migrator.source(dirty, cpus: terms.cpus)
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
                if terms.isPaced {
                    try source.awaitStatus(.postcopyActive, "after its switch")
                    try destination.claimGuestRuns("with pages missing")
                    claim(source.machine.runState == .postMigrate, "the source is \(source.machine.runState)")
                }
                try waitFor("the end") { source.isOver || source.info().status == .postcopyPaused }
                try source.claimArrival(at: destination, "\(terms): \(destination.info().errorDescription ?? "")")
                let (sent, got) = (source.info(), destination.info())
                claim(sent.rule == .twoPhase, "the rule was \(String(describing: sent.rule))")
                claim(sent.ram?.postcopyRequests == got.ram?.postcopyRequests, "requests differ")
                claim(got.ram?.postcopyBytes ?? 0 > 0, "nothing came behind the guest")
                claim(
                    got.pageLatency?.count == got.ram?.postcopyRequests,
                    "\(String(describing: got.pageLatency?.count)) latencies")
            }
        }
    }

    @Test(
        "a move that would break the downtime limit is taken back: the guest runs on, and what it writes is not lost",
        .enabled(if: hasKVM, needsKVM), .timeLimit(.minutes(10)), arguments: [false, true])
    func takenBack(preempts: Bool) async {
        await #expect(processExitsWith: .success) { [preempts] in
            Child.run(seconds: 90) {
                let terms = Migrator.Terms(cpus: 2, preempts: preempts)
                let source = try Migrator.source(dirty, cpus: 2)
                try source.set(terms)
                var parameters = source.parameters
                parameters.downtimeLimitMilliseconds = 1
                try source.set(parameters)
                let destination = try source.pairDestination(terms)
                try source.move(to: try destination.listen(), after: 1)
                try source.claimArrival(at: destination, "at the end")
                let broken = source.info().brokenSwitchovers
                claim((1...4).contains(broken), "\(broken) attempts were broken off")
            }
        }
    }

    @Test(
        "a destination that cannot load the state has the guest run on at the source",
        .enabled(if: hasKVM, needsKVM), .timeLimit(.minutes(10)))
    func cannotLoad() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                let source = try Migrator.source(dirty)
                try source.set(Migrator.Terms())
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
                let terms = Migrator.Terms(cpus: 2, preempts: struck > 0, isPaced: true)
                let source = try Migrator.source(dirty, cpus: 2)
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
