import Glibc
import Host
import QMP
import TestSupport
import Testing

@Suite(
    "A guest that moved before its memory goes back to its source", .serialized, .timeLimit(.minutes(10)),
    .enabled(if: hasKVM, needsKVM))
struct SafetyNetTests {
    struct Terms: Sendable, CustomTestStringConvertible {
        var cpus = 1
        var rounds = false
        var preempts = false
        var options: [String] = []
        /// Of the destination's guest, before something happens.
        var epochs: UInt64 = 3
        var epochMilliseconds: UInt64 = 50
        var testDescription: String {
            "\(cpus) vCPUs\(rounds ? ", rounds before" : "")\(preempts ? ", preempt" : "")\(options.isEmpty ? "" : ", \(options)")"
                + ", epoch \(epochs) of \(epochMilliseconds) ms"
        }
    }

    private static let guest = "dirty,working-set=4M,fill=16M,rate=64M,random,heartbeat=1ms"

    /// Two VMs, the second of which takes the guest with a safety net, and both of which say on a file what the guest says.
    private final class Pair {
        let bench: Workbench
        let source: VM
        let destination: VM
        let uri: String
        private var files: [String] { ["source", "destination"].map { "\(bench.folder)/\($0).serial" } }

        init(_ terms: Terms, hasNet: Bool = true) throws {
            bench = try Workbench()
            let options = ["--memory", "48M", "--cpus", "\(terms.cpus)"] + terms.options
            let folder = bench.folder
            source = try bench.startVM(
                "source", options + ["--serial", "file:\(folder)/source.serial", "--guest", SafetyNetTests.guest])
            try source.waitForGuest()
            destination = try bench.startVM(
                "destination", options + ["--serial", "file:\(folder)/destination.serial", "--incoming", "defer"])
            for vm in [source, destination] {
                try vm.allow([
                    "postcopy-ram": true, "postcopy-preempt": terms.preempts, "x-postcopy-safety-net": hasNet,
                ])
                try vm.client.execute(
                    "migrate-set-parameters",
                    [
                        "max-bandwidth": JSON(40 << 20), "max-postcopy-bandwidth": JSON(1 << 20),
                        "downtime-limit": 300, "x-postcopy-epoch": JSON(terms.epochMilliseconds),
                    ])
            }
            try destination.client.execute("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
            uri = "tcp:127.0.0.1:\(try destination.port())"
        }

        func move(_ terms: Terms) throws {
            try source.migrate(to: uri)
            if terms.rounds { Clock.sleep(nanoseconds: 300_000_000) }
            try source.client.execute("migrate-start-postcopy")
            for vm in [source, destination] { try vm.waitForMigration("postcopy-active") }
            guard terms.epochs > 0 else { return }
            let isFar = try destination.wait(seconds: 20) { try net(of: destination, "epochs") >= terms.epochs }
            guard isFar else { throw TestObstacle("no epochs: \(try destination.migration()) \(destination.log)") }
        }

        func net(of vm: VM, _ field: String) throws -> UInt64 {
            try vm.migration()["x-safety-net"]?[field]?.integerValue(as: UInt64.self) ?? 0
        }

        /// What the world heard of heartbeats so far, from both sides.
        func heard() throws -> Int {
            try files.reduce(0) { sum, path in
                try sum + Descriptor.contents(of: path).count { $0 == UInt8(ascii: ".") }
            }
        }

        /// The guest goes on in that VM, all of its memory is right, and the world heard each of its heartbeats, once.
        /// - Parameter missing: so many of the last heartbeats that the source had may be unheard: its destination was killed between.
        func claimWhole(_ vm: VM, missing: Int = 1) throws {
            func touches() -> UInt64? {
                (try? vm.client.execute("x-query-guest"))?["touches"]?.integerValue(as: UInt64.self)
            }
            let start = touches()
            #expect(start != nil && vm.wait(seconds: 5) { touches() != start }, "the guest does not go on: \(vm.log)")
            try vm.client.execute("stop")
            let check = try vm.client.execute("x-check-guest", deadline: .after(seconds: 30))
            #expect(check["verified"] == true, "the guest's memory is wrong: \(check["summary"] ?? .null)")
            let said = try vm.client.execute("x-query-guest")["heartbeats"]?.integerValue(as: Int.self) ?? 0
            Clock.sleep(nanoseconds: 20_000_000)
            let heard = try heard()
            #expect(heard <= said + 1, "the guest said \(said) heartbeats, and \(heard) were heard")
            #expect(heard >= said - missing, "the guest said \(said) heartbeats, and \(heard) were heard")
            try vm.client.execute("cont")
        }
    }

    @Test(
        "when its destination is killed it goes on as it was at the end of the last epoch, and the world heard nothing else",
        arguments: [
            Terms(epochs: 0), Terms(), Terms(cpus: 2, rounds: true), Terms(cpus: 2, preempts: true, epochs: 12),
            Terms(cpus: 4, rounds: true, preempts: true, epochs: 5),
            Terms(cpus: 2, options: ["--accel", "kvm,dirty-tracking=ring"]),
            Terms(options: ["--memory-backing", "memfd"]),
        ])
    func destinationKilled(terms: Terms) throws {
        let pair = try Pair(terms)
        try pair.move(terms)
        Clock.sleep(nanoseconds: .random(in: 0...60_000_000))
        kill(pair.destination.process.identifier, SIGKILL)
        try pair.source.waitForMigration("postcopy-paused")
        #expect(throws: (any Error).self) { try pair.source.client.execute("cont") }
        #expect(try pair.source.status() == "postmigrate")
        try pair.source.client.execute("x-postcopy-take-back")
        try pair.source.waitForMigration("cancelled")
        #expect(try pair.source.status() == "running")
        let last = try pair.net(of: pair.source, "epochs")
        #expect(last >= terms.epochs && pair.source.log.contains("end of epoch \(last)"), "\(pair.source.log)")
        try pair.claimWhole(pair.source, missing: 120)
        for command in ["x-postcopy-take-back", "migrate-pause"] {
            #expect(throws: (any Error).self) { try pair.source.client.execute(command) }
        }
        // Nothing of it is left: it can move again.
        let next = try pair.bench.startVM(
            "next", ["--memory", "48M", "--cpus", "\(terms.cpus)", "--incoming", "tcp:127.0.0.1:0"] + terms.options)
        try pair.source.client.execute("migrate-set-parameters", ["max-bandwidth": JSON(UInt64(0))])
        try pair.source.allow(["postcopy-preempt": false, "x-postcopy-safety-net": false])
        try pair.source.allow(["postcopy-ram": false])
        try pair.source.migrate(to: "tcp:127.0.0.1:\(try next.port())")
        try pair.source.waitForMigration("completed")
        #expect(try next.client.execute("x-check-guest", deadline: .after(seconds: 30))["verified"] == true)
        for vm in [pair.source, next] { try vm.client.execute("quit") }
    }

    @Test(
        "when its connection is lost it stands still and is not heard, and goes on over the next one to its end",
        arguments: [Terms(), Terms(cpus: 2, rounds: true, preempts: true)])
    func connectionLost(terms: Terms) throws {
        let pair = try Pair(terms)
        try pair.move(terms)
        for vm in [pair.source, pair.destination] {
            try vm.client.execute("migrate-pause")
            for vm in [pair.source, pair.destination] { try vm.waitForMigration("postcopy-paused") }
            Clock.sleep(nanoseconds: 30_000_000)
            let heard = try pair.heard()
            Clock.sleep(nanoseconds: 200_000_000)
            #expect(try pair.heard() == heard, "the guest is heard")
            let epochs = try pair.net(of: pair.destination, "epochs")
            try pair.source.client.execute("migrate", ["uri": .string(pair.uri), "resume": true])
            for vm in [pair.source, pair.destination] { try vm.waitForMigration("postcopy-active") }
            #expect(
                try pair.destination.wait(seconds: 10) { try pair.net(of: pair.destination, "epochs") > epochs + 1 },
                "no epochs follow: \(pair.destination.log)")
        }
        try finish(pair)
    }

    @Test("released while its state is being read it goes on", arguments: 0..<4)
    func releasedInEpoch(round: Int) throws {
        let terms = Terms(cpus: 2, epochMilliseconds: 1)
        let pair = try Pair(terms)
        try pair.move(terms)
        try finish(pair)
    }

    private func finish(_ pair: Pair) throws {
        try pair.source.client.execute("migrate-set-parameters", ["max-postcopy-bandwidth": JSON(UInt64(0))])
        for vm in [pair.source, pair.destination] { try vm.waitForMigration("completed") }
        #expect(try pair.destination.migration()["x-safety-net"]?["over"] == true)
        #expect(throws: (any Error).self) { try pair.source.client.execute("x-postcopy-take-back") }
        #expect(throws: (any Error).self) { try pair.destination.client.execute("x-postcopy-keep") }
        try pair.claimWhole(pair.destination)
        for vm in [pair.source, pair.destination] { try vm.client.execute("quit") }
    }

    @Test(
        "to its end nothing is lost, and what it costs is told", arguments: [Terms(), Terms(cpus: 2, preempts: true)],
        [true, false])
    func whole(terms: Terms, hasNet: Bool) throws {
        let pair = try Pair(terms, hasNet: hasNet)
        var terms = terms
        if !hasNet { terms.epochs = 0 }
        try pair.move(terms)
        func guest() throws -> (beats: UInt64, touches: UInt64) {
            let status = try pair.destination.client.execute("x-query-guest")
            func number(_ name: String) -> UInt64 { status[name]?.integerValue(as: UInt64.self) ?? 0 }
            return (number("heartbeats"), number("touches"))
        }
        let (before, began) = (try guest(), Clock.monotonicNanoseconds)
        Clock.sleep(nanoseconds: 1_500_000_000)
        let (after, ended) = (try guest(), Clock.monotonicNanoseconds)
        let figures = try pair.destination.migration()
        #expect(figures["status"]?.stringValue == "postcopy-active", "it was over before it was measured")
        let seconds = Double(ended - began) / 1e9
        print(
            "safety net \(hasNet ? "on" : "off"), \(terms.cpus) vCPUs: \(Int(Double(after.touches - before.touches) / seconds)) pages/s "
                + "written, \(Int(Double(after.beats - before.beats) / seconds)) heartbeats/s; "
                + "\(figures["x-safety-net"] ?? .null)")
        guard hasNet else {
            #expect(figures["x-safety-net"] == nil)
            return
        }
        #expect(pair.destination.threadNames.contains("epoch-take"))
        try finish(pair)
    }

    @Test("when its source is killed it stands still, until its operator says that it stays where it is")
    func sourceKilled() throws {
        let terms = Terms(cpus: 2)
        let pair = try Pair(terms)
        try pair.move(terms)
        kill(pair.source.process.identifier, SIGKILL)
        let paused = try pair.destination.waitForMigration("postcopy-paused")
        #expect(paused["error-desc"]?.stringValue?.contains("stands still") == true, "\(paused)")
        let heard = try pair.heard()
        Clock.sleep(nanoseconds: 100_000_000)
        #expect(try pair.heard() == heard, "it is heard though its source is gone")
        try pair.destination.client.execute("x-postcopy-keep")
        #expect(
            try pair.destination.wait(seconds: 10) { try pair.heard() > heard },
            "it is not heard: \(pair.destination.log)")
        #expect(try pair.destination.migrationStatus() == "postcopy-paused")
        #expect(throws: (any Error).self) { try pair.destination.client.execute("x-postcopy-keep") }
        try pair.destination.client.execute("quit")
    }

    @Test("what a safety net cannot be is refused in a sentence, before anything moves")
    func refused() throws {
        let pair = try Pair(Terms(), hasNet: false)
        let (source, destination) = (pair.source, pair.destination)
        func refusal(_ body: () throws -> Void) -> String {
            do { try body() } catch { return "\(error)" }
            return "nothing was refused"
        }
        #expect(refusal { try source.client.execute("x-postcopy-take-back") }.contains("no guest"))
        #expect(refusal { try destination.client.execute("x-postcopy-keep") }.contains("no guest"))
        try source.allow(["x-postcopy-safety-net": true])
        #expect(refusal { try source.allow(["postcopy-ram": false]) }.contains("requires postcopy-ram"))
        let epoch = refusal { try source.client.execute("migrate-set-parameters", ["x-postcopy-epoch": 0]) }
        #expect(epoch.contains("between 1 and"), "\(epoch)")
        try source.client.execute("migrate-set-parameters", ["x-postcopy-channels": 16])
        #expect(refusal { try source.migrate(to: pair.uri) }.contains("channel of its own"))
        try source.client.execute("migrate-set-parameters", ["x-postcopy-channels": 1])
        try source.migrate(to: pair.uri)
        let failed = try source.waitForMigration("failed")
        #expect(failed["error-desc"]?.stringValue?.contains("set the capability there") == true, "\(failed)")
        #expect(try source.status() == "running")
        for vm in [source, destination] { try vm.client.execute("quit") }
    }
}

extension VM {
    /// Sets capabilities, all at once.
    fileprivate func allow(_ states: KeyValuePairs<String, Bool>) throws {
        try client.execute(
            "migrate-set-capabilities",
            ["capabilities": .array(states.map { ["capability": .string($0.key), "state": .bool($0.value)] })])
    }
}
