extension PostcopySession {
    static let quantities = [
        "requests", "guest-p50-us", "guest-p90-us", "guest-p99-us", "guest-max-us", "page-p50-us", "page-p90-us",
        "page-p99-us", "page-max-us", "round-trip-us", "fault-us", "floor-us", "p50-vs-floor", "p99-vs-floor",
        "guest-p50-vs-floor", "guest-p99-vs-floor", "awake-floor-us", "p50-vs-awake-floor", "p99-vs-awake-floor",
        "total-ms", "ram-mbs",
    ]

    /// A row for each cell, the total times, and what was published.
    var resultCells: [BenchmarkCell] {
        var cells = measured.map { cell in
            BenchmarkCell(cell.parameters, Self.quantities.map { ($0, values($0, of: cell)) })
        }
        if !totals.isEmpty {
            cells.append(
                BenchmarkCell(
                    [("guest", "\(Self.idleName), \(scale.idleMegabytes >> 10) GiB")],
                    [
                        ("postcopy-ms", totals.map(\.postcopy)), ("precopy-ms", totals.map(\.precopy)),
                        ("ratio", totals.map { $0.postcopy / $0.precopy }),
                    ]))
        }
        if !measured.isEmpty { cells += PublishedLatency.all.map(\.row) }
        return cells
    }

    private var measured: [PostcopyCell] { scale.cells.filter { samples[$0] != nil } }

    func values(_ name: String, of cell: PostcopyCell) -> [Double] {
        (samples[cell] ?? []).compactMap { $0?[name] }
    }

    // MARK: Promises

    /// Of the worst cell each, with the background at full speed; only what was measured.
    var promises: [BenchmarkPromise] {
        var promises: [BenchmarkPromise] = []
        func add(_ name: String, _ value: Double?, limit: Double?) {
            if let value { promises.append(BenchmarkPromise(name, value, limit: limit, better: .lower)) }
        }
        let full = measured.filter { $0.capMegabytes == nil }
        add("p50-vs-floor", worst("p50-vs-floor", full), limit: 2)
        add("p99-vs-floor", worst("p99-vs-floor", full), limit: 5)
        add("huge-p99-vs-4k", hugeRatio, limit: 1.5)
        let wasIdleMeasured = !totals.isEmpty || (failures > 0 && options.wants(named: Self.idleName))
        add(
            "total-vs-precopy", wasIdleMeasured ? totals.map { $0.postcopy / $0.precopy }.median ?? .nan : nil,
            limit: 1.3)
        add("failed-postcopies", samples.isEmpty && totals.isEmpty && failures == 0 ? nil : Double(failures), limit: 0)
        let base = full.filter { $0 == PostcopyCell() }
        for name in ["p50-vs-floor", "p99-vs-floor"] {
            add("guest-\(name)", worst("guest-\(name)", full), limit: nil)
            // The host may not let anybody keep its processors awake.
            let awake = name.replacing("floor", with: "awake-floor")
            if full.contains(where: { !values(awake, of: $0).isEmpty }) { add(awake, worst(awake, full), limit: nil) }
            add("base-\(name)", base.isEmpty ? nil : worst(name, base), limit: nil)
        }
        return promises
    }

    /// A cell of which every run failed holds nothing.
    private func worst(_ name: String, _ cells: [PostcopyCell]) -> Double? {
        guard !cells.isEmpty else { return nil }
        let medians = cells.map { values(name, of: $0).median ?? .nan }
        return medians.contains(where: \.isNaN) ? .nan : medians.max()
    }

    /// Of huge pages to small ones, all else being equal, of pairs of the same repetition; of the worst such cell.
    private var hugeRatio: Double? {
        let ratios = measured.filter { $0.pages != .small && $0.capMegabytes == nil }.compactMap { cell -> Double? in
            var small = cell
            small.pages = .small
            guard let base = samples[small], let huge = samples[cell] else { return nil }
            return zip(huge, base).compactMap { huge, base in
                guard let huge = huge?["guest-p99-us"], let base = base?["guest-p99-us"] else { return nil }
                return huge / base
            }.median ?? .nan
        }
        return ratios.contains(where: \.isNaN) ? .nan : ratios.max()
    }
}
