import Migration

/// One made-up guest: what a dry run predicts of it, and what becomes of its migration then.
struct ForecastTrial: Sendable {
    let kind: SimulatedLoad.Kind
    let seed: UInt64
    let predicted: ConvergenceForecast.Outcome
    let truth: SimulatedMigration.Result

    init(_ kind: SimulatedLoad.Kind, seed: UInt64, place: Double) {
        let load = SimulatedLoad(kind, seed: seed, place: place)
        var migration = SimulatedMigration(load)
        let observation = migration.observe(ObservationPlan.seconds)
        var link = ConvergenceForecast.Link(bytesPerSecond: migration.linkBytesPerSecond)
        // Told by what is measured anyhow in a real dry run.
        link.roundSeconds = SimulatedMigration.collectSeconds
        link.drainSeconds = SimulatedMigration.drainSeconds
        link.overheadSeconds = SimulatedMigration.overheadSeconds
        var forecast = ConvergenceForecast(
            model: observation.model(), link: link,
            policy: SwitchoverPolicy(downtimeLimitNanoseconds: load.downtimeLimitMilliseconds * 1_000_000))
        forecast.zeroPages = Double(load.zeroPages)
        forecast.chunkCount = (load.pages + SimulatedMigration.chunkPages - 1) / SimulatedMigration.chunkPages
        forecast.writtenChunkCount = observation.chunkCount
        forecast.horizonSeconds = SimulatedMigration.horizonSeconds
        self.kind = kind
        self.seed = seed
        predicted = forecast.outcome()
        truth = migration.migrate()
    }

    var isRight: Bool { predicted.converges == truth.converges }

    /// How far the total time is off, as a part of the true one; `nil` where there is none to compare.
    var totalError: Double? {
        guard predicted.converges, truth.converges else { return nil }
        return abs(predicted.seconds - truth.seconds) / truth.seconds
    }

    var downtimeError: Double? {
        guard predicted.converges, truth.converges else { return nil }
        return abs(predicted.downtimeSeconds - truth.downtimeSeconds) / truth.downtimeSeconds
    }
}

/// Forty guests, ten of each kind.
struct ForecastSet: Sendable {
    let name: String
    let firstSeed: UInt64
    private(set) var trials: [ForecastTrial] = []
    static let perKind = 10

    init(_ name: String, firstSeed: UInt64) {
        self.name = name
        self.firstSeed = firstSeed
    }

    mutating func add(_ kind: SimulatedLoad.Kind) {
        let place = SimulatedLoad.Kind.allCases.firstIndex(of: kind) ?? 0
        for number in 0..<Self.perKind {
            // From light to heavy.
            trials.append(
                ForecastTrial(
                    kind, seed: firstSeed + UInt64(place * Self.perKind + number),
                    place: (Double(number) + 0.5) / Double(Self.perKind)))
        }
    }

    var right: Int { trials.count(where: \.isRight) }
    var errors: [Double] { trials.compactMap(\.totalError) }
    var worst: Double { errors.max() ?? .nan }

    var cells: [BenchmarkCell] {
        SimulatedLoad.Kind.allCases.compactMap { kind in
            let those = trials.filter { $0.kind == kind }
            guard let first = those.first, let last = those.last else { return nil }
            let errors = those.compactMap(\.totalError)
            return BenchmarkCell(
                [("load", kind.rawValue), ("seeds", "\(first.seed) to \(last.seed)")],
                [
                    ("right", [Double(those.count(where: \.isRight))]), ("of", [Double(those.count)]),
                    ("converge", [Double(those.count(where: \.truth.converges))]),
                    ("total-error", errors), ("worst-error", [errors.max() ?? .nan].filter { !$0.isNaN }),
                    ("within-25", [Double(errors.count { $0 <= 0.25 })]),
                    ("downtime-error", those.compactMap(\.downtimeError)),
                ])
        }
    }
}
