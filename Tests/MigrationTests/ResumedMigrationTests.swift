import GuestMemory
import Host
import Machine
import Migration
import TestSupport
import Testing
import Transport

@Suite("verified migrations that lose their connection", .serialized, .enabled(if: hasKVM, needsKVM))
struct ResumedMigrationTests {
    @Test(
        "a byte that changed on the way, long before the connection was lost, is named after the migration was taken up again",
        .timeLimit(.minutes(10)), arguments: [0, 2])
    func spoiledBefore(channels: Int) async {
        await #expect(processExitsWith: .success) { [channels] in
            Child.run(seconds: 90) {
                let source = try Migrator.source("idle,fill=110M", mebibytes: 128)
                try source.set(.verify, true)
                try source.set(.resumable, true)
                var parameters = source.parameters
                parameters.maxBandwidthBytesPerSecond = 100 << 20
                parameters.multifdChannels = UInt64(max(channels, 1))
                try source.set(parameters)
                try source.set(.multifd, channels > 0)
                let destination = try source.destination()
                let address = try destination.listen()
                let proxy = try ChannelProxy(to: address, striking: channels == 0 ? 0 : 1, .spoil(at: 7_000_123))
                try source.migrate(to: proxy.address)
                // More than what may be in doubt when the connection goes: the page is not sent again.
                try waitFor("75 MiB to be sent") { (source.info().ram?.normal ?? 0) > 75 << 8 }
                proxy.cutAll()
                try waitFor("the pause, it is \(source.info().status)") { source.info().status == .paused }
                claim(source.info().errorDescription != nil, "nobody says why it is paused")
                try source.resume(to: address)
                try waitFor("the end: \(source.info()); there: \(destination.info())", seconds: 40) { source.isOver }
                try source.awaitEnd(.failed, "with a spoiled byte, resumed")
                let reason = source.info().errorDescription ?? ""
                claim(reason.contains("x-verify: 1 page is not here as sent: ram 0x"), reason)
                claim(source.info().resumptions == 1, "it was resumed \(source.info().resumptions) times")
                try source.claimGuestRuns("after a spoiled byte")
                claim(destination.machine.runState == .inMigrate, "two guests run")
            }
        }
    }

    @Test("parameters that are changed while a migration is paused hold when it goes on", .timeLimit(.minutes(10)))
    func changedMeanwhile() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                let source = try Migrator.source("dirty,working-set=2M,fill=60M,rate=4M", mebibytes: 96)
                try source.set(.resumable, true)
                var parameters = source.parameters
                parameters.maxBandwidthBytesPerSecond = 8 << 20
                try source.set(parameters)
                let destination = try source.destination()
                let address = try destination.listen()
                let proxy = try ChannelProxy(to: address, striking: -1, .swallow)
                try source.migrate(to: proxy.address)
                try waitFor("some pages to be sent") { (source.info().ram?.normal ?? 0) > 1000 }
                proxy.cutAll()
                try waitFor("the pause") { source.info().status == .paused }
                do {
                    try source.set(.verify, true)
                    Child.fail("a capability was changed in the middle of a migration")
                } catch { claim("\(error)".contains("under way"), "\(error)") }
                parameters.maxBandwidthBytesPerSecond = 0
                parameters.multifdChannels = 7
                try source.set(parameters)
                try source.resume(to: address)
                try source.claimArrival(at: destination, "resumed")
                claim(destination.info().resumptions == 1, "\(destination.info())")
            }
        }
    }
}
