import Glibc
import Host
import MigrationStream
import QMP
import Synchronization
import TestSupport

/// One guest after the other is migrated, and each migration is struck once. The guest goes on in whichever process has it then.
///
/// What must hold after each blow is in `judge`; what does not is a violation, and a sentence.
final class Campaign {
    private let bench: Workbench
    private let seed: UInt64
    private var traffic = Fault.Traffic(forward: 0, backward: 0, greeting: 0, afterReady: 0)
    /// Where the guest is now.
    private var home: VM?
    private var counter = 0
    private(set) var violations: [String] = []
    /// How often each ending was seen.
    private(set) var endings: [String: Int] = [:]
    private(set) var struck = 0

    private static let guest = [
        "--memory", "48M", "--guest", "dirty,working-set=6M,rate=48M,random,heartbeat=1s",
    ]
    /// Slow enough that blows fall into every round.
    private static let bytesPerSecond: UInt64 = 160 << 20

    /// Channels for pages besides the main one, which blows are aimed at.
    private let channels: Int

    init(seed: UInt64, channels: Int = 0) throws {
        bench = try Workbench()
        self.seed = seed
        self.channels = channels
    }

    /// Strikes `points` migrations; those that are over before the blow do not count.
    func run(points: Int) throws {
        try calibrate()
        var index: UInt64 = 0
        while struck < points, index < UInt64(points) * 3 {
            var random = SeededRandom(seed: seed &+ index &* 0x1_0000_0001)
            let fault = Fault(&random, traffic: traffic)
            let before = violations.count
            do { try strike(fault) } catch { violations.append("\(error)") }
            for number in violations.indices[before...] {
                violations[number] = "seed \(seed), migration \(index) (\(fault)): \(violations[number])"
            }
            if violations.count > before { home = nil }
            index += 1
        }
    }

    // MARK: One migration

    /// An undisturbed migration tells how many bytes pass, so that blows can be aimed.
    private func calibrate() throws {
        let source = try startGuest()
        let destination = try startDestination(isDeferred: false)
        var answer = StreamWriter()
        for message in [ReturnPathMessage.ready(nanoseconds: 0), .started(nanoseconds: 0), .shut(0)] {
            answer.message(message)
        }
        // What comes before READY is known once all has passed: hence a second look.
        for _ in 0..<2 {
            let proxy = try FaultyProxy(
                to: destination.port(), at: .forwardAfter(backward: traffic.greeting + 1, forward: 1 << 40))
            defer { proxy.close() }
            if traffic.forward > 0 { break }
            try limit(source)
            try source.migrate(to: proxy.uri)
            try source.waitForMigration("completed")
            let passed = proxy.passed
            traffic = Fault.Traffic(
                forward: passed.forward, backward: passed.backward,
                greeting: passed.backward - answer.bytes.count, afterReady: 0)
        }
        home = destination
        let next = try startDestination(isDeferred: false)
        let proxy = try FaultyProxy(
            to: next.port(), at: .forwardAfter(backward: traffic.greeting + 1, forward: 1 << 40))
        defer { proxy.close() }
        try limit(destination)
        try destination.migrate(to: proxy.uri)
        try destination.waitForMigration("completed")
        traffic.afterReady = proxy.passedSinceAnswer
        for vm in [source, destination] { try vm.client.execute("quit") }
        home = next
        try verify(next, "the destination of an undisturbed migration")
    }

    private func strike(_ fault: Fault) throws {
        let source = try home ?? startGuest()
        let destination = try startDestination(isDeferred: fault.isDeferred)
        let blow = Blow(fault, source: source, destination: destination)
        let proxy = try FaultyProxy(to: destination.port(), at: blow.point) { blow.deliver(through: $0) }
        defer { proxy.close() }
        try limit(source)
        _ = source.client.takeEvents()
        try source.migrate(to: proxy.uri)
        try blow.waitForMoment(proxy)
        let watch = Watch(source: source, destination: destination)
        violations += watch.untilOver()
        // A late blow changes who lives.
        proxy.waitForStrike()
        violations += watch.untilOver()
        if proxy.hasStruck { struck += 1 }
        try judge(fault, watch, proxy)
    }

    // MARK: What must hold

    private func judge(_ fault: Fault, _ watch: Watch, _ proxy: FaultyProxy) throws {
        let (source, destination) = (watch.source, watch.destination)
        home = nil
        if !watch.sourceLives {
            demand(fault.blow == .killSource, "the source ended by itself: \(source.log)")
            if watch.destinationRuns {
                note("source killed: the guest runs at the destination")
                home = destination
            } else {
                note("source killed: the guest is lost, and runs nowhere")
            }
        } else {
            if watch.sourceStatus == "x-unsettled" {
                demand(fault.blow != .holdAndGoOn && fault.blow != .killSource, "unsettled without a reason")
                demand(!watch.sourceRuns, "unsettled, and the guest runs")
                try settle(watch)
            }
            switch watch.sourceStatus {
            case "completed":
                demand(!watch.sourceRuns, "completed, and the guest runs at the source")
                demand(
                    fault.blow != .holdAndCancel || !proxy.hasStruck || watch.destinationRuns, "cancelled and completed"
                )
                if watch.destinationRuns { home = destination }
                demand(
                    watch.destinationRuns || fault.blow == .killDestination,
                    "completed, and the guest does not run at the destination: \(destination.log)")
                note(
                    "completed\(watch.destinationRuns ? "" : ": the destination was killed with the guest it had taken over")"
                )
            case "failed", "cancelled":
                demand(watch.sourceRuns, "\(watch.sourceStatus), and the guest does not run: \(source.log)")
                demand(!watch.destinationRuns, "\(watch.sourceStatus), and the guest runs at the destination")
                note("\(watch.sourceStatus): the guest runs at the source")
                home = source
            default: violations.append("the source's migration is '\(watch.sourceStatus)': \(source.log)")
            }
        }
        try checkEnd(of: destination, fault)
        try checkOneRuns(source, destination)
        guard let guest = home else { return }
        try verify(guest, "after the blow")
        if guest.name == source.name, violations.isEmpty { try moveOn(from: guest) }
        for vm in [source, destination] where vm.name != home?.name { _ = try? vm.client.execute("quit") }
    }

    /// After a failure a second attempt, to a fresh destination, succeeds.
    private func moveOn(from source: VM) throws {
        let destination = try startDestination(isDeferred: false)
        try source.client.execute("migrate-set-parameters", ["max-bandwidth": 0])
        try source.migrate(to: "tcp:127.0.0.1:\(destination.port())")
        try source.waitForMigration("completed")
        home = destination
        try verify(destination, "after the second attempt")
        _ = try? source.client.execute("quit")
    }

    /// Ends the doubt: the destination is asked if it lives, and else the operator knows that it does not run the guest.
    private func settle(_ watch: Watch) throws {
        let source = watch.source
        var verdict = ""
        let isSettled = source.wait(seconds: 10) {
            verdict = watch.destination.process.poll() == nil ? "ask-destination" : "resume-here"
            // The source asks by itself, too, and the answer may come meanwhile.
            _ = try? source.client.execute("x-migrate-settle", ["verdict": .string(verdict)])
            Clock.sleep(nanoseconds: 10_000_000)
            return (try? source.migrationStatus()) != "x-unsettled"
        }
        demand(isSettled, "\(verdict) does not settle it: \(source.log)\n\(watch.destination.log)")
        _ = watch.untilOver()
        note("unsettled, settled by \(verdict): \(watch.sourceStatus)")
    }

    /// A destination ends by its own word, never by a trap, and only when it failed.
    private func checkEnd(of destination: VM, _ fault: Fault) throws {
        guard let status = destination.process.poll() else { return }
        if fault.blow == .killDestination, status == .signalled(SIGKILL) { return }
        let last = destination.log.split(separator: "\n").last ?? ""
        demand(
            status == .exited(1) && last.hasPrefix("godwit: "),
            "the destination ended with \(status): \(destination.log)")
        demand(!fault.isDeferred, "a destination that was to stay ended: \(destination.log)")
    }

    /// Two processes whose guests both go on are the one thing that must never be.
    private func checkOneRuns(_ source: VM, _ destination: VM) throws {
        let before = (touches(source), touches(destination))
        guard let here = before.0, let there = before.1 else { return }
        Clock.sleep(nanoseconds: 30_000_000)
        let after = (touches(source) ?? here, touches(destination) ?? there)
        demand(after.0 == here || after.1 == there, "both guests run")
    }

    /// The guest goes on, and every page is what it must be.
    private func verify(_ vm: VM, _ when: String) throws {
        let start = touches(vm)
        demand(
            start != nil && vm.wait(seconds: 5) { touches(vm) != start }, "\(when), the guest does not go on: \(vm.log)"
        )
        let check = try vm.client.execute("x-check-guest")
        demand(check["verified"] == true, "\(when), the guest's memory is wrong: \(check["summary"] ?? .null)")
    }

    private func touches(_ vm: VM) -> UInt64? {
        (try? vm.client.execute("x-query-guest"))?["touches"]?.integerValue(as: UInt64.self)
    }

    private func demand(_ holds: Bool, _ sentence: @autoclosure () -> String) {
        if !holds { violations.append(sentence()) }
    }

    private func note(_ ending: String) { endings[ending, default: 0] += 1 }

    // MARK: Processes

    private func startGuest() throws -> VM {
        counter += 1
        let vm = try bench.startVM("guest-\(counter)", Self.guest)
        try vm.waitForGuest()
        return vm
    }

    private func startDestination(isDeferred: Bool) throws -> VM {
        counter += 1
        let uri = "tcp:127.0.0.1:0"
        let vm = try bench.startVM(
            "destination-\(counter)", ["--memory", "48M", "--incoming", isDeferred ? "defer" : uri])
        if isDeferred { try vm.client.execute("migrate-incoming", ["uri": .string(uri)]) }
        return vm
    }

    private func limit(_ source: VM) throws {
        try source.client.execute("migrate-set-parameters", ["max-bandwidth": JSON(Self.bytesPerSecond)])
        guard channels > 0 else { return }
        try source.client.execute("migrate-set-parameters", ["multifd-channels": JSON(channels)])
        try source.client.execute(
            "migrate-set-capabilities", ["capabilities": [["capability": "multifd", "state": true]]])
    }
}
