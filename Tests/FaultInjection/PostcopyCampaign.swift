import Glibc
import Host
import QMP
import TestSupport

/// One guest after the other moves before its memory, and each migration is struck. A connection that is lost is replaced, as often as it is
/// lost; a process that is killed leaves what the documentation promises for that moment.
final class PostcopyCampaign {
    private let bench: Workbench
    private let seed: UInt64
    private let kinds: [PostcopyBlow.Kind]
    /// A guest that moved can be taken back.
    private let hasNet: Bool
    private var random = SeededRandom(seed: 0)
    /// Where the guest is now.
    private var home: VM?
    private var counter = 0
    private(set) var violations: [String] = []
    private(set) var endings: [String: Int] = [:]
    private(set) var struck = 0
    /// Connections that were replaced.
    private(set) var recoveries = 0

    private static let guest = ["--memory", "48M", "--guest", "dirty,working-set=4M,fill=16M,rate=64M,random"]
    private static let bytesPerSecond: UInt64 = 48 << 20
    /// About what follows a guest that moves at once, and how long that takes.
    private static let byteLimit = 24 << 20
    private static let nanosecondLimit: UInt64 = 450_000_000

    init(seed: UInt64, kills: Bool, hasNet: Bool = false) throws {
        self.hasNet = hasNet
        bench = try Workbench()
        self.seed = seed
        kinds = PostcopyBlow.Kind.allCases.filter { $0.kills == kills }
        try CertificateAuthority.writeKeys(["qemu": "00112233445566778899"], to: keys)
    }

    private var keys: String { "\(bench.folder)/keys" }

    /// Strikes so many migrations; those that are over before the blow do not count.
    func run(count: Int) throws {
        var index: UInt64 = 0
        while struck < count, index < UInt64(count) * 3 {
            random = SeededRandom(seed: seed &+ index &* 0x1_0000_0001)
            let before = violations.count
            var terms = ""
            do { try strike(&terms) } catch { violations.append("\(error)") }
            for number in violations.indices[before...] {
                violations[number] = "seed \(seed), migration \(index) (\(terms)): \(violations[number])"
            }
            if violations.count > before { home = nil }
            index += 1
        }
    }

    // MARK: One migration

    /// What both sides agreed on.
    private struct Pair {
        let source: VM
        let destination: VM
        let proxy: FaultyProxy
    }

    private func strike(_ terms: inout String) throws {
        let source = try home ?? startGuest()
        home = nil
        let preempts = Bool.random(using: &random)
        let encrypts = Int.random(in: 0..<4, using: &random) == 0
        let rounds = Bool.random(using: &random)
        let blow = PostcopyBlow(
            &random, kinds: kinds, byteLimit: Self.byteLimit, nanosecondLimit: Self.nanosecondLimit)
        terms = "\(blow)\(preempts ? ", preempt" : "")\(encrypts ? ", TLS" : "")\(rounds ? ", rounds before" : "")"
        let destination = try startDestination()
        for (vm, creds) in [(source, "client"), (destination, "server")] {
            try prepare(vm, preempts: preempts, credentials: encrypts ? creds : "")
        }
        try destination.client.execute("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
        let monitors = (try monitor(of: source), try monitor(of: destination))
        let processes = (source.process, destination.process)
        let proxy = try FaultyProxy(to: destination.port(), at: blow.point) {
            blow.deliver($0, source: processes.0, destination: processes.1, monitors)
        }
        defer { proxy.close() }
        let pair = Pair(source: source, destination: destination, proxy: proxy)
        try source.migrate(to: proxy.uri)
        if rounds { Clock.sleep(nanoseconds: UInt64.random(in: 0...150_000_000, using: &random)) }
        _ = try? source.client.execute("migrate-start-postcopy")
        if case .time(let nanoseconds) = blow.moment {
            Clock.sleep(nanoseconds: nanoseconds)
            if try isUnderWay(source) { proxy.strikeNow() }
        }
        try settle(pair, blow)
        if proxy.hasStruck { struck += 1 }
        for vm in [source, destination] where vm.name != home?.name { _ = try? vm.client.execute("quit") }
    }

    private func isUnderWay(_ source: VM) throws -> Bool {
        !["completed", "failed"].contains(try source.migrationStatus())
    }

    // MARK: Afterwards

    /// Does what an operator would, until it is over.
    private func settle(_ pair: Pair, _ blow: PostcopyBlow) throws {
        let deadline = Deadline.after(seconds: 40)
        var stallsUntil: Deadline?
        while !deadline.hasPassed {
            guard look(pair) else { return }
            if blow.kind.kills, pair.proxy.hasStruck { return try judgeKilled(pair, blow) }
            let here = (try? pair.source.migrationStatus()) ?? ""
            let there = (try? pair.destination.migrationStatus()) ?? ""
            switch here {
            case "completed": return try arrived(pair)
            case "failed", "cancelled": return try stayed(pair, here)
            case "x-paused", "postcopy-paused": try goOn(pair, isPostcopy: here == "postcopy-paused", there)
            case "x-unsettled":
                _ = try? pair.source.client.execute("x-migrate-settle", ["verdict": "ask-destination"])
            default:
                // A stall is ended by an operator, on either side; by both where the first one's word does not get through.
                guard pair.proxy.hasStruck, blow.kind == .stallAll || blow.kind == .stallOne else { break }
                if stallsUntil == nil {
                    stallsUntil = .after(nanoseconds: 50_000_000)
                } else if stallsUntil?.hasPassed == true {
                    try endStall(pair, here)
                }
            }
            Clock.sleep(nanoseconds: 2_000_000)
        }
        violations.append(
            "it does not end: '\((try? pair.source.migration()) ?? .null)' at the source, '\((try? pair.destination.migration()) ?? .null)' "
                + "at the destination: \(pair.source.log)\n\(pair.destination.log)")
    }

    private func endStall(_ pair: Pair, _ status: String) throws {
        let first = Bool.random(using: &random) ? pair.source : pair.destination
        let refusal = Result { try first.client.execute("migrate-pause", outOfBand: true) }
        // Before the guest has moved there is nothing to pause, and after the end neither.
        if case .failure = refusal { pair.proxy.release() }
    }

    /// A new connection, to the same address or to another; cut once more now and then.
    private func goOn(_ pair: Pair, isPostcopy: Bool, _ there: String) throws {
        // What stalled is gone for good.
        pair.proxy.cut()
        if isPostcopy, there == "postcopy-paused", Bool.random(using: &random) {
            // It may find out just now that nothing is missing.
            let said = Result {
                try pair.destination.client.execute(
                    "migrate-recover", ["uri": "tcp:127.0.0.1:0"], outOfBand: true)
            }
            if case .success = said {
                pair.proxy.redirect(to: try pair.destination.port())
            } else if (try? pair.destination.migrationStatus()) == "postcopy-paused" {
                violations.append("migrate-recover: \(said)")
            }
        }
        let told = Result {
            try pair.source.client.execute("migrate", ["uri": .string(pair.proxy.uri), "resume": true])
        }
        if case .failure(let error) = told { violations.append("resume: \(error)") }
        recoveries += 1
        if Int.random(in: 0..<3, using: &random) == 0 {
            Clock.sleep(nanoseconds: .random(in: 0...20_000_000, using: &random))
            if try isUnderWay(pair.source) { pair.proxy.cut() }
        } else {
            _ = pair.source.wait(seconds: 10) {
                !["postcopy-recover-setup", "postcopy-recover", "setup"].contains(
                    (try? pair.source.migrationStatus()) ?? "")
            }
        }
    }

    private func arrived(_ pair: Pair) throws {
        demand(runs(pair.source) == false, "completed, and the guest runs at the source")
        let isThere = pair.destination.wait(seconds: 20) { (try? pair.destination.migrationStatus()) == "completed" }
        demand(isThere, "completed here, and not there: \(pair.destination.log)")
        try verify(pair.destination)
        home = pair.destination
        note("arrived")
    }

    /// Only before the guest moved.
    private func stayed(_ pair: Pair, _ status: String) throws {
        demand(runs(pair.source) == true, "\(status), and the guest does not run: \(pair.source.log)")
        demand(runs(pair.destination) != true, "\(status), and the guest runs at the destination")
        try verify(pair.source)
        home = pair.source
        note("\(status) before the guest moved: it runs at the source")
    }

    // MARK: A process is killed

    private func judgeKilled(_ pair: Pair, _ blow: PostcopyBlow) throws {
        pair.proxy.waitForStrike()
        if blow.kind == .killSource { return try judgeDestination(pair) }
        try judgeSource(pair)
    }

    /// The source is gone: the destination has all, or some, or no guest.
    private func judgeDestination(_ pair: Pair) throws {
        let destination = pair.destination
        _ = pair.source.process.wait(deadline: .after(seconds: 10))
        let over = ["completed", "postcopy-paused", "failed", "x-paused", "none"]
        let isOver = destination.wait(seconds: 20) {
            destination.process.poll() != nil || over.contains((try? destination.migrationStatus()) ?? "")
        }
        guard isOver else {
            return violations.append("the destination goes on without a source: \(destination.log)")
        }
        // What it says last may come a moment later.
        Clock.sleep(nanoseconds: 20_000_000)
        let status = (try? destination.migrationStatus()) ?? "ended"
        switch status {
        case "completed":
            demand(runs(destination) == true, "completed, and the guest does not run")
            try verify(destination)
            home = destination
            note("source killed: the guest had arrived")
        case "postcopy-paused":
            demand(runs(destination) == true, "paused, and the guest was stopped: \(destination.log)")
            let info = try destination.migration()
            if hasNet { return try keep(destination, info) }
            demand(number(info["ram"]?["remaining"]) > 0, "paused, and nothing is missing: \(info)")
            demand(
                info["error-desc"]?.stringValue?.contains("as far as its memory is here") == true, "it says: \(info)")
            note("source killed: the guest runs on as far as its memory is there")
        default:
            demand(runs(destination) != true, "\(status), and the guest runs at the destination")
            note("source killed before the guest moved: it runs nowhere")
        }
    }

    /// The destination is gone, and with it a guest that ran there.
    private func judgeSource(_ pair: Pair) throws {
        let source = pair.source
        _ = pair.destination.process.wait(deadline: .after(seconds: 10))
        let over = ["completed", "postcopy-paused", "failed", "x-paused", "x-unsettled"]
        let isOver = source.wait(seconds: 45) { over.contains((try? source.migrationStatus()) ?? "") }
        let status = try source.migrationStatus()
        guard isOver else { return violations.append("the source's migration is '\(status)': \(source.log)") }
        let mayContinue = (try? source.client.execute("cont")) != nil
        switch status {
        case "failed", "x-paused":
            demand(runs(source) == true, "\(status), and the guest does not run: \(source.log)")
            if status == "x-paused" { try source.client.execute("migrate_cancel") }
            try verify(source)
            home = source
            note("destination killed before the guest moved: it runs at the source")
        case "x-unsettled":
            demand(runs(source) == false && !mayContinue, "in doubt, and the guest runs")
            try source.client.execute("x-migrate-settle", ["verdict": "resume-here"])
            demand(source.wait(seconds: 5) { runs(source) == true }, "settled, and the guest does not run")
            try verify(source)
            home = source
            note("destination killed while it was told to start: in doubt, an operator says that it goes on here")
        default:
            demand(runs(source) == false && !mayContinue, "\(status), and the guest runs at the source")
            if hasNet, status == "postcopy-paused", try takeBack(source) { return }
            let cancelled = Result { try source.client.execute("migrate_cancel") }
            if status == "postcopy-paused" {
                if case .success = cancelled { violations.append("a guest that moved was cancelled") }
                demand(runs(source) == false, "cancelled, and the guest runs at the source")
            }
            note(
                "destination killed after the guest moved (\(status)): the guest is lost, the source keeps what it had")
        }
    }

    // MARK: With a safety net

    /// - Returns: whether the source still could.
    private func takeBack(_ source: VM) throws -> Bool {
        let isReleased = try source.migration()["x-safety-net"]?["over"] == true
        let said = Result { try source.client.execute("x-postcopy-take-back") }
        if isReleased {
            if case .success = said { violations.append("a guest that was released was taken back") }
            return false
        }
        if case .failure(let error) = said { violations.append("x-postcopy-take-back: \(error)") }
        demand(source.wait(seconds: 5) { runs(source) == true }, "taken back, and the guest does not run")
        try verify(source)
        home = source
        note("destination killed after the guest moved: it goes on at the source")
        return true
    }

    /// The source is known to be gone.
    private func keep(_ destination: VM, _ paused: JSON) throws {
        demand(paused["error-desc"]?.stringValue?.contains("stands still") == true, "it says: \(paused)")
        try destination.client.execute("x-postcopy-keep", outOfBand: true)
        guard number(paused["ram"]?["remaining"]) == 0 else {
            return note("source killed: the guest stood still, and runs on as far as its memory is there")
        }
        try destination.waitForMigration("completed")
        try verify(destination)
        home = destination
        note("source killed when all memory was there: the guest stays at the destination")
    }

    // MARK: What must hold

    /// - Returns: whether not both run. The destination is asked first: a guest that has left never comes back.
    private func look(_ pair: Pair) -> Bool {
        let there = runs(pair.destination)
        guard there == true, runs(pair.source) == true else { return true }
        violations.append("both sides run the guest")
        return false
    }

    private func runs(_ vm: VM) -> Bool? { (try? vm.client.execute("query-status"))?["running"]?.boolValue }

    /// The guest goes on, and every page is what it must be.
    private func verify(_ vm: VM) throws {
        func touches() -> UInt64? {
            (try? vm.client.execute("x-query-guest"))?["touches"]?.integerValue(as: UInt64.self)
        }
        let start = touches()
        demand(start != nil && vm.wait(seconds: 5) { touches() != start }, "the guest does not go on: \(vm.log)")
        let check = try vm.client.execute("x-check-guest", deadline: .after(seconds: 30))
        demand(check["verified"] == true, "the guest's memory is wrong: \(check["summary"] ?? .null)")
    }

    private func demand(_ holds: Bool, _ sentence: @autoclosure () -> String) {
        if !holds { violations.append(sentence()) }
    }

    private func note(_ ending: String) { endings[ending, default: 0] += 1 }
    private func number(_ json: JSON?) -> UInt64 { json?.integerValue(as: UInt64.self) ?? 0 }

    // MARK: Processes

    private var objects: [String] {
        ["client", "server"].flatMap { ["--object", "tls-creds-psk,id=\($0),dir=\(keys),endpoint=\($0)"] }
    }

    private func startGuest() throws -> VM {
        counter += 1
        let vm = try bench.startVM("guest-\(counter)", Self.guest + objects)
        try vm.waitForGuest()
        return vm
    }

    private func startDestination() throws -> VM {
        counter += 1
        return try bench.startVM("destination-\(counter)", ["--memory", "48M", "--incoming", "defer"] + objects)
    }

    /// A connection of its own: what strikes does not wait for who looks.
    private func monitor(of vm: VM) throws -> QMPClient { try QMPClient(path: "\(bench.runtime)/\(vm.name).qmp") }

    private func prepare(_ vm: VM, preempts: Bool, credentials: String) throws {
        let states = [
            ("postcopy-ram", true), ("postcopy-preempt", preempts), ("x-resumable", true),
            ("x-postcopy-safety-net", hasNet),
        ]
        try vm.client.execute(
            "migrate-set-capabilities",
            ["capabilities": .array(states.map { ["capability": .string($0.0), "state": .bool($0.1)] })])
        try vm.client.execute(
            "migrate-set-parameters",
            [
                "max-bandwidth": JSON(Self.bytesPerSecond), "max-postcopy-bandwidth": JSON(Self.bytesPerSecond),
                "tls-creds": .string(credentials), "downtime-limit": 300,
            ])
    }
}
