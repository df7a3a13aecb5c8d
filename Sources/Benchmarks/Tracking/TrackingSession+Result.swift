extension TrackingSession {
    /// Every cell, in the order of the tables.
    var cells: [BenchmarkCell] {
        var cells = scale.cells.compactMap { cell -> BenchmarkCell? in
            guard let samples = migrations[cell] else { return nil }
            return BenchmarkCell(cell.parameters, Self.quantities.map { ($0, samples[$0] ?? []) })
        }
        cells += collections.map { cell, milliseconds, pages in
            BenchmarkCell(
                [("what", "collect"), ("memory", "\(cell.gibibytes) GiB"), ("tracking", cell.method.rawValue)],
                [("collect-ms", milliseconds), ("dirty-pages", pages)])
        }
        cells += starts.map { size, method, before, gap, took in
            BenchmarkCell(
                [("what", "start-gap"), ("memory", "\(size) GiB"), ("tracking", method.rawValue)],
                [("gap-before-ms", before), ("gap-ms", gap), ("start-ms", took)])
        }
        cells += limits.map { limit, rates in
            BenchmarkCell([("what", "dirty-limit"), ("limit", "\(limit) MB/s")], [("rate-mbs", rates)])
        }
        return cells
    }

    /// The promises for which everything was measured.
    var promises: [BenchmarkPromise] {
        var promises: [BenchmarkPromise] = []
        func add(_ name: String, _ value: Double?, limit: Double?) {
            if let value { promises.append(BenchmarkPromise(name, value, limit: limit, better: .lower)) }
        }
        add("ring-vs-log", worstTotal(of: .ring65536, against: [.log]), limit: 1.05)
        add("ring-4096-vs-log", worstTotal(of: .ring4096, against: [.log]), limit: nil)
        add("auto-vs-best", worstTotal(of: .auto, against: [.log, .ring65536]), limit: 1.05)
        add("ring-cpu-vs-log-100mb", trackingCPURatio(at: 100), limit: 1)
        add("failed-runs", migrations.isEmpty && failures == 0 ? nil : Double(failures), limit: 0)
        add("collect-512g-vs-1g", collectRatio, limit: 1.2)
        add("dirty-limit-error", worstLimitError, limit: 0.1)
        add("start-gap-512g-ms", longestStart(gibibytes: 512), limit: nil)
        return promises
    }

    /// Loads of the tables: one at 100 MB/s in quick mode is there for its CPU time alone, and has no `auto`.
    private var comparedLoads: [TrackingLoad] {
        TrackingLoad.all.filter { load in scale.cells.contains { $0.load == load && $0.method == .auto } }
    }

    /// The largest ratio, over all loads and other methods, of a method's total time to another's: of each pair that was measured side by
    /// side in one repetition, the median over repetitions. `nil` if any of them was not measured.
    private func worstTotal(of method: TrackingMethod, against others: [TrackingMethod]) -> Double? {
        var worst: Double?
        for load in comparedLoads {
            for other in others {
                guard let ratio = pairedRatio(method, other, load, "total-ms") else { return nil }
                worst = max(worst ?? 0, ratio)
            }
        }
        return worst
    }

    private func pairedRatio(
        _ method: TrackingMethod, _ other: TrackingMethod, _ load: TrackingLoad, _ quantity: String
    ) -> Double? {
        func samples(_ method: TrackingMethod) -> [Double] {
            migrations[TrackingCell(vmm: .godwit, method: method, load: load)]?[quantity] ?? []
        }
        let (own, theirs) = (samples(method), samples(other))
        guard own.count == theirs.count, theirs.allSatisfy({ $0 > 0 }) else { return nil }
        return zip(own, theirs).map { $0 / $1 }.median
    }

    private func trackingCPURatio(at rate: UInt64) -> Double? {
        [false, true].compactMap { isRandom in
            pairedRatio(
                .ring65536, .log, TrackingLoad(megabytesPerSecond: rate, isRandom: isRandom), "tracking-cpu-ms")
        }.max()
    }

    private var collectRatio: Double? {
        func median(_ gibibytes: UInt64) -> Double? {
            collections.first { $0.cell == CollectCell(gibibytes: gibibytes, method: .ring65536) }?.milliseconds.median
        }
        guard let small = median(1), let large = median(512), small > 0 else { return nil }
        return large / small
    }

    private var worstLimitError: Double? {
        guard limits.count == DirtyLimitRun.limitsMegabytesPerSecond.count else { return nil }
        // A limit that could not be set is no limit that was kept.
        guard limits.allSatisfy({ !$0.rates.isEmpty }) else { return .nan }
        return limits.flatMap { limit, rates in rates.map { abs($0 / Double(limit) - 1) } }.max()
    }

    private func longestStart(gibibytes: UInt64) -> Double? {
        starts.filter { $0.gibibytes == gibibytes }.compactMap(\.gap.median).max()
    }
}
