import Glibc
import Host
import QMP
import TestSupport
import Testing

@Suite(
    "godwit save and run --restore", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: Workbench.hasKVM, "needs /dev/kvm"))
struct SaveCommandTests {
    private let bench: Workbench

    init() throws { bench = try Workbench() }

    private let guest = ["--memory", "32M", "--guest", "dirty,working-set=1M,fill=16M,rate=4M"]
    private var path: String { "\(bench.folder)/saved" }

    private func exists(_ path: String) -> Bool { (try? FileSystem.status(of: path)) != nil }

    /// Whether something is left beside that file of what was to become it.
    private func leavesParts(_ path: String) -> Bool {
        let folder = path[..<(path.lastIndex(of: "/") ?? path.startIndex)]
        return ((try? FileSystem.names(inFolder: String(folder))) ?? []).contains { $0.hasSuffix(".partial") }
    }

    /// A VM that was saved into `path`.
    private func saved() throws -> VM {
        let source = try bench.startVM("source", guest)
        try source.waitForGuest()
        let outcome = try bench.run(["save", "source", path])
        #expect(outcome.status == .exited(0), "\(outcome)")
        return source
    }

    @Test("a file gets its name when it is whole, replaces an older one, and goes on from a file nobody may write")
    func roundTrip() throws {
        try Descriptor.create(path).writeAll(Array("older".utf8))
        let source = try saved()
        #expect(try source.status() == "postmigrate")
        #expect(!leavesParts(path))
        #expect(try Descriptor.open(path, O_RDONLY).size() > 32 << 20)
        unsafe chmod(path, 0o400)
        for options in [[], ["--restore-lazily"]] {
            let name = options.isEmpty ? "copy" : "lazy"
            let restored = try bench.startVM(name, ["--memory", "32M", "--restore", path] + options)
            #expect(try restored.wait(seconds: 20) { try restored.status() == "running" }, "\(restored.log)")
            #expect(try restored.client.execute("x-check-guest")["verified"] == true)
        }
    }

    @Test("a name that is relative is one in the caller's folder, wherever the VM's process is")
    func relative() throws {
        let source = try bench.startVM("source", guest)
        try source.waitForGuest()
        let outcome = try bench.run(["save", "source", "near"], through: ["env", "-C", bench.folder])
        #expect(outcome.status == .exited(0), "\(outcome)")
        #expect(exists("\(bench.folder)/near"))
    }

    @Test("what cannot be written is one sentence: the guest goes on, and a file that was there is as it was")
    func unwritable() throws {
        let source = try bench.startVM("source", guest)
        try source.waitForGuest()
        let fifo = "\(bench.folder)/fifo"
        unsafe mkfifo(fifo, 0o600)
        let cases = [
            ("/nonexistent/saved", ["/nonexistent/saved", "no such file"]), (bench.folder, ["directory"]),
            ("/proc/saved", ["/proc/saved", "no such file"]), (fifo, [fifo]),
        ]
        for (file, words) in cases {
            let outcome = try bench.run(["save", "source", file])
            #expect(outcome.status == .exited(1), "\(outcome)")
            for word in words { #expect(outcome.lastErrorLine.contains(word), "\(file): \(outcome)") }
            #expect(try source.status() == "running")
            #expect(!leavesParts(file))
        }
        #expect(try source.client.execute("x-check-guest")["verified"] == true)
        // Its settings are as before: nothing of the attempts is left.
        #expect(try source.client.execute("query-migrate-parameters")["downtime-limit"] == 300)
    }

    @Test(
        "on a full disk the guest goes on, and the file that was there is as it was", .enabled(if: mayMount, needsMount)
    )
    func fullDisk() throws {
        let source = try bench.startVM("source", guest)
        try source.waitForGuest()
        let small = "\(bench.folder)/small"
        unsafe mkdir(small, 0o700)
        try #require(unsafe mount("none", small, "tmpfs", 0, "size=8m") == 0)
        defer { unsafe umount2(small, Int32(MNT_DETACH)) }
        let file = "\(small)/saved"
        try Descriptor.create(file).writeAll(Array("older".utf8))
        let outcome = try bench.run(["save", "source", file])
        #expect(outcome.status == .exited(1) && outcome.lastErrorLine.contains("no space left"), "\(outcome)")
        #expect(try source.status() == "running")
        #expect(!leavesParts(file))
        #expect(try Descriptor.contents(of: file) == Array("older".utf8))
        #expect(try source.client.execute("x-check-guest")["verified"] == true)
    }

    @Test("what does not fit a file is no reason not to save, and is set again when saving fails")
    func unfitting() throws {
        let source = try bench.startVM("source", guest)
        try source.waitForGuest()
        let unfit = ["x-resumable", "x-verify", "xbzrle"]
        try source.client.execute(
            "migrate-set-capabilities",
            ["capabilities": .array(unfit.map { ["capability": .string($0), "state": true] })])
        try source.client.execute(
            "migrate-set-parameters", ["multifd-compression": "zlib", "tls-creds": "somebody", "multifd-channels": 3])
        let failed = try bench.run(["save", "source", "/nonexistent/saved"])
        #expect(failed.status == .exited(1) && failed.lastErrorLine.contains("no such file"), "\(failed)")
        let parameters = try source.client.execute("query-migrate-parameters")
        #expect(parameters["multifd-compression"] == "zlib" && parameters["tls-creds"] == "somebody")
        #expect(parameters["multifd-channels"] == 3)
        let on =
            try source.client.execute("query-migrate-capabilities").arrayValue?.filter { $0["state"] == true } ?? []
        #expect(on.compactMap { $0["capability"]?.stringValue }.filter(unfit.contains).sorted() == unfit)
        #expect(!on.contains { $0["capability"] == "mapped-ram" || $0["capability"] == "multifd" })
        let outcome = try bench.run(["save", "source", path])
        #expect(outcome.status == .exited(0), "\(outcome)")
    }

    @Test("a file that is none, or of another VM, is refused with one sentence and no guest")
    func unreadable() throws {
        try saved().process.signal(SIGTERM)
        let bytes = try Descriptor.contents(of: path)
        func file(_ name: String, _ contents: [UInt8]) throws -> String {
            let path = "\(bench.folder)/\(name)"
            try Descriptor.create(path).writeAll(contents)
            return path
        }
        // The header of the only block: version, page size, bitmap, pages; the block is named ram.
        let head = try #require(
            bytes.indices.prefix(4096).first { bytes[$0...].starts(with: [3] + Array("ram".utf8) + [0, 0, 0, 0, 2]) })
        var beyond = bytes
        beyond.replaceSubrange(head + 24..<head + 32, with: [0x7f, 0, 0, 0, 0, 0, 0, 0])
        var newer = bytes
        newer[head + 15] = 9
        let lines: [(String, String, [String])] = [
            ("32M", "/nonexistent/saved", ["/nonexistent/saved", "no such file"]),
            ("32M", bench.folder, ["directory"]),
            ("32M", try file("empty", []), ["header"]),
            ("32M", try file("foreign", Array("no VM was saved here, only words".utf8)), ["no migration stream"]),
            ("32M", try file("cut", Array(bytes.prefix(8 << 20))), ["cut off"]),
            ("32M", try file("endless", Array(bytes.dropLast(6000))), ["ends"]),
            ("32M", try file("beyond", beyond), ["bitmap"]),
            ("32M", try file("newer", newer), ["version"]),
            ("64M", path, ["33554432"]),
        ]
        for (memory, file, words) in lines {
            for lazily in [[], ["--restore-lazily"]] {
                let outcome = try bench.run(
                    ["run", "--name", "copy", "--memory", memory, "--serial", "none", "--restore", file] + lazily)
                #expect(outcome.status == .exited(1), "\(file): \(outcome)")
                #expect(outcome.lastErrorLine.contains(file), "\(outcome)")
                for word in words { #expect(outcome.lastErrorLine.contains(word), "\(file): \(outcome)") }
            }
        }
    }

    @Test("godwit stream tells places and marks of a saved file without reading its pages")
    func stream() throws {
        _ = try saved()
        let outcome = try bench.run(["stream", path, "--json"])
        #expect(outcome.status == .exited(0), "\(outcome)")
        let answer = try JSON(parsing: outcome.output.utf8)
        #expect(answer["complete"] == true)
        let block = answer["blocks"]?[0]
        #expect(block?["name"] == "ram" && block?["length"] == JSON(32 << 20))
        // Filled are 16 MiB, besides the guest's own pages and what its start left.
        let marked = block?["marked-pages"]?.integerValue(as: UInt64.self) ?? 0
        #expect((4096...6000).contains(marked))
        #expect(block?["pages-offset"]?.integerValue(as: UInt64.self).map { $0 % (1 << 20) } == 0)
        let text = try bench.run(["stream", path]).output
        #expect(text.contains("mapped-ram") && text.contains("marked") && text.contains("\(marked)"))
        let cut = "\(bench.folder)/cut"
        try Descriptor.create(cut).writeAll(Array(Descriptor.contents(of: path).prefix(8 << 20)))
        let failed = try bench.run(["stream", cut])
        #expect(failed.status == .exited(1) && failed.lastErrorLine.contains("ends inside"), "\(failed)")
    }
}
