extension BigGuestSession {
    static let quantities = ["setup-ms", "total-ms", "downtime-ms", "blackout-ms", "sent-mb", "destination-mb"]

    /// A row for each guest and VMM, with what was published beside it; then the parts of Godwit's downtime.
    var resultCells: [BenchmarkCell] {
        let measured = scale.cells.filter { samples[$0] != nil }
        var cells = measured.filter { $0.vmm == .godwit }.map(row)
        cells += measured.filter { $0.vmm == .qemu }.map(row)
        cells += PublishedMigration.all.filter { published in measured.contains { $0.isLike(published) } }.map(Self.row)
        cells += measured.compactMap(partsRow)
        return cells
    }

    private func values(_ name: String, of cell: BigGuestCell) -> [Double] {
        (samples[cell] ?? []).compactMap { $0.quantities[name] }
    }

    private func row(_ cell: BigGuestCell) -> BenchmarkCell {
        BenchmarkCell(cell.parameters, Self.quantities.map { ($0, values($0, of: cell)) })
    }

    private static func row(_ published: PublishedMigration) -> BenchmarkCell {
        let figures = [
            "setup-ms": published.setupMilliseconds, "total-ms": published.totalMilliseconds,
            "downtime-ms": published.downtimeMilliseconds,
        ]
        return BenchmarkCell(
            [
                ("vmm", "published"), ("memory", "\(published.gibibytes) GiB"), ("vcpus", "\(published.cpuCount)"),
                ("non-zero", BigGuestCell.words(PublishedMigration.filledBytes)),
            ], quantities.map { ($0, figures[$0].map { [$0] } ?? []) })
    }

    private func partsRow(_ cell: BigGuestCell) -> BenchmarkCell? {
        let all = (samples[cell] ?? []).map(\.parts)
        guard let names = all.first?.map(\.name), !names.isEmpty else { return nil }
        return BenchmarkCell(
            [("what", "downtime")] + cell.parameters.dropFirst(),
            names.map { name in
                ("\(name)-ms", all.compactMap { parts in parts.first { $0.name == name }?.milliseconds })
            })
    }

    // MARK: Promises

    /// The promises for which everything was measured.
    var promises: [BenchmarkPromise] {
        var promises: [BenchmarkPromise] = []
        func add(_ name: String, _ value: Double?, limit: Double?) {
            if let value { promises.append(BenchmarkPromise(name, value, limit: limit, better: .lower)) }
        }
        add("setup-512g-ms", largest.flatMap { values("setup-ms", of: $0).median }, limit: 20)
        add("downtime-512g-ms", largest.flatMap { values("downtime-ms", of: $0).median }, limit: 20)
        add("blackout-512g-ms", largest.flatMap { values("blackout-ms", of: $0).median }, limit: nil)
        add("total-512g-vs-4g", totalRatio, limit: 1.5)
        add("failed-big-guests", samples.isEmpty && failures == 0 ? nil : Double(failures), limit: 0)
        return promises
    }

    /// The guest of 512 GiB of which most is not zero.
    private var largest: BigGuestCell? {
        scale.cells.filter { $0.vmm == .godwit && $0.gibibytes == 512 }.max { $0.filledBytes < $1.filledBytes }
    }

    /// Of pairs that were measured in the same repetition, the median of the ratios.
    private var totalRatio: Double? {
        guard let small = scale.cells.first(where: { $0.vmm == .godwit && $0.gibibytes == 4 }),
            let large = scale.cells.first(where: {
                $0.vmm == .godwit && $0.gibibytes == 512 && $0.filledBytes == small.filledBytes
            })
        else { return nil }
        let (ours, base) = (values("total-ms", of: large), values("total-ms", of: small))
        // A run that failed is told by a promise of its own; which of the others belong together is not known then.
        guard failures == 0, base.allSatisfy({ $0 > 0 }) else { return nil }
        return zip(ours, base).map { $0 / $1 }.median
    }
}

extension BigGuestCell {
    fileprivate func isLike(_ published: PublishedMigration) -> Bool {
        gibibytes == published.gibibytes && filledBytes == PublishedMigration.filledBytes
    }
}
