import GuestMemory
import Host
import Machine
import Migration
import Testing
import Transport

@testable import QMP

@Suite(.timeLimit(.minutes(10))) struct MigrationCommandTests {
    @Test("a migration from one monitor to another: states, events, numbers, and who may run afterwards")
    func wholeWay() throws {
        let source = try MonitoredMachine()
        let destination = try MonitoredMachine(incoming: true)
        #expect(try source.run("query-migrate") == [:])
        #expect(try destination.run("query-migrate") == [:])
        let content = (0..<8192).map { UInt8(truncatingIfNeeded: $0 / 3) }
        try source.write(content, at: 1 << 20)
        try source.run("cont")
        let uri = try destination.listen()
        #expect(try destination.run("query-migrate").objectValue?.keys.sorted() == ["socket-address"])
        try source.run("migrate", ["uri": .string(uri)])
        try source.status(.completed)
        try destination.status(.completed)
        #expect(try destination.machine.memory.read(at: .init(1 << 20), count: content.count) == content)
        #expect(try source.run("query-status")["status"] == "postmigrate")
        #expect(try destination.run("query-status")["status"] == "running")
        #expect(try source.refusal("cont").contains("must not run twice"))
        #expect(try source.refusal("migrate", ["uri": .string(uri)]).contains("already handed over"))
        checkNumbers(try source.run("query-migrate"))
        checkSourceEvents(source.eventNames)
        #expect(
            destination.eventNames
                == ["MIGRATION setup", "MIGRATION active", "RESUME", "MIGRATION completed"])
    }

    private func checkNumbers(_ info: JSON) {
        let parts = info["x-downtime-parts"]?.arrayValue ?? []
        let total = info["x-downtime-ns"]?.integerValue(as: UInt64.self) ?? 0
        #expect(!parts.isEmpty)
        #expect(parts.compactMap { $0["nanoseconds"]?.integerValue(as: UInt64.self) }.reduce(0, +) == total)
        #expect(info["downtime"] == JSON(total / 1_000_000))
        #expect(info["expected-downtime"] == nil)
        #expect(info["error-desc"] == nil)
        #expect(info["x-handover"] == "two-phase")
        #expect(info["ram"]?["total"] == JSON(16 << 20))
        #expect(info["ram"]?["remaining"] == 0)
        #expect(info["ram"]?["page-size"] == 4096)
        // 2 pages were written, all others are holes.
        let holes = info["ram"]?["x-hole"]?.integerValue(as: Int.self) ?? 0
        // Each of the two pages may have come with a huge page around it.
        #expect((4096 - 2 * 512...4094).contains(holes))
    }

    /// QEMU's order, but for the pass that follows the last status.
    private func checkSourceEvents(_ events: [String]) {
        func place(_ name: String) -> Int { events.firstIndex(of: name) ?? -1 }
        #expect(events.first == "RESUME")
        #expect(place("MIGRATION setup") == 1)
        #expect(place("MIGRATION active") > 1)
        #expect(place("STOP") > place("MIGRATION active"))
        #expect(place("MIGRATION_PASS 1") > 0 && place("MIGRATION_PASS 1") < place("STOP"))
        #expect(events[place("STOP")...].contains { $0.hasPrefix("MIGRATION_PASS") })
        #expect(events.last == "MIGRATION completed")
        #expect(events.filter { $0 == "STOP" }.count == 1)
    }

    @Test("a destination that nobody listens at: the migration fails with the address, and the guest runs on")
    func refusedConnection() throws {
        let vm = try MonitoredMachine()
        try vm.run("cont")
        try vm.run("migrate", ["uri": "unix:/no/such/socket"])
        try vm.status(.failed)
        let info = try vm.run("query-migrate")
        #expect(info["error-desc"]?.stringValue?.contains("/no/such/socket") == true)
        #expect(try vm.run("query-status")["running"] == true)
        #expect(vm.eventNames == ["RESUME", "MIGRATION setup", "MIGRATION failed"])
        #expect(try vm.human("info migrate").hasPrefix("Migration status: failed ("))
    }

    @Test("without the capability events QMP's clients hear nothing of a migration; the process itself does")
    func eventsOff() throws {
        let vm = try MonitoredMachine()
        let heard = Monitor<[MigrationStatus]>([])
        vm.migrator.observe { event in
            if case .status(let status) = event { heard.withLock { $0.append(status) } }
        }
        try vm.run("cont")
        try vm.run("migrate-set-capabilities", ["capabilities": [["capability": "events", "state": false]]])
        try vm.run("migrate", ["uri": "unix:/no/such/socket"])
        try vm.status(.failed)
        #expect(heard.wait(deadline: .after(seconds: 10)) { $0 == [.setup, .failed] ? () : nil } != nil)
        #expect(vm.eventNames == ["RESUME"])
    }

    @Test("while one migration is under way another is refused, and it can be cancelled")
    func twice() throws {
        let vm = try MonitoredMachine()
        try vm.run("cont")
        // It accepts and says nothing.
        let path = "/tmp/godwit-qmp-mute-\(UInt32.random(in: 0 ... .max)).sock"
        let mute = try Socket.listen(unix: path)
        defer {
            try? FileSystem.remove(path)
            withExtendedLifetime(mute) {}
        }
        try vm.run("migrate", ["uri": .string("unix:\(path)")])
        #expect(try vm.refusal("migrate", ["uri": "tcp:127.0.0.1:1"]).contains("a migration process in progress"))
        let events: JSON = [["capability": "events", "state": true]]
        #expect(try vm.refusal("migrate-set-capabilities", ["capabilities": events]).contains("under way"))
        try vm.run("migrate_cancel")
        try vm.status(.cancelled)
        #expect(try vm.run("query-status")["running"] == true)
        try vm.run("migrate_cancel")
    }

    @Test("commands that do not fit the moment say why")
    func wrongMoment() throws {
        let vm = try MonitoredMachine()
        let waits = try MonitoredMachine(incoming: true)
        try vm.run("migrate_cancel")
        #expect(
            try vm.refusal("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
                == "migrate-incoming: '-incoming' was not specified on the command line")
        #expect(
            try vm.refusal("migrate-continue", ["state": "pre-switchover"])
                == "migrate-continue: no migration waits in state pre-switchover")
        #expect(try vm.refusal("migrate-continue", ["state": "device"]).contains("pre-switchover only"))
        #expect(try vm.refusal("migrate-continue", ["state": "x"]) == "Parameter 'state' does not accept value 'x'")
        #expect(try vm.refusal("x-migrate-settle", ["verdict": "resume-here"]).contains("no migration is unsettled"))
        #expect(
            try vm.refusal("x-migrate-settle", ["verdict": "maybe"])
                == "Parameter 'verdict' does not accept value 'maybe'")
        #expect(try vm.refusal("migrate", ["uri": "tcp:127.0.0.1:1", "resume": true]).contains("no paused migration"))
        #expect(try vm.refusal("migrate", ["uri": "tcp:127.0.0.1:1", "blk": true]).contains("'blk'"))
        #expect(try vm.refusal("migrate", ["uri": "tcp:127.0.0.1:1", "inc": true]).contains("'inc'"))
        try waits.run("migrate-incoming", ["uri": "tcp:127.0.0.1:0", "exit-on-error": true])
        #expect(try waits.refusal("migrate-incoming", ["uri": "tcp:127.0.0.1:0"]).contains("already been started"))
    }

    @Test("pause-before-switchover waits for migrate-continue")
    func preSwitchover() throws {
        let source = try MonitoredMachine()
        let destination = try MonitoredMachine(incoming: true)
        try source.run("cont")
        let pause: JSON = [["capability": "pause-before-switchover", "state": true]]
        try source.run("migrate-set-capabilities", ["capabilities": pause])
        try source.run("migrate", ["uri": .string(try destination.listen())])
        try source.status(.preSwitchover)
        #expect(try source.refusal("stop").contains("migrate_cancel"))
        #expect(try source.refusal("cont").contains("migrate_cancel"))
        try source.run("migrate-continue", ["state": "pre-switchover"])
        try source.status(.completed)
        try destination.status(.completed)
    }

    @Test("a descriptor passed with getfd is where a migration goes to, and comes from")
    func descriptors() throws {
        let source = try MonitoredMachine()
        let destination = try MonitoredMachine(incoming: true)
        try source.write([7, 8, 9], at: 0x5000)
        let path = "/tmp/godwit-qmp-fd-\(UInt32.random(in: 0 ... .max)).sock"
        defer { try? FileSystem.remove(path) }
        let listener = try Socket.listen(unix: path)
        let near = try Socket.connect(unix: path)
        let far = try #require(try Socket.accept(listener, deadline: .after(seconds: 5)))
        for (vm, end, command) in [(destination, far, "migrate-incoming"), (source, near, "migrate")] {
            let socket = "/tmp/godwit-qmp-fd-\(UInt32.random(in: 0 ... .max)).sock"
            let server = try QMPServer(sockets: [ControlSocket(path: socket)], table: vm.commands.table)
            defer { server.stop() }
            let client = try QMPClient(path: socket)
            defer { client.close() }
            #expect(throws: QMPClientError.refused(QMPError("No file descriptor supplied via SCM_RIGHTS"))) {
                try client.execute("getfd", ["fdname": "line"])
            }
            #expect(throws: QMPClientError.self) {
                try client.execute("getfd", ["fdname": "7up"], passing: try end.duplicate())
            }
            try client.execute("getfd", ["fdname": "spare"], passing: try end.duplicate())
            try client.execute("closefd", ["fdname": "spare"])
            try client.execute("getfd", ["fdname": "line"], passing: end)
            try client.execute(command, ["uri": "fd:line"])
            #expect(throws: QMPClientError.refused(QMPError("File descriptor named 'line' not found"))) {
                // The migration took it, at the latest when it connects.
                Clock.sleep(nanoseconds: 50_000_000)
                try client.execute("closefd", ["fdname": "line"])
            }
        }
        try source.status(.completed)
        try destination.status(.completed)
        #expect(try destination.machine.memory.read(at: .init(0x5000), count: 3) == [7, 8, 9])
    }
}

@Suite struct MigrationTargetTests {
    private func address(_ addr: JSON) throws -> MigrationAddress {
        let channels: JSON = [["channel-type": "main", "addr": addr]]
        return try MigrationTarget.address(
            Arguments(["channels": channels], checkedAgainst: MigrationTarget.parameters), of: "migrate")
    }

    @Test("QEMU's structured addresses are understood")
    func structured() throws {
        #expect(
            try address(["transport": "socket", "type": "inet", "host": "::1", "port": "4444"])
                == .tcp(host: "::1", port: "4444"))
        #expect(try address(["transport": "socket", "type": "unix", "path": "/a b"]) == .unix(path: "/a b"))
        #expect(try address(["transport": "socket", "type": "fd", "str": "line"]) == .descriptor("line"))
        #expect(try address(["transport": "exec", "args": ["cat", "-"]]) == .exec(arguments: ["cat", "-"]))
        #expect(
            try address(["transport": "file", "filename": "/x", "offset": 4096]) == .file(path: "/x", offset: 4096))
    }

    @Test(
        "what cannot be used is refused by its path",
        arguments: [
            (["transport": "smoke"], "Parameter 'transport' does not accept value 'smoke'"),
            ([:], "Parameter 'channels[0].addr.transport' is missing"),
            (5, "Invalid parameter type for 'channels[0].addr', expected: object"),
            (["transport": "socket"], "Parameter 'channels[0].addr.type' is missing"),
            (
                ["transport": "socket", "type": "inet", "host": "a"], "Parameter 'channels[0].addr.port' is missing"
            ),
            (
                ["transport": "socket", "type": "inet", "host": "a", "port": "99999"],
                "migration address \"tcp:a:99999\": \"99999\" is no port; it is a number from 0 to 65535 or a service name"
            ),
            (
                ["transport": "socket", "type": "inet", "host": "a", "port": "1", "to": 5],
                "Parameter 'channels[0].addr.to' is unexpected"
            ),
            (
                ["transport": "socket", "type": "unix", "path": ""],
                "Parameter 'channels[0].addr.path' expects a text that is not empty, without zero bytes"
            ),
            (
                ["transport": "socket", "type": "vsock", "cid": "1", "port": "1"],
                "channels[0].addr: socket type 'vsock' is not supported; use 'inet', 'unix' or 'fd'"
            ),
            (
                ["transport": "rdma", "host": "a", "port": "1"],
                "channels[0].addr: transport 'rdma' is not supported; use 'socket', 'exec' or 'file'"
            ),
            (
                ["transport": "exec", "args": []],
                "Parameter 'channels[0].addr.args' expects a program and its arguments"
            ),
            (
                ["transport": "file", "filename": "/x", "offset": -1],
                "Parameter 'channels[0].addr.offset' expects uint64"
            ),
        ] as [(JSON, String)])
    func refused(addr: JSON, sentence: String) {
        #expect {
            try address(addr)
        } throws: {
            QMPError($0).description == sentence
        }
    }

    @Test("exactly one of uri and channels, and exactly one main channel")
    func oneOfThem() throws {
        let vm = try MonitoredMachine()
        let unix: JSON = ["transport": "socket", "type": "unix", "path": "/no/such"]
        let main: JSON = ["channel-type": "main", "addr": unix]
        #expect(try vm.refusal("migrate") == "Parameter 'uri' is missing")
        #expect(try vm.refusal("migrate", ["uri": "unix:/x", "channels": [main]]).contains("exclude each other"))
        #expect(try vm.refusal("migrate", ["channels": [main, main]]).contains("2 entries"))
        #expect(try vm.refusal("migrate", ["channels": []]).contains("0 entries"))
        let cpr: JSON = ["channel-type": "cpr", "addr": unix]
        #expect(try vm.refusal("migrate", ["channels": [main, cpr]]).contains("'cpr' is not supported"))
        #expect(try vm.refusal("migrate", ["uri": "bla"]).contains("\"bla\""))
    }
}
