import CommandLineKit
import Host
import QMP

/// A real guest over a paced link: what its dry run predicts, and the migration that follows.
struct RealForecast {
    let name: String
    let guest: String
    let megabytesPerSecond: UInt64
    let downtimeLimitMilliseconds: UInt64

    private static let memoryMegabytes = 512
    private static let settleMilliseconds: UInt64 = 500
    /// A migration that goes on for this much longer than its dry run would have allowed does not converge.
    private static let patienceSeconds: UInt64 = 20

    /// Light to heavy, in both orders; a guest with a hot spot that fits the downtime, and one whose does not.
    private static let all = [
        RealForecast(
            name: "random 60 MB/s", guest: "dirty,working-set=256M,rate=60M,random", megabytesPerSecond: 200,
            downtimeLimitMilliseconds: 100),
        RealForecast(
            name: "random 400 MB/s", guest: "dirty,working-set=384M,rate=400M,random", megabytesPerSecond: 200,
            downtimeLimitMilliseconds: 100),
        RealForecast(
            name: "sequential 80 MB/s", guest: "dirty,working-set=256M,rate=80M,sequential", megabytesPerSecond: 200,
            downtimeLimitMilliseconds: 100),
        RealForecast(
            name: "hot 8M unlimited", guest: "dirty,working-set=8M,random", megabytesPerSecond: 200,
            downtimeLimitMilliseconds: 100),
        RealForecast(
            name: "hot 64M unlimited", guest: "dirty,working-set=64M,random", megabytesPerSecond: 200,
            downtimeLimitMilliseconds: 100),
    ]
    private static let quickCount = 2

    static func cells(_ options: BenchmarkOptions) throws -> [BenchmarkCell] {
        let runs = max(1, options.runs ?? 1)
        return try (options.isQuick ? Array(all.prefix(quickCount)) : all).compactMap { trial in
            guard options.wants(named: "real \(trial.name)") else { return nil }
            var quantities: [(name: String, samples: [Double])] = []
            for _ in 0..<runs {
                try options.checkInterruption()
                options.progress("real guest: \(trial.name)")
                for (name, value) in try trial.measure(options) {
                    if let index = quantities.firstIndex(where: { $0.name == name }) {
                        quantities[index].samples.append(value)
                    } else {
                        quantities.append((name, [value]))
                    }
                }
            }
            return BenchmarkCell([("guests", "real"), ("load", trial.name), ("seeds", "-")], quantities)
        }
    }

    private func measure(_ options: BenchmarkOptions) throws -> [(String, Double)] {
        let folder = try PrivateFolder("bench")
        defer { folder.remove() }
        let memory = ["--memory", "\(Self.memoryMegabytes)M", "--serial", "none"]
        let source = try ChildVM("source", in: folder.path, options: memory + ["--guest", guest])
        defer { source.end() }
        let destination = try ChildVM(
            "destination", in: folder.path, options: memory + ["--incoming", "tcp:127.0.0.1:0"])
        defer { destination.end() }
        try source.execute(
            "migrate-set-parameters",
            [
                "max-bandwidth": JSON(megabytesPerSecond * 1_000_000),
                "downtime-limit": JSON(downtimeLimitMilliseconds),
            ])
        try options.waitUntilReady(name) { try source.execute("x-query-guest")["ready"] == true }
        let before = try rate(of: source)
        guard before > 0 else { throw CommandFailure("\(name): the guest touches nothing") }
        let began = Clock.monotonicNanoseconds
        let touchesBefore = try touches(of: source)
        let prediction = try source.execute("x-migrate-dry-run", deadline: .after(seconds: 60))
        let watched = Double(Clock.monotonicNanoseconds - began) / 1e9
        let during = Double(try touches(of: source) - touchesBefore) / watched
        let answer = try migrate(source, to: destination.listeningAddress(), options)
        let predicted = VerdictReading(prediction)?.state == .converging
        let reading = MigrationReading(answer)
        let converged = reading.status == "completed"
        var quantities: [(String, Double)] = [
            ("right", predicted == converged ? 1 : 0), ("of", 1), ("converge", converged ? 1 : 0),
            ("guest-speed-while-watched", during / before),
        ]
        if predicted, converged { quantities += try compare(prediction, with: reading) }
        return quantities
    }

    /// What was predicted beside what came of it.
    private func compare(_ prediction: JSON, with reading: MigrationReading) throws -> [(String, Double)] {
        guard let expected = prediction["expected-total-ms"]?.doubleValue,
            let downtime = prediction["expected-downtime-ms"]?.doubleValue
        else { throw CommandFailure("\(name): the dry run that converges does not tell total time and downtime") }
        let figures = try MigrationFigures(reading, of: name)
        let total = max(1, figures.totalMilliseconds)
        return [
            ("total-error", abs(expected - total) / total), ("predicted-ms", expected), ("total-ms", total),
            // Less than one: the host was too busy for the link to be what limits, which no dry run knows of.
            ("link-share", Double(figures.transferredBytes) / total / 1000 / Double(megabytesPerSecond)),
            ("predicted-downtime-ms", downtime), ("downtime-ms", figures.downtimeMilliseconds),
        ]
    }

    private func touches(of vm: ChildVM) throws -> UInt64 {
        try vm.touches(vm.execute("x-query-guest"))
    }

    private func rate(of vm: ChildVM) throws -> Double {
        let (began, first) = (Clock.monotonicNanoseconds, try touches(of: vm))
        Clock.sleep(nanoseconds: Self.settleMilliseconds * 1_000_000)
        let second = try touches(of: vm)
        return Double(second - first) / (Double(Clock.monotonicNanoseconds - began) / 1e9)
    }

    /// - Returns: the last look at it; one that does not converge is cancelled when patience ends.
    private func migrate(_ vm: ChildVM, to uri: String, _ options: BenchmarkOptions) throws -> JSON {
        try vm.execute("migrate", ["uri": .string(uri)])
        let deadline = Deadline.after(seconds: Self.patienceSeconds)
        while true {
            try options.checkInterruption()
            let answer = try vm.execute("query-migrate")
            let reading = MigrationReading(answer)
            if reading.isOver {
                if reading.status == "failed" { try reading.requireCompletion(of: name, to: uri) }
                return answer
            }
            guard !deadline.hasPassed else {
                try vm.execute("migrate_cancel")
                return answer
            }
            Clock.sleep(nanoseconds: 50_000_000)
        }
    }
}
