import Glibc
import Host
import Testing

@testable import QMP

/// What both are asked, and the words of QEMU 7.2. Ours are always compared with these, and with QEMU where it is.
private let dialogue: [(request: String, words: String)] = [
    (#"{"execute":"nope"}"#, "The command nope has not been found"),
    (#"{"execute":"qmp_capabilities"}"#, "Capabilities negotiation is already complete, command ignored"),
    (#"{}"#, "QMP input lacks member 'execute'"),
    (#"5"#, "QMP input must be a JSON object"),
    (#"["x"]"#, "QMP input must be a JSON object"),
    (#"{"execute":5}"#, "QMP input member 'execute' must be a string"),
    (#"{"execute":"query-version","arguments":5}"#, "QMP input member 'arguments' must be an object"),
    (#"{"execute":"query-version","foo":5}"#, "QMP input member 'foo' is unexpected"),
    (#"{"execute":"query-version","exec-oob":"x"}"#, "QMP input member 'execute' clashes with 'exec-oob'"),
    (#"{"execute":"query-version","arguments":{"x":1}}"#, "Parameter 'x' is unexpected"),
    (#"{"exec-oob":"query-version"}"#, "The command query-version does not support OOB"),
    (#"{"exec-oob":"migrate-pause"}"#, "migrate-pause is currently only supported during postcopy-active state"),
    (#"{"execute":"migrate"}"#, "Parameter 'uri' is missing"),
    (#"{"execute":"migrate","arguments":{"uri":5}}"#, "Invalid parameter type for 'uri', expected: string"),
    (#"{"execute":"migrate","arguments":{"zz":1}}"#, "Parameter 'uri' is missing"),
    (#"{"execute":"migrate","arguments":{"uri":"x","zz":1}}"#, "Parameter 'zz' is unexpected"),
    (
        #"{"execute":"migrate","arguments":{"uri":"x","resume":1}}"#,
        "Invalid parameter type for 'resume', expected: boolean"
    ),
    (
        #"{"execute":"migrate-set-capabilities","arguments":{"capabilities":{}}}"#,
        "Invalid parameter type for 'capabilities', expected: array"
    ),
    (
        #"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[5]}}"#,
        "Invalid parameter type for 'capabilities[0]', expected: object"
    ),
    (
        #"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"foo","state":true}]}}"#,
        "Parameter 'capability' does not accept value 'foo'"
    ),
    (
        #"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"xbzrle"}]}}"#,
        "Parameter 'capabilities[0].state' is missing"
    ),
    (
        #"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"xbzrle","state":1}]}}"#,
        "Invalid parameter type for 'capabilities[0].state', expected: boolean"
    ),
    (
        #"{"execute":"migrate-set-capabilities","#
            + #""arguments":{"capabilities":[{"capability":"xbzrle","state":true,"q":1}]}}"#,
        "Parameter 'capabilities[0].q' is unexpected"
    ),
    (
        #"{"execute":"migrate-set-parameters","arguments":{"multifd-channels":256}}"#,
        "Parameter 'multifd-channels' expects uint8_t"
    ),
    (
        #"{"execute":"migrate-set-parameters","arguments":{"downtime-limit":18446744073709551616}}"#,
        "Parameter 'downtime-limit' expects uint64"
    ),
    (
        #"{"execute":"migrate-set-parameters","arguments":{"tls-creds":5}}"#,
        "Invalid parameter type for 'tls-creds', expected: StrOrNull"
    ),
    (
        #"{"execute":"pmemsave","arguments":{"val":0,"size":18446744073709551615,"filename":"x"}}"#,
        "Invalid parameter type for 'size', expected: integer"
    ),
    (#"{"execute":"closefd","arguments":{"fdname":"a"}}"#, "File descriptor named 'a' not found"),
]

private let qemu = ["/usr/bin/qemu-system-x86_64", "/usr/local/bin/qemu-system-x86_64"].first {
    (try? FileSystem.status(of: $0)) != .some(nil)
}

@Suite(.timeLimit(.minutes(10))) struct QEMUWordingTests {
    private func ask(_ path: String, _ name: String) throws {
        var client = try RawClient(path: path)
        for (number, (request, words)) in dialogue.enumerated() {
            // The marker after each request shows that it had one answer, and that the connection goes on.
            try client.send(request + "\n" + #"{"execute":"nope","id":\#(number)}"# + "\n")
            let answer = try client.line()
            #expect(answer?["error"]?["desc"]?.stringValue == words, "\(name) to \(request)")
            let marker = try client.line()
            #expect(marker?["id"] == JSON(number), "\(name) after \(request)")
        }
    }

    @Test("errors are worded as QEMU words them")
    func ours() throws {
        let vm = try Monitored(migrationLikeCommands)
        try ask(vm.path, "Godwit")
    }

    @Test("QEMU words them so itself", .enabled(if: qemu != nil, "needs qemu-system-x86_64"))
    func theirs() throws {
        let path = "/tmp/godwit-qemu-test-\(getpid())-\(UInt32.random(in: 0 ... .max)).sock"
        defer { try? FileSystem.remove(path) }
        let child = try ChildProcess([
            try #require(qemu), "-M", "none", "-nodefaults", "-display", "none", "-S", "-qmp",
            "unix:\(path),server=on,wait=off",
        ])
        defer { child.end() }
        let deadline = Deadline.after(seconds: 20)
        while (try? Socket.connect(unix: path)) == nil {
            try #require(!deadline.hasPassed && child.poll() == nil, "QEMU listens on its monitor")
            Clock.sleep(nanoseconds: 20_000_000)
        }
        try ask(path, "QEMU")
    }

    @Test("our client drives QEMU's monitor", .enabled(if: qemu != nil, "needs qemu-system-x86_64"))
    func clientOfQEMU() throws {
        let path = "/tmp/godwit-qemu-test-\(getpid())-\(UInt32.random(in: 0 ... .max)).sock"
        defer { try? FileSystem.remove(path) }
        let child = try ChildProcess([
            try #require(qemu), "-M", "none", "-nodefaults", "-display", "none", "-S", "-qmp",
            "unix:\(path),server=on,wait=off",
        ])
        defer { child.end() }
        let deadline = Deadline.after(seconds: 20)
        var client = try? QMPClient(path: path)
        while client == nil, !deadline.hasPassed {
            Clock.sleep(nanoseconds: 20_000_000)
            client = try? QMPClient(path: path)
        }
        let monitor = try #require(client)
        #expect(try monitor.execute("query-status")["status"] == "prelaunch")
        try monitor.execute("cont")
        let event = try monitor.waitForEvent("RESUME", deadline: .after(seconds: 5))
        #expect(event.microseconds > 0)
    }
}
