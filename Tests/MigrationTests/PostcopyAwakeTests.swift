import Host
import TestSupport
import Testing

@testable import Migration

@Suite("Idle processors while pages of postcopy are missing", .serialized)
struct PostcopyAwakeTests {
    @Test(
        "are kept awake by both sides, until the migration ends or pauses, and only with a target",
        .enabled(if: hasKVM, needsKVM), .enabled(if: mayKeepAwake, needsAwake), .timeLimit(.minutes(10)),
        arguments: [true, false])
    func limit(hasTarget: Bool) async {
        await #expect(processExitsWith: .success) { [hasTarget] in
            Child.run(seconds: 90) {
                let before = try wakeUpLimit()
                claim(before > 0, "somebody else keeps this host awake")
                let source = try Migrator.source("dirty,working-set=4M,fill=24M,random,rate=1M")
                let destination = try source.destination()
                for side in [source, destination] {
                    try side.set([(.postcopyRAM, true)])
                    var parameters = MigrationParameters()
                    parameters.pageLatencyTargetMicroseconds = hasTarget ? 200 : 0
                    parameters.maxBandwidthBytesPerSecond = 4 << 20
                    // Pages are missing until it is paused.
                    parameters.maxPostcopyBandwidthBytesPerSecond = 1 << 20
                    try side.set(parameters)
                }
                try source.move(to: try destination.listen())
                try destination.awaitStatus(.postcopyActive, "at the destination")
                try source.awaitStatus(.postcopyActive, "at the source")
                if hasTarget {
                    try waitFor("the processors to be kept awake") { try wakeUpLimit() == 0 }
                } else {
                    try destination.claimGuestRuns("with pages missing")
                    claim(try wakeUpLimit() == before, "they are kept awake")
                }
                claim(destination.info().status == .postcopyActive, "\(destination.info().status)")
                try source.pause()
                try source.awaitStatus(.postcopyPaused, "at the source")
                try destination.awaitStatus(.postcopyPaused, "at the destination")
                try waitFor("the processors to sleep again") { try wakeUpLimit() == before }
            }
        }
    }
}
