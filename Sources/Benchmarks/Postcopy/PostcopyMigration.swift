import CommandLineKit
import Host
import QMP
import Transport

/// Credentials of both ends, for the floor and for VMs.
struct PostcopyKeys {
    let folder: String
    let settings: (server: TLSSettings, client: TLSSettings)

    init(in folder: String) throws {
        self.folder = folder
        settings = try ChannelStream.keys(in: folder)
    }
}

/// Migrations between two processes on this machine, verified page by page at the destination.
struct PostcopyMigration {
    let options: BenchmarkOptions
    let warmMemory: WarmMemory
    let keys: PostcopyKeys

    private static let migrationSeconds: UInt64 = 60
    private static let downtimeLimitMilliseconds = 300
    /// Between the last page of the fill and the start.
    private static let settleNanoseconds: UInt64 = 200_000_000

    // MARK: Page requests

    /// Times in microseconds and what they are told beside, by name.
    typealias Sample = [String: Double]

    /// - Throws: `CommandFailure` for a run that failed, told too little, or whose memory does not verify.
    func measure(_ cell: PostcopyCell) throws -> Sample {
        try warmMemory.refill(options)
        let floor = try PageFloor.measure(tls: cell.isEncrypted ? keys.settings : nil)
        let awakeFloor = try PageFloor.measureAwake(tls: cell.isEncrypted ? keys.settings : nil)
        let folder = try PrivateFolder("bench")
        defer { folder.remove() }
        let (source, destination) = try pair(
            in: folder.path, guest: cell.guest, megabytes: cell.memoryMegabytes, cpus: cell.cpuCount, cell.pages,
            isEncrypted: cell.isEncrypted)
        defer {
            source.child.end()
            destination.child.end()
        }
        try allowPostcopy(source.child, destination.child, cell)
        let total = try move(source, to: destination, what: cell.name, isPostcopy: true)
        let there = try destination.child.execute("x-guest-histogram")
        let answer = try awaitCompletion(of: destination.child, cell.name)
        try destination.verify()
        let latency = try PageTimes(answer, of: cell.name)
        let probe = try ProbeLatency(
            from: try source.child.execute("x-guest-histogram"), to: there, fetched: latency.count)
        var sample = latency.sample
        for (name, share) in PageTimes.shares {
            sample["guest-\(name)-us"] = probe.microseconds(atMille: share)
        }
        sample["requests"] = Double(latency.count)
        sample["round-trip-us"] = floor.roundTrip / 1e3
        sample["fault-us"] = floor.fault / 1e3
        sample["floor-us"] = floor.sum / 1e3
        sample["awake-floor-us"] = awakeFloor.map { $0.sum / 1e3 }
        for share in ["p50", "p99"] {
            let page = (sample["page-\(share)-us"] ?? .nan) * 1e3
            sample["\(share)-vs-floor"] = floor.ratio(ofPage: page)
            sample["\(share)-vs-awake-floor"] = awakeFloor.map { $0.ratio(ofPage: page) }
            sample["guest-\(share)-vs-floor"] = (sample["guest-\(share)-us"] ?? .nan) * 1e3 / floor.sum
        }
        sample["total-ms"] = total
        sample["ram-mbs"] = Double(cell.memoryMegabytes << 20) / 1e3 / max(1, total)
        return sample
    }

    // MARK: Total time

    /// Moves an idle guest. - Returns: milliseconds.
    func totalTime(megabytes: UInt64, isPostcopy: Bool) throws -> Double {
        try warmMemory.refill(options)
        let folder = try PrivateFolder("bench")
        defer { folder.remove() }
        let (source, destination) = try pair(in: folder.path, guest: "idle,heartbeat=0", megabytes: megabytes)
        defer {
            source.child.end()
            destination.child.end()
        }
        let what = isPostcopy ? "idle by postcopy" : "idle by precopy"
        if isPostcopy { try allowPostcopy(source.child, destination.child, PostcopyCell()) }
        let total = try move(source, to: destination, what: what, isPostcopy: isPostcopy)
        _ = try awaitCompletion(of: destination.child, what)
        try destination.verify()
        return total
    }

    // MARK: Two VMs

    private func pair(
        in folder: String, guest: String, megabytes: UInt64, cpus: Int = 1, _ pages: BackingPages = .small,
        isEncrypted: Bool = false
    ) throws -> (source: GodwitVM, destination: GodwitVM) {
        func start(_ role: String, isDestination: Bool) throws -> GodwitVM {
            var extra: [String] = []
            if pages != .small { extra += ["--memory-backing", pages.option] }
            if isEncrypted {
                let endpoint = isDestination ? "server" : "client"
                extra += ["--object", "tls-creds-psk,id=tls0,dir=\(keys.folder),endpoint=\(endpoint)"]
            }
            var machine = MeasuredMachine(
                method: .auto, memoryMegabytes: megabytes, cpuCount: cpus, guest: guest, isDestination: isDestination)
            machine.listensAtOnce = false
            return try GodwitVM(role, in: folder, machine, extra: extra)
        }
        let source = try start("source", isDestination: false)
        do {
            let destination = try start("destination", isDestination: true)
            let processes = [source.child, destination.child].map(\.process.identifier)
            warmMemory.follow(processes)
            try options.waitUntilReady("the source", lookEveryMilliseconds: 50) { try source.guest().isReady }
            Clock.sleep(nanoseconds: Self.settleNanoseconds)
            warmMemory.follow(processes)
            for vm in [source, destination] {
                try vm.child.prepareMigration(downtimeLimitMilliseconds: Self.downtimeLimitMilliseconds)
                if isEncrypted { try vm.child.execute("migrate-set-parameters", ["tls-creds": "tls0"]) }
            }
            return (source, destination)
        } catch {
            source.child.end()
            throw error
        }
    }

    private func allowPostcopy(_ source: ChildVM, _ destination: ChildVM, _ cell: PostcopyCell) throws {
        for vm in [source, destination] {
            let names = ["postcopy-ram", "postcopy-preempt"]
            let capabilities = names.map { ["capability": .string($0), "state": true] as JSON }
            try vm.execute("migrate-set-capabilities", ["capabilities": .array(capabilities)])
            if cell.channels > 1 {
                try vm.execute("migrate-set-parameters", ["x-postcopy-channels": JSON(cell.channels)])
            }
        }
        if let cap = cell.capMegabytes {
            try source.execute("migrate-set-parameters", ["max-postcopy-bandwidth": JSON(cap * 1_000_000)])
        }
    }

    /// - Returns: milliseconds, as the source tells.
    private func move(
        _ source: GodwitVM, to destination: GodwitVM, what: String, isPostcopy: Bool
    ) throws -> Double {
        try destination.child.execute("migrate-incoming", ["uri": "tcp:127.0.0.1:0"])
        let uri = try destination.child.listeningAddress()
        let client = try source.child.client()
        try source.child.execute("migrate", ["uri": .string(uri)])
        let deadline = Deadline.after(seconds: Self.migrationSeconds)
        var isStarted = !isPostcopy
        var status = ""
        while !["completed", "failed", "cancelled", "postcopy-paused", "x-unsettled"].contains(status) {
            try options.checkInterruption()
            guard !deadline.hasPassed else { throw MigrationTookTooLong(what: what, seconds: Self.migrationSeconds) }
            if !isStarted { isStarted = (try? source.child.execute("migrate-start-postcopy")) != nil }
            do throws(QMPClientError) {
                let event = try client.waitForEvent("MIGRATION", deadline: .after(milliseconds: isStarted ? 200 : 5))
                status = event.data["status"]?.stringValue ?? ""
            } catch {
                guard case .timedOut = error else { throw error }
            }
        }
        let reading = MigrationReading(try source.child.execute("query-migrate"))
        do { try reading.requireCompletion(of: what, to: uri) } catch {
            throw CommandFailure("\(error) (\(source.child.logTail(lines: 1).joined()))")
        }
        // One that was over before the guest moved has measured nothing of what is asked here.
        guard !isPostcopy || reading.postcopyBytes > 0 else {
            throw CommandFailure("\(what): nothing came after the guest moved")
        }
        return try MigrationFigures(reading, of: what).totalMilliseconds
    }

    private func awaitCompletion(of vm: ChildVM, _ what: String) throws -> JSON {
        let deadline = Deadline.after(seconds: 10)
        while true {
            let answer = try vm.execute("query-migrate")
            if answer["status"] == "completed" { return answer }
            guard !deadline.hasPassed else {
                throw CommandFailure("\(what): the destination's migration is \(answer["status"] ?? "nothing")")
            }
            Clock.sleep(nanoseconds: 10_000_000)
        }
    }
}

/// How long requested pages took at the destination, from the fault read to the page placed. All must be told.
struct PageTimes: Equatable, Sendable {
    static let shares: [(name: String, mille: UInt64)] = [("p50", 500), ("p90", 900), ("p99", 990), ("max", 1000)]

    let count: UInt64
    let sample: [String: Double]

    init(_ answer: JSON, of what: String) throws(CommandFailure) {
        let told = answer["x-postcopy-latency-ns"]
        var sample: [String: Double] = [:]
        for (name, _) in Self.shares {
            guard let nanoseconds = told?[name]?.doubleValue else {
                throw CommandFailure("\(what): the destination does not tell what its page requests took (\(name))")
            }
            sample["page-\(name)-us"] = nanoseconds / 1e3
        }
        guard let count = told?["count"]?.integerValue(as: UInt64.self), count > 0 else {
            throw CommandFailure("\(what): the guest asked for no page")
        }
        self.count = count
        self.sample = sample
    }
}
