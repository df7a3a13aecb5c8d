import Glibc
import Host
import Testing

@testable import Transport

@Suite(.timeLimit(.minutes(10))) struct FileChannelTests {
    @Test("a file round trip keeps what is before the offset, and drops what was after")
    func offset() throws {
        let directory = try Directory()
        let path = directory.file("state")
        let old = try Descriptor.open(path, O_RDWR | O_CREAT)
        try old.writeAll(Array("0123456789".utf8))
        let address = MigrationAddress.file(path: path, offset: 4)
        let out = try Connector().connect(to: address)
        #expect(out.kind == .file && !out.isBidirectional)
        try out.send(Array("ab".utf8))
        try out.finish()
        #expect(try Descriptor.contents(of: path) == Array("0123ab".utf8))
        let into = try Listener(on: address).accept()
        #expect(try into.receive(exactly: 2) == Array("ab".utf8))
        var rest: [UInt8] = []
        #expect(try into.receive(appendingTo: &rest, upTo: 1) == 0)
    }

    @Test("a new file is for its owner only")
    func mode() throws {
        let directory = try Directory()
        let path = directory.file("new")
        try Connector().connect(to: .file(path: path, offset: 0)).finish()
        var status = stat()
        #expect(unsafe stat(path, &status) == 0)
        #expect(status.st_mode & 0o777 == 0o600)
    }

    @Test("a full disk is an error with the path and the cause")
    func full() throws {
        let out = try Connector().connect(to: .file(path: "/dev/full", offset: 0))
        let mapping = try Mapping(anonymousByteCount: 4096)
        var vector = scatteredPages(mapping)
        let error = #expect(throws: ChannelError.self) { try out.send(&vector) }
        #expect(error?.description == "send to file:/dev/full: no space left on device")
    }

    @Test("a missing file, and an offset past the end, are seen when listening starts")
    func missing() throws {
        let directory = try Directory()
        #expect(throws: ChannelError.self) { try Listener(on: .file(path: directory.file("none"), offset: 0)) }
        try Connector().connect(to: .file(path: directory.file("short"), offset: 0)).finish()
        let error = #expect(throws: ChannelError.self) {
            try Listener(on: .file(path: directory.file("short"), offset: 1))
        }
        #expect(error?.description.contains("the offset 1 is past its end at 0") == true)
        #expect(throws: ChannelError.self) { try Connector().connect(to: .file(path: "/dev/null", offset: 1)) }
    }

    @Test("a FIFO waits for its writer, and carries the stream")
    func fifo() throws {
        let directory = try Directory()
        let path = directory.file("fifo")
        #expect(unsafe mkfifo(path, 0o600) == 0)
        let address = MigrationAddress.file(path: path, offset: 0)
        #expect(throws: ChannelError.system(SystemError("open", path, code: ENXIO))) {
            try Connector().connect(to: address)
        }
        let into = try Listener(on: address).accept()
        let reader = try Background { try into.receive(exactly: 3) }
        Clock.sleep(nanoseconds: 50_000_000)
        #expect(!reader.isDone)
        let out = try Connector().connect(to: address)
        try out.send([1, 2, 3])
        #expect(try reader.value() == [1, 2, 3])
    }

    @Test("a file brings one channel")
    func single() throws {
        let listener = try Listener(on: .file(path: "/dev/null", offset: 0))
        _ = try listener.accept()
        #expect(listener.addresses.isEmpty)
        let error = #expect(throws: ChannelError.self) { try listener.accept() }
        #expect(error?.description.contains("one channel only") == true)
    }
}

@Suite(.timeLimit(.minutes(10))) struct CommandChannelTests {
    @Test("a command gets the stream, and finishing waits for its end")
    func success() throws {
        let directory = try Directory()
        let path = directory.file("copy")
        let out = try Connector().connect(to: .command("cat > '\(path)'; sleep 0.1; echo done >> '\(path)'"))
        #expect(out.kind == .command)
        let bytes = [UInt8](repeating: 0x61, count: 3 << 20)
        try out.send(bytes)
        try out.finish()
        #expect(try Descriptor.contents(of: path) == bytes + Array("done\n".utf8))
    }

    @Test("a command that fails is an error with its text and its status")
    func failure() throws {
        let out = try Connector().connect(to: .command("cat > /dev/null; exit 3"))
        try out.send([1])
        let error = #expect(throws: ChannelError.self) { try out.finish() }
        #expect(error == .commandFailed(command: "cat > /dev/null; exit 3", status: .exited(3)))
        #expect(error?.description == "exec:cat > /dev/null; exit 3: the command ended with status 3")
    }

    @Test("a command ended by a signal is an error with the signal")
    func signalled() throws {
        let out = try Connector().connect(to: .command("kill -9 $$"))
        #expect(throws: ChannelError.commandFailed(command: "kill -9 $$", status: .signalled(9))) { try out.finish() }
    }

    @Test("a command that ends before it has read all is an error with its status, not a broken pipe")
    func early() throws {
        let out = try Connector().connect(to: .command("exit 5"))
        #expect(throws: ChannelError.commandFailed(command: "exit 5", status: .exited(5))) {
            try out.send([UInt8](repeating: 0, count: 4 << 20))
        }
    }

    @Test("a command's output is an incoming stream, and its failure is seen")
    func incoming() throws {
        let into = try Listener(on: .command("printf hello")).accept()
        #expect(try into.receive(exactly: 5) == Array("hello".utf8))
        try into.finish()
        let failing = try Listener(on: .command("printf he; exit 4")).accept()
        #expect(throws: ChannelError.commandFailed(command: "printf he; exit 4", status: .exited(4))) {
            try failing.receive(exactly: 5)
        }
    }

    @Test("a command can answer, as a return path needs")
    func answer() throws {
        let out = try Connector().connect(to: .command("cat"))
        #expect(out.isBidirectional)
        try out.send([1, 2, 3])
        #expect(try out.receive(exactly: 3) == [1, 2, 3])
        try out.finish()
    }

    @Test("a command that prints more than a pipe holds, which nobody reads, still ends")
    func chatter() throws {
        let out = try Connector().connect(to: .command("cat > /dev/null; head -c 4000000 /dev/zero"))
        try out.send([1])
        try out.finish()
    }

    @Test("a command that prints more than its stream still ends")
    func trailing() throws {
        let into = try Listener(on: .command("printf hello; head -c 4000000 /dev/zero")).accept()
        #expect(try into.receive(exactly: 5) == Array("hello".utf8))
        try into.finish()
    }

    @Test("a command that does not end is an error after the deadline")
    func endless() throws {
        let out = try Connector().connect(to: .exec(arguments: ["sleep", "60"]))
        let error = #expect(throws: ChannelError.self) { try out.finish(deadline: .after(milliseconds: 100)) }
        #expect(error?.description.hasPrefix("wait for the end of exec:sleep 60: connection timed out") == true)
    }

    @Test("a program that is not there is an error when the channel is opened")
    func noProgram() {
        let error = #expect(throws: ChannelError.self) {
            try Connector().connect(to: .exec(arguments: ["/nonexistent/program"]))
        }
        #expect(error == .system(SystemError("start", "/nonexistent/program", code: ENOENT)))
        #expect(throws: ChannelError.self) { try Connector().connect(to: .exec(arguments: [])) }
    }

    @Test("cancelling ends a send to a command that does not read, and the command")
    func cancel() throws {
        try expectQuickCancel {
            let out = try Connector().connect(to: .exec(arguments: ["sleep", "60"]))
            let child = try #require(out.child)
            let blocked = try Background {
                defer { #expect(child.wait(deadline: .after(seconds: 5)) == .signalled(SIGTERM)) }
                try out.send([UInt8](repeating: 0, count: 4 << 20))
            }
            return (blocked, { out.cancel() })
        }
        try expectQuickCancel {
            let out = try Connector().connect(to: .exec(arguments: ["sleep", "60"]))
            return (try Background { try out.finish() }, { out.cancel() })
        }
    }

    @Test("a command whose channel is dropped is ended and waited for")
    func dropped() throws {
        var out: Channel? = try Connector().connect(to: .exec(arguments: ["sleep", "60"]))
        let child = try #require(out?.child)
        out = nil
        #expect(child.wait(deadline: .after(seconds: 5)) == .signalled(SIGTERM))
    }
}
