import Glibc
import Host
import Synchronization
import Testing

@Suite struct MappingTests {
    @Test("a single set byte anywhere is seen, at any alignment", arguments: [0, 1, 7, 8, 255, 256, 4095])
    func isZero(position: Int) throws {
        let mapping = try Mapping(anonymousByteCount: 8192)
        #expect(mapping.isZero(at: 0, count: 4096))
        mapping.store(UInt8(1), at: position)
        #expect(!mapping.isZero(at: 0, count: 4096))
        #expect(mapping.isZero(at: position + 1, count: 8192 - position - 1))
        #expect(mapping.isZero(at: 0, count: position))
    }

    @Test("an access outside a mapping ends the process instead of reading elsewhere")
    func bounds() async {
        await #expect(processExitsWith: .failure) {
            let mapping = try Mapping(anonymousByteCount: 4096)
            _ = mapping.load(at: 4090, as: UInt64.self)
        }
    }
}

@Suite struct IOVectorTests {
    @Test("a gathering write and a scattering read carry every byte, across partial transfers")
    func transfer() throws {
        let source = try Mapping(anonymousByteCount: 1 << 20)
        for page in 0..<256 { source.store(UInt64(page) &* 0x9E37_79B9, at: page * 4096 + 8) }
        let target = try Mapping(anonymousByteCount: 1 << 20)
        let (a, b) = try Socket.pair()
        let writer = try HostThread(name: "writer") {
            var vector = IOVector()
            for page in stride(from: 255, through: 0, by: -1) {
                vector.append(source, offset: page * 4096, count: 4096)
            }
            while vector.byteCount > 0 { _ = try? a.write(&vector) }
        }
        var vector = IOVector()
        for page in stride(from: 255, through: 0, by: -1) { vector.append(target, offset: page * 4096, count: 4096) }
        while vector.byteCount > 0 { #expect(try b.read(&vector)! > 0) }
        writer.join()
        #expect(source.read(at: 0, count: 1 << 20) == target.read(at: 0, count: 1 << 20))
    }

    @Test("ranges that touch become one entry")
    func joining() throws {
        let mapping = try Mapping(anonymousByteCount: 1 << 20)
        var vector = IOVector()
        for page in 0..<256 { vector.append(mapping, offset: page * 4096, count: 4096) }
        #expect(vector.entryCount == 1)
        #expect(vector.byteCount == 1 << 20)
    }

    @Test("a vector taken apart carries the same bytes in the same order", arguments: [1, 100, 4096, 5000, 1 << 20])
    func prefixes(count: Int) throws {
        let mapping = try Mapping(anonymousByteCount: 64 << 10)
        for word in 0..<8192 { mapping.store(UInt64(word), at: word * 8) }
        func gathered(_ vector: inout IOVector) -> [UInt8] {
            var bytes = [UInt8](repeating: 0, count: vector.byteCount)
            _ = unsafe bytes.withUnsafeMutableBytes { unsafe vector.gather(into: $0) }
            return bytes
        }
        func whole() -> IOVector {
            var vector = IOVector()
            for offset in [40960, 8192, 0] { vector.append(mapping, offset: offset, count: 7000) }
            return vector
        }
        var (vector, pieces) = (whole(), [UInt8]())
        while vector.byteCount > 0 {
            let before = vector.byteCount
            var prefix = vector.removePrefix(count)
            #expect(prefix.byteCount == min(count, before) && vector.byteCount == before - prefix.byteCount)
            pieces += gathered(&prefix)
        }
        var all = whole()
        #expect(pieces == gathered(&all))
    }
}

@Suite struct DirectFileTests {
    @Test("a file that is opened past the page cache is the one that is open, though its path leads to another by now")
    func replaced() throws {
        let path = "/tmp/godwit-test-\(getpid())-direct"
        let other = path + "-other"
        defer { for name in [path, other] { Descriptor.remove(name) } }
        for (name, byte) in [(path, 1), (other, 2)] as [(String, UInt8)] {
            try Descriptor.create(name).writeAll([UInt8](repeating: byte, count: 4096))
        }
        let file = try Descriptor.open(path, O_RDONLY)
        try FilePath.rename(other, to: path)
        let direct: Descriptor
        do throws(SystemError) { direct = try file.openedDirect(writing: false) } catch {
            // Where the file system cannot, that is said of the file and not of what stands for it.
            #expect(error.code == EINVAL && error.object == path && error.description.contains("direct-io"))
            return
        }
        let page = try Mapping(anonymousByteCount: 4096)
        var vector = IOVector()
        vector.append(page, offset: 0, count: 4096)
        try direct.readAll(&vector, at: 0)
        #expect(page.load(at: 0, as: UInt8.self) == 1)
        #expect(direct.name == path)
    }
}

@Suite struct SocketTests {
    @Test("a path with a zero byte is refused, and names no other file")
    func zeroByte() {
        #expect(throws: SystemError.self) { try Descriptor.open("/dev/null\0x", 0) }
    }

    @Test("a wait ends at its deadline with a sentence that names the object")
    func deadline() throws {
        let (a, _b) = try Socket.pair()
        let error = #expect(throws: SystemError.self) {
            try a.wait(for: .readable, deadline: .after(milliseconds: 20), operation: "read")
        }
        #expect(error?.description == "read socket pair: connection timed out")
        _ = _b
    }

    @Test("connecting to a closed port names the address and the cause")
    func refused() throws {
        let listener = try Socket.listen(host: "127.0.0.1", port: "0")
        let port = try #require(Socket.localPort(of: listener))
        Socket.shutdown(listener)
        let error = #expect(throws: SystemError.self) {
            _ = try Socket.connect(host: "127.0.0.1", port: "\(port)", deadline: .after(seconds: 5))
        }
        #expect(error?.description == "connect to tcp:127.0.0.1:\(port): connection refused")
    }

    @Test("a descriptor sent over a unix socket arrives and works")
    func passing() throws {
        let (a, b) = try Socket.pair()
        let pipe = try Descriptor.pipe()
        #expect(try Socket.send(a, [42], passing: pipe.write) == 1)
        let message = try #require(try Socket.receive(b, upTo: 16))
        #expect(message.bytes == [42])
        _ = try #require(message.passed).write([7])
        #expect(try pipe.read.read(upTo: 4) == [7])
    }
}

@Suite struct ThreadTests {
    @Test("a thread runs its body under its name and can be joined")
    func naming() throws {
        let name = Mutex("")
        let thread = try HostThread(name: "reaper") {
            let bytes = (try? Descriptor.contents(of: "/proc/thread-self/comm")) ?? []
            name.withLock { $0 = String(decoding: bytes, as: UTF8.self) }
        }
        thread.join()
        #expect(name.withLock { $0 } == "reaper\n")
        #expect(thread.identifier > 0)
    }

    @Test("a thread in a hurry, where the host allows it, is so until it is calmed, and alone")
    func haste() throws {
        let isOver = Monitor(false)
        let thread = try HostThread(name: "hasty") { isOver.wait { $0 ? () : nil } }
        defer {
            isOver.withLock { $0 = true }
            thread.join()
        }
        let before = thread.niceness
        guard let told = thread.hasten() else { return #expect(thread.niceness == before) }
        #expect(told == before && thread.niceness < before)
        #expect(getpriority(Int32(PRIO_PROCESS.rawValue), 0) > thread.niceness)
        #expect(thread.hasten() == nil)
        thread.calm(to: told)
        #expect(thread.niceness == before)
        // Changed by somebody else meanwhile: that stays.
        _ = thread.hasten()
        #expect(setpriority(Int32(PRIO_PROCESS.rawValue), id_t(thread.identifier), 5) == 0)
        thread.calm(to: told)
        #expect(thread.niceness == 5)
    }
}

@Suite struct InterruptTests {
    @Test("an interrupt reaches a thread whose creator blocks the signal")
    func blocked() async {
        await #expect(processExitsWith: .success) {
            try HostThread.installInterruptSignal()
            var signals = sigset_t()
            unsafe sigemptyset(&signals)
            unsafe sigaddset(&signals, HostThread.interruptSignal)
            unsafe pthread_sigmask(SIG_BLOCK, &signals, nil)
            let result = Mutex<CInt>(0)
            let (reader, writer) = try Descriptor.pipe()
            let thread = try HostThread(name: "reader") {
                var byte: UInt8 = 0
                // SAFETY: one byte into a local byte.
                let count = unsafe Glibc.read(reader.number, &byte, 1)
                result.withLock { $0 = count < 0 ? errno : 0 }
            }
            // The thread may not have reached its read yet: again until it has ended.
            for _ in 0..<2000 where result.withLock({ $0 }) == 0 {
                thread.interrupt()
                Clock.sleep(nanoseconds: 5_000_000)
            }
            guard result.withLock({ $0 }) == EINTR else { _exit(1) }
            withExtendedLifetime(writer) {}
        }
    }

    @Test("threads that nobody joins leave no stack behind when they end")
    func stacks() async {
        await #expect(processExitsWith: .success) {
            func mappedKiB() throws -> Int {
                let status = String(decoding: try Descriptor.contents(of: "/proc/self/status"), as: UTF8.self)
                let line = status.split(separator: "\n").first { $0.hasPrefix("VmSize:") }
                return line.flatMap { Int($0.split { !$0.isNumber }.joined()) } ?? 0
            }
            func startMany() throws {
                for _ in 0..<200 {
                    let ended = Monitor(false)
                    _ = try HostThread(name: "short") { ended.withLock { $0 = true } }
                    ended.wait { $0 ? () : nil }
                    Clock.sleep(nanoseconds: 200_000)
                }
            }
            try startMany()
            let before = try mappedKiB()
            try startMany()
            // 200 stacks of 1 MiB, had they stayed.
            guard try mappedKiB() - before < 100 << 10 else { _exit(1) }
        }
    }
}

@Suite struct ChildProcessTests {
    @Test("exit status and signals are told apart")
    func status() throws {
        #expect(try ChildProcess(["/bin/sh", "-c", "exit 3"]).wait(deadline: .after(seconds: 10)) == .exited(3))
        let sleeper = try ChildProcess(["/bin/sleep", "60"])
        #expect(sleeper.poll() == nil)
        #expect(sleeper.end() == .signalled(15))
    }

    @Test("a program that does not exist is an error that names it")
    func missing() {
        let error = #expect(throws: SystemError.self) { _ = try ChildProcess(["/nonexistent/program"]) }
        #expect(error?.description == "start /nonexistent/program: no such file or directory")
    }
}

@Suite struct ResidentPrefixTests {
    @Test(
        "the prefix ends at the first page that is not there, however far away",
        arguments: [0, 1, 31, 32, 33, 300, 20_000])
    func ends(pages: Int) throws {
        let file = try MemoryFile(name: "test", byteCount: 100 << 20)
        let mapping = try Mapping(file.descriptor, byteCount: 100 << 20)
        for page in 0..<pages { mapping.store(UInt8(1), at: (5 + page) * 4096) }
        #expect(try mapping.residentPrefix(at: 5 * 4096, count: 90 << 20) == pages * 4096)
        #expect(try mapping.residentPrefix(at: 5 * 4096, count: min(pages, 10) * 4096) == min(pages, 10) * 4096)
    }
}
