import GuestMemory
import Host
import Machine
import Migration
import TestSupport
import Testing
import Transport

/// How far a migration is when it is cancelled.
enum CancelledStage: String, CaseIterable, Sendable {
    /// Somebody listens who never accepts: TLS waits for its handshake, a plain connection for the first answer.
    case silence
    /// The main connection is there, another one's handshake is not answered.
    case channels
    case firstRound, laterRound
    case preSwitchover
    /// The guest stands still, and the state is on its way.
    case device
}

private struct Scene {
    let source: Migrator
    let multifd: Bool
    let tls: Bool

    /// Brings a migration to that stage. - Returns: the destination, if one was reached, and what must live as long.
    func enter(_ stage: CancelledStage, _ when: String) throws -> (destination: Migrator?, held: [AnyObject]) {
        try source.set(.multifd, multifd)
        try source.set(.pauseBeforeSwitchover, stage == .preSwitchover || stage == .device)
        try source.change {
            $0.multifdChannels = 3
            $0.maxBandwidthBytesPerSecond = stage == .firstRound || stage == .laterRound ? 30 << 20 : 0
            // Never fits: rounds go on.
            $0.downtimeLimitMilliseconds = stage == .laterRound ? 1 : 2000
            $0.tlsCredentials = tls ? "tls0" : ""
        }
        if stage == .silence {
            let listener = try Socket.listen(host: "127.0.0.1", port: "0")
            try source.migrate(to: .tcp(host: "127.0.0.1", port: "\(Socket.localPort(of: listener) ?? 0)"))
            Clock.sleep(nanoseconds: 50_000_000)
            claim(source.info().status == .setup, "\(when): the source is \(source.info().status)")
            return (nil, [listener])
        }
        let destination = try source.destination()
        if tls { try destination.useTLS(.server) }
        let address = try destination.listen()
        if stage == .channels {
            let proxy = try ChannelProxy(to: address, striking: 2, .swallow)
            try source.migrate(to: proxy.address)
            Clock.sleep(nanoseconds: 100_000_000)
            claim(!source.isOver, "\(when): \(source.info())")
            return (destination, [proxy])
        }
        let line = try LongLine(to: address, milliseconds: 0)
        try source.migrate(to: stage == .device ? line.address : address)
        switch stage {
        case .firstRound: try waitFor("pages \(when)") { (source.info().ram?.normal ?? 0) > 100 }
        case .laterRound: try waitFor("later rounds \(when)") { (source.info().ram?.dirtySyncCount ?? 0) > 3 }
        default: try waitFor("pre-switchover \(when)") { source.info().status == .preSwitchover }
        }
        if stage == .device {
            line.isHeld.withLock { $0 = true }
            try source.proceed()
            try waitFor("device \(when)") { source.info().status == .device }
            Clock.sleep(nanoseconds: 30_000_000)
            claim(source.info().status == .device, "\(when): the source is \(source.info().status)")
        }
        return (destination, [line])
    }
}

@Suite("cancelled and tried again", .serialized, .enabled(if: hasKVM, needsKVM))
struct CancelledStagesTests {
    @Test(
        "cancelled at any stage the guest runs on, and the next migration brings it to another destination whole",
        .timeLimit(.minutes(10)), arguments: [false, true], [false, true])
    func stages(multifd: Bool, tls: Bool) async {
        await #expect(processExitsWith: .success) { [multifd, tls] in
            Child.run(seconds: 120) {
                let source = try Migrator.source("dirty,working-set=4M,fill=16M,random,rate=80M", mebibytes: 32)
                try source.useTLS(.client)
                let scene = Scene(source: source, multifd: multifd, tls: tls)
                for stage in CancelledStage.allCases where multifd || stage != .channels {
                    let when = "in \(stage), \(multifd ? "several channels" : "one channel"), \(tls ? "TLS" : "plain")"
                    let (destination, held) = try scene.enter(stage, when)
                    let began = Clock.monotonicNanoseconds
                    try source.cancel()
                    try waitFor("the end \(when), it is \(source.info().status)") { source.isOver }
                    let seconds = Double(Clock.monotonicNanoseconds - began) / 1e9
                    claim(source.info().status == .cancelled, "\(when): \(source.info())")
                    claim(seconds < 5, "\(when): the cancel took \(seconds) s")
                    try source.claimGuestRuns(when)
                    claim(destination?.machine.runState ?? .inMigrate == .inMigrate, "\(when): two guests run")
                    for case let line as LongLine in held { line.isHeld.withLock { $0 = false } }
                    destination?.shutDown()
                }
                try source.set(.pauseBeforeSwitchover, false)
                try source.change { $0.downtimeLimitMilliseconds = 300 }
                let last = try source.destination()
                if tls { try last.useTLS(.server) }
                try source.migrate(to: try last.listen())
                try source.claimArrival(at: last, "after cancelled migrations")
            }
        }
    }
}
