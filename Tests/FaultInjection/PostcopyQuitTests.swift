import Host
import QMP
import TestSupport
import Testing

@Suite(
    "A destination that ends while pages of its guest are missing", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: hasKVM, needsKVM))
struct PostcopyQuitTests {
    private static let byteCount: UInt64 = 48 << 20

    @Test(
        "a command that waits for a page ends in a sentence and writes no zeroes, and the guest is not heard of any more",
        arguments: ["anonymous", "memfd"])
    func quit(backing: String) throws {
        let bench = try Workbench()
        let size = ["--memory", "\(Self.byteCount)", "--memory-backing", backing]
        let source = try bench.startVM(
            "source", size + ["--cpus", "2", "--guest", "dirty,working-set=4M,fill=24M,random,rate=50M"])
        try source.waitForGuest()
        let destination = try bench.startVM("destination", size + ["--cpus", "2", "--incoming", "defer"])
        for vm in [source, destination] { try vm.allowPostcopy() }
        try destination.client.execute("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
        try source.client.execute(
            "migrate-set-parameters", ["max-bandwidth": JSON(1 << 20), "max-postcopy-bandwidth": JSON(64 << 10)])
        try source.migrate(to: "tcp:127.0.0.1:\(try destination.port())")
        try source.client.execute("migrate-start-postcopy")
        try destination.waitForMigration("postcopy-active")
        try source.waitForMigration("postcopy-active")
        try source.client.execute("migrate-pause")
        try destination.waitForMigration("postcopy-paused")

        let path = "\(bench.folder)/saved"
        let outcome = try bench.savingMemory(of: destination, Self.byteCount, to: path, seconds: 30)
        Clock.sleep(nanoseconds: 300_000_000)
        #expect(outcome.withLock { $0 } == nil, "nobody waits for a page")
        try destination.client.execute("quit")
        let words = outcome.wait(deadline: .after(seconds: 10)) { $0 }
        #expect(words?.contains("do not come any more") == true, "\(words ?? "it waits on")")
        #expect(destination.process.wait(deadline: .after(seconds: 10)) == .exited(0), "\(destination.log)")
        #expect(try Descriptor.contents(of: path).isEmpty, "zeroes were saved")
        #expect(
            !destination.log.contains("cannot run on") && !destination.log.contains("shut down"), "\(destination.log)")
        try source.client.execute("quit")
    }
}
