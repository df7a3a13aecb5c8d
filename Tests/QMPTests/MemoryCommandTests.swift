import Glibc
import GuestMemory
import Host
import Machine
import Testing

@testable import QMP

@Suite(.timeLimit(.minutes(10))) struct MemoryCommandTests {
    private func allocatedBytes(_ path: String) -> Int {
        var status = stat()
        guard unsafe stat(path, &status) == 0 else { return -1 }
        return Int(status.st_blocks) * 512
    }

    @Test("pmemsave writes the bytes asked for, from an odd address to an odd end")
    func content() throws {
        let vm = try MonitoredMachine()
        let folder = try TemporaryFolder()
        let bytes = (0..<10_000).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ 7) }
        try vm.write(bytes, at: 0x1FF0)
        try vm.run("pmemsave", ["val": 0x1FFB, "size": 9001, "filename": .string(folder["mem"])])
        #expect(try Descriptor.contents(of: folder["mem"]) == Array(bytes[0xB..<(0xB + 9001)]))
        #expect(try FileSystem.status(of: folder["mem"])?.mode == 0o600)
    }

    @Test("never-touched memory becomes a hole of the file, and stays one of the guest's memory")
    func holes() throws {
        let vm = try MonitoredMachine(megabytes: 64)
        let folder = try TemporaryFolder()
        try vm.write([1, 2, 3], at: 32 << 20)
        try vm.run("pmemsave", ["val": 0, "size": JSON(64 << 20), "filename": .string(folder["mem"])])
        let dump = try Descriptor.contents(of: folder["mem"])
        #expect(dump.count == 64 << 20)
        #expect(Array(dump[(32 << 20)..<(32 << 20) + 4]) == [1, 2, 3, 0])
        #expect(dump.reduce(0) { $0 + UInt64($1) } == 6)
        // One huge page at most.
        #expect(allocatedBytes(folder["mem"]) <= 2 << 20)
        let block = vm.machine.memory.blocks[0]
        let runs = try block.allocatedRuns(in: block.pages)
        #expect(runs.count == 1 && runs[0].contains(RAMOffset(32 << 20).page))
    }

    @Test("a longer file that is there already is overwritten")
    func overwrites() throws {
        let vm = try MonitoredMachine()
        let folder = try TemporaryFolder()
        try Descriptor.create(folder["mem"]).writeAll([UInt8](repeating: 9, count: 9000))
        try vm.run("pmemsave", ["val": 4096, "size": 100, "filename": .string(folder["mem"])])
        #expect(try Descriptor.contents(of: folder["mem"]) == [UInt8](repeating: 0, count: 100))
        try vm.run("pmemsave", ["val": 4096, "size": 0, "filename": .string(folder["mem"])])
        #expect(try Descriptor.contents(of: folder["mem"]).isEmpty)
    }

    @Test("a range outside RAM is refused by address, and no file is made")
    func outside() throws {
        let vm = try MonitoredMachine()
        let folder = try TemporaryFolder()
        let sentence = try vm.refusal(
            "pmemsave", ["val": JSON((16 << 20) - 8), "size": 9, "filename": .string(folder["mem"])])
        #expect(sentence == "guest memory: no RAM at 0x1000000 (1 bytes from there asked for)")
        #expect(try FileSystem.status(of: folder["mem"]) == nil)
        let nowhere: JSON = .string(folder["no/such"])
        #expect(try vm.refusal("pmemsave", ["val": 0, "size": 9, "filename": nowhere]).contains(folder["no/such"]))
        #expect(
            try vm.refusal("pmemsave", ["val": -1, "size": 9, "filename": "x"]).hasPrefix("Parameter 'val' expects"))
        #expect(
            try vm.refusal("pmemsave", ["val": 1, "size": -9, "filename": "x"]).hasPrefix("Parameter 'size' expects"))
        #expect(
            try vm.refusal("pmemsave", ["val": JSON(Int64.max), "size": JSON(Int64.max), "filename": "x"])
                .hasPrefix("Parameter 'size' expects"))
        #expect(
            try vm.refusal("memsave", ["val": 0, "size": 1, "filename": "x"])
                == "Parameter 'cpu-index' expects a CPU number")
    }

    @Test("256 MiB of allocated memory are dumped quickly")
    func speed() throws {
        let vm = try MonitoredMachine(megabytes: 256)
        let folder = try TemporaryFolder()
        let piece = [UInt8](repeating: 0xA5, count: 1 << 20)
        for megabyte in 0..<UInt64(256) { try vm.write(piece, at: megabyte << 20) }
        let began = Clock.monotonicNanoseconds
        try vm.run("pmemsave", ["val": 0, "size": JSON(256 << 20), "filename": .string(folder["mem"])])
        let milliseconds = (Clock.monotonicNanoseconds - began) / 1_000_000
        print("pmemsave of 256 MiB: \(milliseconds) ms")
        // What is meant is a tenth of a second; a page-by-page copy in debug would take far longer than this.
        #expect(milliseconds < 10_000)
        #expect(allocatedBytes(folder["mem"]) >= 256 << 20)
    }
}
