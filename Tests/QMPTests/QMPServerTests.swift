import Glibc
import Host
import Synchronization
import Testing

@testable import QMP

/// A server on a socket of its own in /tmp, and what its tests hold on to.
final class Monitored: Sendable {
    let server: QMPServer
    let path: String
    /// `block` waits until this is opened.
    let gate = Monitor(false)
    let began = Monitor(0)

    init(
        _ commands: [Command] = [], policy: PeerPolicy = PeerPolicy(), limits: ClientConnection.Limits = .init()
    ) throws {
        path = "/tmp/godwit-qmp-test-\(getpid())-\(UInt32.random(in: 0 ... .max)).sock"
        let block = Command("block") { [gate, began] _ in
            began.withLock { $0 += 1 }
            gate.wait(deadline: .after(seconds: 30)) { $0 ? true : nil }
            return "done"
        }
        let quick = Command("quick", allowsOutOfBand: true) { .bool($0.isOutOfBand) }
        let echo = Command("echo", [.required("value", .any)]) { $0.arguments["value"] ?? .null }
        server = try QMPServer(
            sockets: [ControlSocket(path: path)], table: CommandTable(commands: [block, quick, echo] + commands),
            policy: policy, limits: limits)
    }

    func open() { gate.withLock { $0 = true } }

    func waitUntilBlocked() { began.wait(deadline: .after(seconds: 10)) { $0 > 0 ? true : nil } }

    deinit {
        gate.withLock { $0 = true }
        server.stop()
    }
}

/// A connection without any knowledge of QMP: sends bytes, reads lines.
struct RawClient {
    let socket: Descriptor
    private var buffer: [UInt8] = []

    init(path: String, negotiating: Bool = true) throws {
        socket = try Socket.connect(unix: path)
        try Socket.setReceiveTimeout(socket, milliseconds: 10_000)
        try Socket.setSendTimeout(socket, milliseconds: 10_000)
        if negotiating {
            _ = try line()
            try send("{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\"]}}\n")
            #expect(try line() == ["return": [:]])
        }
    }

    func send(_ text: String) throws { try socket.writeAll(Array(text.utf8)) }

    /// The next line; `nil` at the end of the connection.
    mutating func line() throws -> JSON? {
        while true {
            if let end = buffer.firstIndex(of: 0x0A) {
                let line = buffer[..<end]
                buffer.removeSubrange(...end)
                return try JSON(parsing: line)
            }
            guard let bytes = try socket.read(upTo: 1 << 16) else {
                throw SystemError("read a line from", socket.name, code: ETIMEDOUT)
            }
            if bytes.isEmpty { return nil }
            buffer += bytes
        }
    }
}

@Suite(.timeLimit(.minutes(10))) struct QMPServerTests {
    @Test("the greeting offers oob, and nothing but negotiation is heard before it")
    func negotiation() throws {
        let vm = try Monitored()
        var client = try RawClient(path: vm.path, negotiating: false)
        let greeting = try client.line()
        #expect(greeting?["QMP"]?["capabilities"] == ["oob"])
        #expect(greeting?["QMP"]?["version"]?["qemu"]?["major"]?.integerValue() == 7)
        try client.send("{\"execute\":\"query-version\",\"id\":1}\n{\"execute\":\"qmp_capabilities\",\"id\":2}\n")
        #expect(try client.line()?["error"]?["class"] == "CommandNotFound")
        #expect(try client.line() == ["return": [:], "id": 2])
        try client.send("{\"execute\":\"query-version\",\"id\":3}\n{\"exec-oob\":\"quick\",\"id\":4}\n")
        #expect(try client.line()?["return"]?["package"] == "Godwit")
        #expect(try client.line()?["error"]?["desc"] == "QMP input member 'exec-oob' is unexpected")
    }

    @Test(
        "an id of any type comes back as it was",
        arguments: ["7", "\"a\"", "null", "{\"x\":[1,{}]}", "18446744073709551615", "-1.5", "true"])
    func identifiers(text: String) throws {
        let vm = try Monitored()
        var client = try RawClient(path: vm.path)
        try client.send("{\"execute\":\"quick\",\"id\":\(text)} {\"execute\":\"nope\",\"id\":\(text)}")
        #expect(try client.line() == ["return": false, "id": JSON(parsing: text.utf8)])
        let failure = try client.line()
        #expect(failure?["id"] == (try JSON(parsing: text.utf8)))
        #expect(failure?["error"]?["desc"] == "The command nope has not been found")
    }

    @Test("an out-of-band command overtakes a blocked in-band one of the same client; in-band ones wait their turn")
    func outOfBand() throws {
        let vm = try Monitored()
        var client = try RawClient(path: vm.path)
        try client.send("{\"execute\":\"block\",\"id\":1}{\"execute\":\"quick\",\"id\":2}")
        vm.waitUntilBlocked()
        try client.send("{\"exec-oob\":\"quick\",\"id\":3}{\"exec-oob\":\"block\",\"id\":4}")
        #expect(try client.line() == ["return": true, "id": 3])
        #expect(try client.line()?["error"]?["desc"] == "The command block does not support OOB")
        vm.open()
        #expect(try client.line() == ["return": "done", "id": 1])
        #expect(try client.line() == ["return": false, "id": 2])
    }

    @Test("a client is served while another's command blocks")
    func severalClients() throws {
        let vm = try Monitored()
        var slow = try RawClient(path: vm.path)
        try slow.send("{\"execute\":\"block\"}")
        vm.waitUntilBlocked()
        for number in 0..<8 {
            var client = try RawClient(path: vm.path)
            try client.send("{\"execute\":\"echo\",\"arguments\":{\"value\":\(number)}}")
            #expect(try client.line() == ["return": JSON(number)])
        }
        vm.open()
        #expect(try slow.line() == ["return": "done"])
    }

    @Test("pipelined requests are answered in order, more than the queue holds at once")
    func pipelining() throws {
        let vm = try Monitored()
        var client = try RawClient(path: vm.path)
        let requests = (0..<300).map { "{\"execute\":\"echo\",\"arguments\":{\"value\":\($0)},\"id\":\($0)}" }
        try client.send(requests.joined())
        for number in 0..<300 { #expect(try client.line() == ["return": JSON(number), "id": JSON(number)]) }
    }

    @Test("malformed lines are answered, and the connection goes on")
    func malformed() throws {
        let vm = try Monitored()
        var client = try RawClient(path: vm.path)
        for line in ["{\"execute\": foo}", "}", "{\"execute\": \"quick\"]", "\u{1}", "{\"a\": \"b", "[1,,2]"] {
            try client.send(line + "\n")
            let words = try client.line()?["error"]?["desc"]?.stringValue ?? ""
            #expect(words.hasPrefix("JSON parse error, "), "\(line): \(words)")
        }
        try client.send("{\"execute\":\"quick\",\"id\":1}\n")
        #expect(try client.line() == ["return": false, "id": 1])
    }

    @Test("a message beyond the limit gets a sentence and the connection ends; the server lives")
    func tooLarge() throws {
        let vm = try Monitored()
        var client = try RawClient(path: vm.path)
        let chunk = [UInt8](repeating: UInt8(ascii: "a"), count: 1 << 20)
        try client.send("{\"execute\":\"")
        for _ in 0..<5 { try? client.socket.writeAll(chunk) }
        #expect(
            try client.line()?["error"]?["desc"] == "The message is longer than 4194304 bytes; the connection is closed"
        )
        // The end may come as a reset, because the server leaves bytes of ours unread.
        let end = Result { try client.line() }
        if case .failure(let error as SystemError) = end { #expect(error.code == ECONNRESET) }
        #expect((try? end.get()) == nil)
        var next = try RawClient(path: vm.path)
        try next.send("{\"execute\":\"quick\"}")
        #expect(try next.line() == ["return": false])
    }

    @Test("events reach every negotiated client in one order, between the replies as they happened")
    func events() throws {
        let box = Mutex<QMPServer?>(nil)
        let stop = Command("stop") { _ in
            box.withLock { $0 }?.post("STOP")
            return [:]
        }
        let vm = try Monitored([stop])
        box.withLock { $0 = vm.server }
        var silent = try RawClient(path: vm.path, negotiating: false)
        var clients = try (0..<3).map { _ in try RawClient(path: vm.path) }
        vm.server.post("MIGRATION", data: ["status": "setup"])
        try clients[0].send("{\"execute\":\"stop\",\"id\":1}")
        for index in clients.indices {
            let first = try clients[index].line()
            #expect(first?["event"] == "MIGRATION")
            #expect(first?["data"] == ["status": "setup"])
            let seconds = first?["timestamp"]?["seconds"]?.integerValue(as: Int.self) ?? 0
            #expect(abs(seconds - time(nil)) <= 60)
            #expect(try clients[index].line()?["event"] == "STOP")
        }
        #expect(try clients[0].line() == ["return": [:], "id": 1])
        #expect(try silent.line()?["QMP"] != nil)
        try silent.send("{\"execute\":\"qmp_capabilities\"}")
        #expect(try silent.line() == ["return": [:]])
        box.withLock { $0 = nil }
    }

    @Test("a client that never reads is cut off, and holds up neither events nor other clients")
    func neverReads() throws {
        var limits = ClientConnection.Limits()
        limits.stallNanoseconds = 2_000_000_000
        let vm = try Monitored(limits: limits)
        let deaf = try RawClient(path: vm.path)
        let heard = Atomic(0)
        let listener = try QMPClient(path: vm.path, onEvent: { _ in heard.add(1, ordering: .relaxed) })
        let filler = JSON.string(String(repeating: "x", count: 10_000))
        let start = Clock.monotonicNanoseconds
        for _ in 0..<100 { vm.server.post("FILL", data: ["filler": filler]) }
        #expect(Clock.monotonicNanoseconds - start < 5_000_000_000)
        #expect(try listener.execute("quick") == false)
        vm.server.post("LAST")
        try listener.waitForEvent("LAST", deadline: .after(seconds: 10))
        #expect(heard.load(ordering: .relaxed) == 101)
        // Cut off: what the kernel had buffered can be read, then the connection ends before the last event.
        try deaf.socket.wait(for: [], deadline: .after(seconds: 20), operation: "wait to be cut off on")
        let received = try deaf.socket.readAll()
        #expect(!String(decoding: received, as: UTF8.self).contains("LAST"))
    }

    @Test("a peer of another user gets a sentence and no monitor")
    func otherUser() throws {
        #expect(PeerPolicy(ownerUserID: 1000).refusal(ofUserID: 1000) == nil)
        #expect(PeerPolicy(ownerUserID: 1000).refusal(ofUserID: 0) == nil)
        #expect(PeerPolicy(ownerUserID: 1000).refusal(ofUserID: 1001) != nil)
        let stranger = PeerPolicy(ownerUserID: Account.effectiveUserID &+ 1, admitsRoot: false)
        let vm = try Monitored(policy: stranger)
        let error = #expect(throws: QMPClientError.self) { try QMPClient(path: vm.path) }
        #expect(error?.description.contains("may not command this VM") == true)
    }

    @Test("a passed descriptor reaches the command that takes it, and no other")
    func descriptors() throws {
        let getfd = Command("getfd", [.required("fdname", .string)]) { call in
            guard let file = call.takeDescriptor() else {
                throw QMPError("No file descriptor supplied via SCM_RIGHTS")
            }
            try file.writeAll(Array("written".utf8))
            return [:]
        }
        let vm = try Monitored([getfd])
        let client = try QMPClient(path: vm.path)
        let pipe = try Descriptor.pipe()
        try client.execute("quick", passing: pipe.write)
        try client.execute("getfd", ["fdname": "a"])
        #expect(try pipe.read.read(upTo: 100) == Array("written".utf8))
        #expect(throws: QMPClientError.refused(QMPError("No file descriptor supplied via SCM_RIGHTS"))) {
            try client.execute("getfd", ["fdname": "a"])
        }
    }

    @Test("stopping lets a running command answer, ends the connections and removes the socket")
    func stopping() throws {
        let vm = try Monitored()
        var client = try RawClient(path: vm.path)
        try client.send("{\"execute\":\"block\"}")
        vm.waitUntilBlocked()
        let start = Clock.monotonicNanoseconds
        let stopper = try HostThread(name: "stopper") { vm.server.stop(deadline: .after(seconds: 10)) }
        Clock.sleep(nanoseconds: 50_000_000)
        vm.open()
        #expect(try client.line() == ["return": "done"])
        #expect(try client.line() == nil)
        stopper.join()
        #expect(Clock.monotonicNanoseconds - start < 5_000_000_000, "nothing was left to wait for")
        #expect(try FileSystem.status(of: vm.path) == nil)
        #expect(throws: QMPClientError.self) { try QMPClient(path: vm.path) }
    }
}
