import Glibc
import GuestMemory
import GuestPrograms
import Host
import Machine
import Migration
import MigrationStream
import TestSupport
import Testing
import Transport

extension Migrator {
    /// Saves into a file by so many threads besides the migration's own.
    fileprivate func save(to address: MigrationAddress, threads: Int, direct: Bool = false) throws {
        var parameters = parameters
        parameters.multifdChannels = UInt64(max(threads, 1))
        parameters.usesDirectIO = direct
        parameters.downtimeLimitMilliseconds = MigrationParameters.longestDowntimeLimit
        try set(parameters)
        try set(.multifd, threads > 0)
        try set(.mappedRAM, true)
        try migrate(to: address)
    }

    fileprivate func restore(from address: MigrationAddress, isLazy: Bool = false) throws -> Migrator {
        let destination = try destination()
        try destination.acceptMigration(on: address, isLazy: isLazy)
        return destination
    }
}

/// The flags of every descriptor of this process that shows that file (proc(5)).
private func openFlags(of path: String) throws -> [CInt] {
    try FileSystem.names(inFolder: "/proc/self/fd").compactMap { name in
        guard FilePath.resolved("/proc/self/fd/\(name)") == path,
            let info = try? Descriptor.contents(of: "/proc/self/fdinfo/\(name)", limit: 4096),
            let line = String(decoding: info, as: UTF8.self).split(separator: "\n").first(where: {
                $0.hasPrefix("flags:")
            }),
            let word = line.split(whereSeparator: { $0 == " " || $0 == "\t" }).last
        else { return nil }
        return CInt(word, radix: 8)
    }
}

/// O_DIRECT of x86-64.
private let directFlag: CInt = 0o40000

/// Of this process, all of it (proc(5), statm).
private func residentBytes() throws -> Int {
    let fields = String(decoding: try Descriptor.contents(of: "/proc/self/statm", limit: 4096), as: UTF8.self).split(
        separator: " ")
    return fields.count > 1 ? (Int(fields[1]) ?? 0) * 4096 : 0
}

@Suite("saving into files and restoring from them (mapped-ram)", .serialized, .enabled(if: hasKVM, needsKVM))
struct MappedRAMMigrationTests {
    @Test(
        "a guest that writes is saved while it runs, and goes on from the file; twice, as the file is not changed",
        .timeLimit(.minutes(10)), arguments: [0, 1, 4], [false, true])
    func saveAndRestore(threads: Int, isLazy: Bool) async {
        await #expect(processExitsWith: .success) { [threads, isLazy] in
            Child.run(seconds: 90) {
                let path = temporaryPath("saved")
                defer { Descriptor.remove(path) }
                let address = MigrationAddress.file(path: path, offset: 0)
                let source = try Migrator.source("dirty,working-set=8M,fill=40M,random,rate=200M", cpus: 2)
                try source.save(to: address, threads: threads)
                try source.awaitEnd(.completed, "saving")
                claim(source.machine.runState == .postMigrate, "the source is \(source.machine.runState)")
                claim(source.info().ram!.normal > 10_000, "only \(source.info().ram!.normal) pages were written")
                let size = try Descriptor.open(path, O_RDONLY).size()
                claim(size > 64 << 20 && size < 68 << 20, "the file has \(size) bytes")
                for attempt in 1...2 {
                    let destination = try source.restore(from: address, isLazy: isLazy)
                    try destination.awaitEnd(.completed, "restoring, attempt \(attempt)")
                    try destination.claimGuestRuns("restored, attempt \(attempt)")
                    destination.machine.pause()
                }
                claim(try Descriptor.open(path, O_RDONLY).size() == size, "restoring changed the file's size")
            }
        }
    }

    @Test(
        "a guest that was restored lazily can be moved on at once, with pages nobody has touched",
        .timeLimit(.minutes(10)))
    func lazyAndOn() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 90) {
                let path = temporaryPath("lazy")
                defer { Descriptor.remove(path) }
                let address = MigrationAddress.file(path: path, offset: 0)
                let source = try Migrator.source("dirty,working-set=4M,fill=40M,rate=20M")
                try source.save(to: address, threads: 2)
                try source.awaitEnd(.completed, "saving")
                let middle = try source.restore(from: address, isLazy: true)
                try middle.awaitEnd(.completed, "restoring")
                let last = try middle.destination()
                try middle.migrate(to: try last.listen())
                try middle.claimArrival(at: last, "moved on")
            }
        }
    }

    @Test("the stream may begin anywhere in its file, and what is before it stays", .timeLimit(.minutes(10)))
    func offset() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 50) {
                let path = temporaryPath("offset")
                defer { Descriptor.remove(path) }
                let before = [UInt8](repeating: 0x5a, count: 12_345)
                try Descriptor.create(path).writeAll(before)
                let address = MigrationAddress.file(path: path, offset: UInt64(before.count))
                let source = try Migrator.source("dirty,working-set=2M,fill=8M,rate=20M")
                try source.save(to: address, threads: 2)
                try source.awaitEnd(.completed, "saving")
                claim(try Descriptor.open(path, O_RDONLY).read(at: 0, count: before.count) == before, "it was changed")
                let destination = try source.restore(from: address)
                try destination.awaitEnd(.completed, "restoring")
                try destination.claimGuestRuns("restored")
            }
        }
    }

    @Test("direct I/O goes past the page cache both ways, by the flags of the open file", .timeLimit(.minutes(10)))
    func direct() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 50) {
                let path = temporaryPath("direct")
                defer { Descriptor.remove(path) }
                do {
                    try Descriptor.create(path).truncate(to: 1 << 20)
                    _ = try Descriptor.open(path, O_WRONLY).openedDirect(writing: true)
                } catch { return print("no direct I/O here: \(error)") }
                let address = MigrationAddress.file(path: path, offset: 0)
                let source = try Migrator.source("dirty,working-set=2M,fill=8M,rate=20M")
                // Slow enough to be looked at.
                var parameters = source.parameters
                parameters.maxBandwidthBytesPerSecond = 8 << 20
                try source.set(parameters)
                try source.save(to: address, threads: 2, direct: true)
                try waitFor("a file that is open past the page cache") {
                    try openFlags(of: path).contains { $0 & directFlag != 0 }
                }
                parameters = source.parameters
                parameters.maxBandwidthBytesPerSecond = 0
                try source.set(parameters)
                try source.awaitEnd(.completed, "saving")
                let destination = try source.destination()
                parameters = destination.parameters
                parameters.usesDirectIO = true
                try destination.set(parameters)
                let sawDirect = Monitor(false)
                let isOver = Monitor(false)
                _ = try HostThread(name: "watch") {
                    while !isOver.withLock({ $0 }) {
                        if (try? openFlags(of: path))?.contains(where: { $0 & directFlag != 0 }) == true {
                            sawDirect.withLock { $0 = true }
                        }
                    }
                }
                try destination.acceptMigration(on: address)
                try destination.awaitEnd(.completed, "restoring")
                isOver.withLock { $0 = true }
                claim(sawDirect.withLock { $0 }, "the file was read through the page cache")
                try destination.claimGuestRuns("restored")
            }
        }
    }

    @Test(
        "where the file system has no direct I/O saving is refused with a sentence", .timeLimit(.minutes(10)),
        .enabled(if: mayMount, needsMount))
    func noDirect() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 50) {
                let folder = temporaryPath("ramfs")
                Child.mount("ramfs", at: folder)
                let path = "\(folder)/saved"
                let source = try Migrator.source("dirty,working-set=2M,fill=8M,rate=20M")
                try source.save(to: .file(path: path, offset: 0), threads: 2, direct: true)
                try source.awaitEnd(.failed, "without direct I/O")
                let sentence = source.info().errorDescription ?? ""
                claim(sentence.contains("no direct I/O") && sentence.contains("direct-io off"), sentence)
                try source.claimGuestRuns("on")
                try source.save(to: .file(path: path, offset: 0), threads: 2)
                try source.awaitEnd(.completed, "through the cache")
            }
        }
    }

    @Test(
        "a guest restored lazily has only what it touches in memory; one restored at once has all",
        .timeLimit(.minutes(10)))
    func resident() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                let path = temporaryPath("resident")
                defer { Descriptor.remove(path) }
                let address = MigrationAddress.file(path: path, offset: 0)
                let source = try Migrator.source("dirty,working-set=4M,fill=128M,rate=4M", mebibytes: 160)
                try source.save(to: address, threads: 2)
                try source.awaitEnd(.completed, "saving")
                for isLazy in [true, false] {
                    let before = try residentBytes()
                    let destination = try source.restore(from: address, isLazy: isLazy)
                    try destination.awaitEnd(.completed, "restoring")
                    try waitFor("the guest to write") { try destination.machine.guestStatus().touches > 0 }
                    let grown = try residentBytes() - before
                    if isLazy {
                        claim(grown < 40 << 20, "lazily restored it takes \(grown >> 20) MiB at once")
                    } else {
                        claim(
                            grown > 120 << 20,
                            "restored at once it takes \(grown >> 20) MiB: this test measures nothing")
                    }
                    try destination.claimGuestRuns("restored")
                    if isLazy {
                        claim(try residentBytes() - before > 120 << 20, "a check of all memory read it from elsewhere")
                    }
                    destination.machine.pause()
                }
            }
        }
    }

    @Test(
        "a full disk lets the guest run on, and leaves nothing that looks like a saved VM", .timeLimit(.minutes(10)),
        .enabled(if: mayMount, needsMount))
    func fullDisk() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 50) {
                let folder = temporaryPath("small")
                Child.mount("tmpfs", at: folder, options: "size=6m")
                let path = "\(folder)/saved"
                let source = try Migrator.source("dirty,working-set=2M,fill=16M,rate=20M")
                for threads in [0, 3] {
                    try source.save(to: .file(path: path, offset: 0), threads: threads)
                    try source.awaitEnd(.failed, "on a full disk")
                    let sentence = source.info().errorDescription ?? ""
                    claim(sentence.contains("no space left") && sentence.contains(path), sentence)
                    try source.claimGuestRuns("after a full disk")
                    try waitFor("the file to be cut back") { try Descriptor.open(path, O_RDONLY).size() == 0 }
                }
            }
        }
    }

    @Test("a file that cannot be opened, a cancelled save and other transports are refused", .timeLimit(.minutes(10)))
    func refusals() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 50) {
                let source = try Migrator.source("dirty,working-set=2M,fill=16M,rate=20M")
                try source.save(to: .file(path: "/nowhere/at/all", offset: 0), threads: 2)
                try source.awaitEnd(.failed, "nowhere")
                claim(source.info().errorDescription?.contains("/nowhere/at/all") == true, "\(source.info())")
                do {
                    try source.migrate(to: .unix(path: "/nowhere"))
                    Child.fail("a socket has no places")
                } catch let error as MigrationError {
                    claim(error.description.contains("file:PATH"), error.description)
                }

                let path = temporaryPath("cancelled")
                defer { Descriptor.remove(path) }
                var parameters = source.parameters
                parameters.maxBandwidthBytesPerSecond = 4 << 20
                try source.set(parameters)
                try source.migrate(to: .file(path: path, offset: 0))
                try waitFor("some pages") { source.info().ram?.normal ?? 0 > 100 }
                try source.cancel()
                try source.awaitEnd(.cancelled, "cancelled")
                try source.claimGuestRuns("after a cancel")
                try waitFor("the file to be cut back") { try Descriptor.open(path, O_RDONLY).size() == 0 }
            }
        }
    }

    @Test("a file that was cut off or damaged is refused, and no guest starts", .timeLimit(.minutes(10)))
    func damage() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 90) {
                let path = temporaryPath("damaged")
                defer { Descriptor.remove(path) }
                let address = MigrationAddress.file(path: path, offset: 0)
                let source = try Migrator.source("dirty,working-set=2M,fill=8M,rate=20M")
                try source.save(to: address, threads: 2)
                try source.awaitEnd(.completed, "saving")
                let file = try Descriptor.open(path, O_RDWR)
                let name = source.machine.configuration.streamName
                let blocks = source.machine.memory.blocks.map {
                    RAMBlockDescription(name: $0.name, length: $0.byteCount)
                }
                let setup = MappedRAMSetup(machine: name, blocks: blocks, ramSectionID: 2, at: 0)
                let region = setup.regions[0]
                // The end: the state, the pages, the bitmap, the list of blocks.
                for length in [
                    region.end + 2000, region.end + 4, region.end - 1, region.pagesOffset, region.bitmapOffset, 70,
                ] {
                    try file.truncate(to: length)
                    let destination = try source.restore(from: address)
                    try destination.awaitEnd(.failed, "cut off at \(length)")
                    claim(
                        destination.machine.runState == .inMigrate,
                        "cut off at \(length) it is \(destination.machine.runState)")
                }
            }
        }
    }
}
