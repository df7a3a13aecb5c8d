import Glibc
import Host
import Testing

@testable import Transport

@Suite(.timeLimit(.minutes(10))) struct ConnectionTests {
    @Test("a TCP port chosen by the kernel is reported, and carries both directions", arguments: ["127.0.0.1", "::1"])
    func tcp(host: String) throws {
        let listener = try Listener(on: .tcp(host: host, port: "0"))
        guard case .inet(host, let port) = listener.addresses.first, port != "0" else {
            Issue.record("bound to \(listener.addresses)")
            return
        }
        let a = try Connector().connect(to: .tcp(host: host, port: port), deadline: .after(seconds: 5))
        let b = try listener.accept(deadline: .after(seconds: 5))
        #expect(a.peer == MigrationAddress.tcp(host: host, port: port).description)
        #expect(b.peer.hasPrefix(host == "::1" ? "tcp:[::1]:" : "tcp:127.0.0.1:"))
        try a.send([1])
        try b.send([2])
        #expect(try b.receive(exactly: 1) == [1])
        #expect(try a.receive(exactly: 1) == [2])
    }

    @Test("an empty host listens on all addresses with one port")
    func allAddresses() throws {
        let listener = try Listener(on: .tcp(host: "", port: "0"), allowsPlaintext: true)
        let ports = listener.addresses.map { address in
            guard case .inet(_, let port) = address else { return "" }
            return port
        }
        #expect(Set(ports).count == 1)
        for host in ["127.0.0.1", "::1"].prefix(listener.addresses.count) {
            let out = try Connector().connect(to: .tcp(host: host, port: ports[0]), deadline: .after(seconds: 5))
            try out.send([7])
            #expect(try listener.accept(deadline: .after(seconds: 5)).receive(exactly: 1) == [7])
        }
    }

    @Test("a TCP port in use is told in a sentence")
    func portInUse() throws {
        let first = try Listener(on: .tcp(host: "127.0.0.1", port: "0"))
        guard case .inet(_, let port) = first.addresses.first else { return }
        let error = #expect(throws: ChannelError.self) { try Listener(on: .tcp(host: "127.0.0.1", port: port)) }
        #expect(
            error?.description == "listen on tcp:127.0.0.1:\(port): address already in use; "
                + "another socket listens on that port; choose another port, or 0 for one the kernel chooses")
        first.close()
        withExtendedLifetime(first) {
            #expect(throws: Never.self) { try Listener(on: .tcp(host: "127.0.0.1", port: port)) }
        }
    }

    @Test("a unix socket is for its owner only, brings several channels, and is removed at the close")
    func unixSocket() throws {
        let directory = try Directory()
        let path = directory.file("m.sock")
        let listener = try Listener(on: .unix(path: path))
        #expect(listener.addresses == [.unix(path: path)])
        var status = stat()
        #expect(unsafe stat(path, &status) == 0 && status.st_mode & 0o777 == 0o600)
        for number in 0..<3 as Range<UInt8> {
            let out = try Connector().connect(to: .unix(path: path))
            try out.send([number])
            let into = try listener.accept()
            #expect(into.peer == "unix:\(path)")
            #expect(try into.receive(exactly: 1) == [number])
        }
        let error = #expect(throws: ChannelError.self) { try Listener(on: .unix(path: path)) }
        #expect(error?.description.hasSuffix("remove the file if nothing listens on it any more") == true)
        #expect(FileIdentity(path: path) != nil, "who could not listen removes nothing")
        listener.close()
        #expect(FileIdentity(path: path) == nil)
        #expect(throws: ChannelError.cancelled) { try listener.accept() }
    }

    @Test("a socket file another process put in place of ours is left alone")
    func replaced() throws {
        let directory = try Directory()
        let path = directory.file("m.sock")
        let first = try Listener(on: .unix(path: path))
        #expect(unsafe unlink(path) == 0)
        let second = try Listener(on: .unix(path: path))
        first.close()
        #expect(try Connector().connect(to: .unix(path: path)).kind == .socket)
        second.close()
    }

    @Test("what is not there to connect to is named", arguments: ["tcp:127.0.0.1:1", "unix:/nonexistent/socket"])
    func refused(uri: String) throws {
        let error = #expect(throws: ChannelError.self) { try Connector().connect(to: MigrationAddress(uri)) }
        #expect(error?.description.hasPrefix("connect to \(uri): ") == true)
    }

    @Test("a unix path too long for the kernel, and a host without an address, are refused")
    func unusable() {
        #expect(throws: ChannelError.self) {
            try Listener(on: .unix(path: "/" + String(repeating: "x", count: 107)))
        }
        #expect(throws: ChannelError.self) { try Connector().connect(to: .tcp(host: "host.invalid", port: "1")) }
    }

    // MARK: Waiting

    /// A unix listener whose queue is full: a further connect has to wait.
    private func crowded(_ directory: Directory) throws -> (Descriptor, [Channel], MigrationAddress) {
        let path = directory.file("full.sock")
        let socket = try Socket.listen(on: .unix(path: path), name: "full")
        _ = listen(socket.number, 0)
        let address = MigrationAddress.unix(path: path)
        return (socket, [try Connector().connect(to: address)], address)
    }

    @Test("cancelling ends a blocked connect")
    func cancelConnect() throws {
        let directory = try Directory()
        let (socket, channels, address) = try crowded(directory)
        try expectQuickCancel {
            let token = try CancelToken()
            let blocked = try Background { _ = try Connector().connect(to: address, cancel: token) }
            return (blocked, { token.cancel() })
        }
        let error = #expect(throws: ChannelError.self) {
            try Connector().connect(to: address, deadline: .after(milliseconds: 50))
        }
        #expect(error == .system(SystemError("connect to", "\(address)", code: ETIMEDOUT)))
        withExtendedLifetime((socket, channels)) {}
    }

    @Test("cancelling, and closing, end a blocked accept")
    func cancelAccept() throws {
        try expectQuickCancel {
            let listener = try Listener(on: .tcp(host: "127.0.0.1", port: "0"))
            let token = try CancelToken()
            return (try Background { _ = try listener.accept(cancel: token) }, { token.cancel() })
        }
        try expectQuickCancel {
            let listener = try Listener(on: .tcp(host: "127.0.0.1", port: "0"))
            return (try Background { _ = try listener.accept() }, { listener.close() })
        }
    }

    @Test("an accept ends at its deadline")
    func acceptDeadline() throws {
        let listener = try Listener(on: .tcp(host: "127.0.0.1", port: "0"))
        let error = #expect(throws: ChannelError.self) { try listener.accept(deadline: .after(milliseconds: 50)) }
        #expect(error == .system(SystemError("accept on", "tcp:127.0.0.1:0", code: ETIMEDOUT)))
    }

    @Test("a token cancelled before ends connect and accept at once")
    func cancelledBefore() throws {
        let token = try CancelToken()
        token.cancel()
        let listener = try Listener(on: .tcp(host: "127.0.0.1", port: "0"))
        #expect(throws: ChannelError.cancelled) { try listener.accept(cancel: token) }
        #expect(throws: ChannelError.cancelled) { try Connector().connect(to: .command("true"), cancel: token) }
    }

    // MARK: fd:

    /// A descriptor's number which nobody owns, as if inherited.
    private func released(_ descriptor: Descriptor) -> CInt { fcntl(descriptor.number, F_DUPFD_CLOEXEC, 0) }

    @Test("a connected socket is taken by its number, also when it is non-blocking")
    func number() throws {
        let (a, b) = try Socket.pair()
        try a.setNonBlocking(true)
        let out = try Connector().connect(to: .descriptor("\(released(a))"))
        let listener = try Listener(on: .descriptor("\(released(b))"))
        let into = try listener.accept()
        #expect(out.isBidirectional && into.isBidirectional)
        let reader = try Background { try out.receive(exactly: 1) }
        Clock.sleep(nanoseconds: 20_000_000)
        try into.send([8])
        #expect(try reader.value() == [8])
        #expect(throws: ChannelError.self) { try listener.accept() }
    }

    @Test("a listening socket is taken by a name that getfd was given, and says where it listens")
    func name() throws {
        let socket = try Socket.listen(host: "127.0.0.1", port: "0")
        let port = try #require(Socket.localPort(of: socket))
        let listener = try Listener(on: .descriptor("door")) { $0 == "door" ? socket : nil }
        #expect(listener.addresses == [.inet(host: "127.0.0.1", port: "\(port)")])
        let out = try Connector().connect(to: .tcp(host: "127.0.0.1", port: "\(port)"))
        try out.send([3])
        #expect(try listener.accept().receive(exactly: 1) == [3])
    }

    @Test("a descriptor that does not exist, or goes the wrong way, is refused in a sentence")
    func badDescriptors() throws {
        let (read, write) = try Descriptor.pipe()
        let names: DescriptorResolver = { ["r": read, "w": write][$0] }
        let connector = Connector(descriptors: names)
        #expect(throws: ChannelError.unusable("pipe is open for reading only; a migration out writes to it")) {
            try connector.connect(to: .descriptor("r"))
        }
        #expect(throws: ChannelError.unusable("pipe is open for writing only; a migration in reads from it")) {
            try Listener(on: .descriptor("w"), descriptors: names)
        }
        let unknown = #expect(throws: ChannelError.self) { try connector.connect(to: .descriptor("x")) }
        #expect(unknown?.description.contains("no descriptor has that name") == true)
        let closed = #expect(throws: ChannelError.self) { try connector.connect(to: .descriptor("999999")) }
        #expect(
            closed?.description == "use fd:999999: bad file descriptor; it is not open in this process")
        #expect(throws: ChannelError.self) { try connector.connect(to: .descriptor("7x")) }
    }

    @Test("a file given by descriptor is written from where it stands")
    func fileDescriptor() throws {
        let directory = try Directory()
        let file = try Descriptor.open(directory.file("f"), O_RDWR | O_CREAT)
        try file.writeAll([1, 2, 3, 4])
        try file.seek(to: 2)
        let out = try Connector(descriptors: { _ in file }).connect(to: .descriptor("state"))
        #expect(out.kind == .file)
        try out.send([9])
        try out.finish()
        #expect(try Descriptor.contents(of: directory.file("f")) == [1, 2, 9, 4])
    }
}
