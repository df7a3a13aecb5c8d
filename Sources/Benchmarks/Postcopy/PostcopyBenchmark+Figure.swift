extension PostcopyBenchmark {
    /// What the guest waited for a page, a line of bars for each share, with the floor; on a logarithmic scale.
    public static func figure(of result: BenchmarkResult) -> Figure? {
        let cells = result.cells.filter { $0.median("guest-p50-us") != nil }
        guard !cells.isEmpty else { return nil }
        let series = [
            ("floor", "floor-us"), ("p50", "guest-p50-us"), ("p90", "guest-p90-us"), ("p99", "guest-p99-us"),
            ("max", "guest-max-us"),
        ].map { name, quantity in (name: name, values: cells.map { $0.median(quantity) }) }
        let transports = ["tcp", "tls"].compactMap { transport -> Chart? in
            let indices = cells.indices.filter { value("transport", of: cells[$0]) == transport }
            guard !indices.isEmpty else { return nil }
            return Chart(
                title: "What the guest waits for a page (\(transport))", vertical: "microseconds",
                content: .bars(
                    groups: indices.map { group(of: cells[$0]) },
                    series: series.map { line in (name: line.name, values: indices.map { line.values[$0] }) }),
                hasLogarithmicY: true)
        }
        return Figure(title: "Postcopy: less is better", charts: transports)
    }

    private static func value(_ name: String, of cell: BenchmarkCell) -> String? {
        cell.parameters.first { $0.name == name }?.value
    }

    private static func group(of cell: BenchmarkCell) -> String {
        let names = ["pages", "vcpus", "channels"].compactMap { value($0, of: cell) }.joined(separator: ", ")
        guard let background = value("background", of: cell), background != "full speed" else { return names }
        return "\(names), \(background)"
    }
}
