import GuestMemory
import Host
import Machine
import Migration
import MigrationStream
import TestSupport
import Testing
import Transport

@Suite("verified live migration", .serialized, .enabled(if: hasKVM, needsKVM))
struct VerifiedMigrationTests {
    @Test(
        "a guest that writes moves with digests, over one channel and over several, compressed and as differences",
        .timeLimit(.minutes(10)), arguments: ["plain", "xbzrle", "channels", "legacy zeroes", "zstd"])
    func moves(kind: String) async {
        await #expect(processExitsWith: .success) { [kind] in
            Child.run(seconds: 60) {
                let source = try Migrator.source("dirty,working-set=2M,fill=32M,random,rate=20M", cpus: 2)
                try source.set(.verify, true)
                if kind == "xbzrle" { try source.set(.xbzrle, true) }
                if !["plain", "xbzrle"].contains(kind) {
                    var parameters = source.parameters
                    parameters.multifdChannels = 3
                    if kind == "zstd" { parameters.compressionName = "zstd" }
                    if kind == "legacy zeroes" { parameters.zeroPageDetection = "legacy" }
                    try source.set(parameters)
                    try source.set(.multifd, true)
                }
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try source.claimArrival(at: destination, "verified, \(kind)")
            }
        }
    }

    @Test(
        "a byte that changes on the way is named, and the guest runs on at the source", .timeLimit(.minutes(10)),
        arguments: [0, 2])
    func spoiled(channels: Int) async {
        await #expect(processExitsWith: .success) { [channels] in
            Child.run(seconds: 60) {
                let source = try Migrator.source("dirty,working-set=1M,fill=40M,random,rate=20M")
                try source.set(.verify, true)
                if channels > 0 {
                    var parameters = source.parameters
                    parameters.multifdChannels = UInt64(channels)
                    try source.set(parameters)
                    try source.set(.multifd, true)
                }
                let destination = try source.destination()
                let proxy = try ChannelProxy(
                    to: try destination.listen(), striking: channels == 0 ? 0 : 1, .spoil(at: 7_000_123))
                try source.migrate(to: proxy.address)
                try source.awaitEnd(.failed, "with a spoiled byte")
                let reason = source.info().errorDescription ?? ""
                claim(reason.contains("x-verify: 1 page is not here as sent: ram 0x"), reason)
                claim(reason.contains("do not fit"), reason)
                try source.claimGuestRuns("after a spoiled byte")
                claim(destination.machine.runState == .inMigrate, "two guests run")
                // Nothing of it is left: the next migration completes.
                let other = try source.destination()
                try source.migrate(to: try other.listen())
                try source.claimArrival(at: other, "after a spoiled byte")
            }
        }
    }
}
