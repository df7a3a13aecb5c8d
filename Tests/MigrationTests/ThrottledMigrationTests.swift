import Accelerator
import GuestPrograms
import Host
import Machine
import TestSupport
import Testing

@testable import Migration

@Suite("migrations of guests that write too much", .serialized, .enabled(if: hasKVM, needsKVM))
struct ThrottledMigrationTests {
    /// Writes without a pause, far more than any link here carries, even on a host that lets it run now and then only.
    private static let guest = "dirty,working-set=48M,random"

    private static func parameters(
        _ migrator: Migrator, limitMilliseconds: UInt64, megabytesPerSecond: UInt64 = 40
    ) throws {
        var parameters = migrator.parameters
        parameters.maxBandwidthBytesPerSecond = megabytesPerSecond * 1_000_000
        parameters.downtimeLimitMilliseconds = limitMilliseconds
        try migrator.set(parameters)
    }

    @Test(
        "a migration that cannot converge says so with a remedy, and the remedy makes it converge",
        .timeLimit(.minutes(10)))
    func verdict() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 100) {
                let source = try Migrator.source(Self.guest)
                let destination = try source.destination()
                try Self.parameters(source, limitMilliseconds: 20, megabytesPerSecond: 20)
                try source.migrate(to: destination.listen())
                claim(source.info().verdict?.state != .notConverging, "it was judged before anything was seen")
                try waitFor("the verdict, it is \(source.info().verdict?.sentence ?? "none")", seconds: 40) {
                    source.info().verdict?.state == .notConverging
                }
                let verdict = source.info().verdict
                claim(verdict?.sentence.contains("not converging: ") == true, "\(verdict?.sentence ?? "none")")
                // A host too busy for 20 MB/s is limited by itself.
                let link = verdict?.linkBytesPerSecond ?? 0
                claim(
                    verdict?.isCapped == true || link < 16_000_000,
                    "the limit is max-bandwidth, and the verdict does not know at \(link) bytes/s")
                guard let remedy = try Self.apply(source) else { Child.fail("no remedy: \(verdict!.sentence)") }
                let told = { "with \(remedy); now: \(source.info().verdict?.sentence ?? "no verdict")" }
                let deadline = Deadline.after(seconds: 40)
                while !source.isOver, !deadline.hasPassed { Clock.sleep(nanoseconds: 20_000_000) }
                try source.claimArrival(at: destination, told())
            }
        }
    }

    /// Does what the verdict proposes first. - Returns: what that was; `nil` if it is not against the migration, or proposes no number.
    private static func apply(_ migrator: Migrator) throws -> ConvergenceRemedy? {
        guard let verdict = migrator.info().verdict, verdict.state == .notConverging else { return nil }
        var parameters = migrator.parameters
        // Operators change numbers under way; a capability they would set before the next attempt.
        for remedy in verdict.remedies {
            switch remedy {
            case .downtimeLimit(let milliseconds): parameters.downtimeLimitMilliseconds = milliseconds
            case .bandwidth(let rate): parameters.maxBandwidthBytesPerSecond = rate
            case .autoConverge: continue
            }
            try migrator.set(parameters)
            return remedy
        }
        return nil
    }

    @Test(
        "auto-converge throttles a guest until it converges, and lets go of it then", .timeLimit(.minutes(10)),
        arguments: [true, false])
    func autoConverge(completes: Bool) async {
        await #expect(processExitsWith: .success) { [completes] in
            Child.run(seconds: 100) {
                let source = try Migrator.source("dirty,working-set=24M,random,rate=160M", mebibytes: 48)
                let destination = try source.destination()
                // Not to end before it is throttled, even where the host lets the guest run now and then only.
                try Self.parameters(source, limitMilliseconds: 1)
                try source.set(.autoConverge, true)
                try source.migrate(to: destination.listen())
                var most: UInt64 = 0
                try waitFor("the guest to be throttled", seconds: 40) {
                    most = max(most, source.info().throttlePercentage ?? 0)
                    return most > 0
                }
                claim(most == 20, "the first step was \(most) %")
                if completes {
                    try Self.parameters(source, limitMilliseconds: 200)
                    try waitFor("the migration's end", seconds: 60) {
                        most = max(most, source.info().throttlePercentage ?? 0)
                        return source.isOver
                    }
                    try source.claimArrival(at: destination, "throttled to \(most) %")
                } else {
                    try source.cancel()
                    try source.awaitEnd(.cancelled)
                    try source.claimGuestRuns("after the cancel")
                    let before = try source.machine.guestStatus().touches
                    Clock.sleep(nanoseconds: 500_000_000)
                    let rate = Double(try source.machine.guestStatus().touches - before) * 4096 / 0.5
                    claim(rate > 60e6, "after the cancel the guest writes \(rate) bytes/s of 160 MB/s")
                }
                claim(source.info().throttlePercentage == nil, "it is still said to be throttled")
            }
        }
    }

    @Test("dirty-limit limits what a vCPU with a ring dirties until the migration ends", .timeLimit(.minutes(10)))
    func dirtyLimit() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                let machine = try VirtualMachine(
                    MachineConfiguration(
                        memoryByteCount: 64 << 20, cpuCount: 1,
                        boot: .guest(try GuestProgram(parsing: "dirty,working-set=32M,random,rate=120M")),
                        dirtyTracking: .ring(entryCount: 4096)), serial: SerialPort(.none))
                try machine.resume()
                try waitFor("the guest to be ready") { try machine.guestStatus().isReady }
                let source = Migrator(machine)
                let destination = try source.destination()
                try source.set(.dirtyLimit, true)
                do {
                    try source.set(.autoConverge, true)
                    Child.fail("both ways to slow a guest down were taken")
                } catch { claim("\(error)".contains("dirty-limit"), "\(error)") }
                try Self.parameters(source, limitMilliseconds: 100)
                var parameters = source.parameters
                parameters.vcpuDirtyLimitMegabytes = 8
                parameters.vcpuDirtyLimitPeriodMilliseconds = 200
                try source.set(parameters)
                try source.migrate(to: destination.listen())
                try waitFor("the limit") { !(machine.accelerator?.dirtyRateControl?.limits.isEmpty ?? true) }
                var figures: (UInt64, UInt64) = (0, 0)
                try waitFor("the migration's end", seconds: 40) {
                    let info = source.info()
                    if let full = info.dirtyLimitRingFullMicroseconds, full > 0 {
                        figures = (info.dirtyLimitThrottleMicroseconds ?? 0, full)
                    }
                    return source.isOver
                }
                try source.claimArrival(at: destination, "limited to 8 MB/s")
                claim(machine.accelerator?.dirtyRateControl?.limits.isEmpty == true, "the limit is still there")
                parameters.vcpuDirtyLimitMegabytes = 9
                try source.set(parameters)
                claim(machine.accelerator?.dirtyRateControl?.limits.isEmpty == true, "a number for later limits now")
                // 4096 pages at 8 MB/s are two seconds.
                claim((200_000...60_000_000).contains(figures.1), "a ring is said to last \(figures.1) us")
                claim(figures.0 <= figures.1, "\(figures)")
            }
        }
    }

    @Test("a dry run tells a guest that converges from one that does not, and moves nothing", .timeLimit(.minutes(10)))
    func dryRun() async {
        await #expect(processExitsWith: .success) {
            Child.run(seconds: 60) {
                let light = try Migrator.source("dirty,working-set=32M,random,rate=8M")
                do {
                    _ = try light.dryRun()
                    Child.fail("a dry run was made without a link")
                } catch { claim("\(error)".contains("--bandwidth"), "\(error)") }
                let good = try light.dryRun(.init(bandwidth: 200_000_000))
                claim(good.verdict.state == .converging, good.verdict.sentence)
                claim(good.linkSource == .argument && good.collects > 20, "\(good)")
                claim((0.2...1).contains(Double(good.outcome.seconds)), "64 MiB at 200 MB/s take \(good.outcome)")
                claim(light.info().status == .none && light.machine.runState == .running, "\(light.info())")
                try light.claimGuestRuns("after the dry run")
                let bad = try light.dryRun(.init(bandwidth: 2_000_000, downtimeLimitMilliseconds: 20))
                claim(bad.verdict.state == .notConverging, bad.verdict.sentence)
                claim(!bad.verdict.remedies.isEmpty, bad.verdict.sentence)
                // No number of an operator's is too large to be reckoned with.
                let absurd = try light.dryRun(.init(bandwidth: .max, downtimeLimitMilliseconds: 0))
                claim(absurd.collects > 20, "\(absurd)")
                claim(light.parameters == MigrationParameters(), "the dry run changed \(light.parameters)")
            }
        }
    }
}
