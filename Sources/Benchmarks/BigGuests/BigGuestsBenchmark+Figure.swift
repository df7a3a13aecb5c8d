extension BigGuestsBenchmark {
    /// Total time, setup and downtime of each guest, a bar for each VMM, on logarithmic scales.
    public static func figure(of result: BenchmarkResult) -> Figure? {
        let cells = result.cells.filter { value("vmm", of: $0) != nil }
        guard !cells.isEmpty else { return nil }
        let charts = [
            ("Total migration time", "total time (ms)", "total-ms"), ("Setup", "setup (ms)", "setup-ms"),
            ("Downtime", "downtime (ms)", "downtime-ms"),
        ].compactMap { title, axis, quantity in chart(title, axis, quantity, cells) }
        return charts.isEmpty ? nil : Figure(title: "Big guests: less is better", charts: charts)
    }

    private static func value(_ name: String, of cell: BenchmarkCell) -> String? {
        cell.parameters.first { $0.name == name }?.value
    }

    private static func guest(of cell: BenchmarkCell) -> String {
        "\(value("memory", of: cell) ?? ""), \(value("vcpus", of: cell) ?? "") vCPUs, \(value("non-zero", of: cell) ?? "")"
    }

    private static func chart(
        _ title: String, _ axis: String, _ quantity: String, _ cells: [BenchmarkCell]
    ) -> Chart? {
        let shown = cells.filter { $0.median(quantity) != nil }
        guard !shown.isEmpty else { return nil }
        var guests: [String] = []
        for cell in shown where !guests.contains(guest(of: cell)) { guests.append(guest(of: cell)) }
        var vmms: [String] = []
        for cell in shown { if let vmm = value("vmm", of: cell), !vmms.contains(vmm) { vmms.append(vmm) } }
        let series = vmms.map { vmm in
            (
                name: vmm,
                values: guests.map { name in
                    shown.first { value("vmm", of: $0) == vmm && guest(of: $0) == name }?.median(quantity)
                }
            )
        }
        return Chart(
            title: title, vertical: axis, content: .bars(groups: guests, series: series), hasLogarithmicY: true)
    }
}
