import Compression
import GuestMemory
import GuestPrograms
import Host
import Machine
import Migration
import MigrationStream
import TestSupport
import Testing
import Transport

@Suite("live migration with compressed packets", .serialized, .enabled(if: hasKVM, needsKVM))
struct CompressionMigrationTests {
    @Test(
        "a guest that writes arrives, verified; what shrinks is compressed, what does not goes plain",
        .timeLimit(.minutes(10)), arguments: ["zlib", "zstd"], [1, 3])
    func arrives(method: String, channels: UInt64) async {
        await #expect(processExitsWith: .success) { [method, channels] in
            Child.run(seconds: 60) {
                // One word of each page is written: the rest is zero.
                let source = try Migrator.source("dirty,working-set=8M,fill=24M,random,rate=100M", cpus: 2)
                let block = source.machine.memory.blocks[0]
                // Noise where the guest does not look.
                var random = SeededRandom(seed: 7)
                let noisePages: UInt64 = 1024
                for word in 0..<Int(noisePages) * 512 { block.mapping.store(random.next(), at: 56 << 20 | word << 3) }
                let noise = block.mapping.read(at: 56 << 20, count: Int(noisePages) << 12)
                var parameters = source.parameters
                parameters.multifdChannels = channels
                parameters.compressionName = method
                claim(parameters.compression != nil, "there is no compression '\(method)'")
                try source.set(parameters)
                try source.set(.multifd, true)
                let destination = try source.destination()
                try source.migrate(to: try destination.listen())
                try source.claimArrival(at: destination, "with \(method)")
                let there = destination.machine.memory.blocks[0].mapping.read(at: 56 << 20, count: noise.count)
                claim(there == noise, "noise arrived as something else")
                let sent = source.info().ram!
                claim(sent.normal > noisePages, "\(sent.normal) pages were sent")
                // Plain packets are as long as their pages: noise costs nothing but its heads.
                let limit = noisePages * 4096 + (sent.normal - noisePages) * 4096 / 2 + 1 << 20
                claim(sent.multifdBytes < limit, "\(sent.multifdBytes) bytes for \(sent.normal) pages")
                claim(sent.multifdBytes > noisePages * 4096, "noise shrank to \(sent.multifdBytes) bytes")
                claim(sent.multifdBytes == destination.info().ram!.multifdBytes, "bytes sent and received")
            }
        }
    }

    @Test("xbzrle and several channels at once are refused, and so is a level that does not exist")
    func refused() throws {
        let machine = try VirtualMachine(
            MachineConfiguration(kind: .none, memoryByteCount: 1 << 20), serial: SerialPort(.none))
        let migrator = Migrator(machine)
        try migrator.set(.multifd, true)
        try migrator.set(.xbzrle, true)
        let error = #expect(throws: MigrationError.self) {
            try migrator.migrate(to: .tcp(host: "127.0.0.1", port: "1"))
        }
        #expect(error?.description.contains("xbzrle") == true && error?.description.contains("multifd") == true)
        var parameters = migrator.parameters
        parameters.zlibLevel = 10
        #expect(
            throws: MigrationError("Parameter 'multifd-zlib-level' expects a value between 0 and 9")
        ) { try migrator.set(parameters) }
        parameters.zlibLevel = 9
        parameters.zstdLevel = 21
        #expect(
            throws: MigrationError("Parameter 'multifd-zstd-level' expects a value between 0 and 20")
        ) { try migrator.set(parameters) }
    }
}
