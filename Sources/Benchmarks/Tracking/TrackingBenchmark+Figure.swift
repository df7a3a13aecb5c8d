extension TrackingBenchmark {
    /// Total time, downtime and CPU time of tracking by load, one bar for each method; then the gaps at the start.
    public static func figure(of result: BenchmarkResult) -> Figure? {
        var charts = [
            chart("Total migration time (less is better)", "total time (ms)", "total-ms", result),
            chart("Downtime", "downtime (ms)", "downtime-ms", result),
            chart("CPU time of the tracking, Godwit", "CPU time (ms)", "tracking-cpu-ms", result),
        ].compactMap(\.self)
        if let chart = startChart(result) { charts.append(chart) }
        return charts.isEmpty ? nil : Figure(title: "Dirty tracking: ring against log", charts: charts)
    }

    private static func value(_ name: String, of cell: BenchmarkCell) -> String? {
        cell.parameters.first { $0.name == name }?.value
    }

    private static func chart(
        _ title: String, _ axis: String, _ quantity: String, _ result: BenchmarkResult
    ) -> Chart? {
        let cells = result.cells.filter { value("vmm", of: $0) != nil && $0.median(quantity) != nil }
        func series(of cell: BenchmarkCell) -> String {
            "\(value("vmm", of: cell) ?? "") \(value("tracking", of: cell) ?? "")"
        }
        func group(of cell: BenchmarkCell) -> String {
            "\(value("guest", of: cell) ?? "") \(value("order", of: cell) ?? "")"
        }
        return bars(title, axis, cells, quantity, group: group, series: series)
    }

    private static func startChart(_ result: BenchmarkResult) -> Chart? {
        let cells = result.cells.filter { value("what", of: $0) == "start-gap" }
        guard !cells.isEmpty else { return nil }
        let sizes = distinct(cells.map { value("memory", of: $0) ?? "" })
        let methods = distinct(cells.map { value("tracking", of: $0) ?? "" })
        func median(_ size: String, _ method: String, _ quantity: String) -> Double? {
            cells.first { value("memory", of: $0) == size && value("tracking", of: $0) == method }?.median(quantity)
        }
        let series = methods.flatMap { method in
            [("\(method), before", "gap-before-ms"), ("\(method), as tracking starts", "gap-ms")].map {
                name, quantity in
                (name: name, values: sizes.map { median($0, method, quantity) })
            }
        }
        return Chart(
            title: "Longest standstill of the guest", vertical: "gap (ms)",
            content: .bars(groups: sizes, series: series))
    }

    private static func bars(
        _ title: String, _ axis: String, _ cells: [BenchmarkCell], _ quantity: String,
        group: (BenchmarkCell) -> String, series: (BenchmarkCell) -> String
    ) -> Chart? {
        guard !cells.isEmpty else { return nil }
        let groups = distinct(cells.map(group))
        let names = distinct(cells.map(series))
        let values = names.map { name in
            (
                name: name,
                values: groups.map { place in
                    cells.first { group($0) == place && series($0) == name }?.median(quantity)
                }
            )
        }
        return Chart(title: title, vertical: axis, content: .bars(groups: groups, series: values))
    }

    private static func distinct(_ names: [String]) -> [String] {
        var known: [String] = []
        for name in names where !known.contains(name) { known.append(name) }
        return known
    }
}
