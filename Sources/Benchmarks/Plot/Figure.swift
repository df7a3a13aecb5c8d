/// A picture of a result: charts below each other. Written as SVG by `svg`.
public struct Figure: Sendable {
    public var title: String
    public var charts: [Chart]

    public init(title: String, charts: [Chart]) {
        self.title = title
        self.charts = charts
    }
}

/// One chart of a figure.
public struct Chart: Sendable {
    public enum Content: Sendable {
        /// For each group one bar per series; `nil` where nothing was measured.
        case bars(groups: [String], series: [(name: String, values: [Double?])])
        /// For each series a line through its points, in the order given.
        case lines(series: [(name: String, points: [(x: Double, y: Double)])])
    }

    public var title: String
    /// What stands along the axes, with its unit: `total time (ms)`.
    public var horizontal: String
    public var vertical: String
    public var content: Content
    public var hasLogarithmicX = false
    public var hasLogarithmicY = false

    public init(
        title: String, horizontal: String = "", vertical: String, content: Content, hasLogarithmicX: Bool = false,
        hasLogarithmicY: Bool = false
    ) {
        self.title = title
        self.horizontal = horizontal
        self.vertical = vertical
        self.content = content
        self.hasLogarithmicX = hasLogarithmicX
        self.hasLogarithmicY = hasLogarithmicY
    }

    var seriesNames: [String] {
        switch content {
        case .bars(_, let series): series.map(\.name)
        case .lines(let series): series.map(\.name)
        }
    }
}

extension BenchmarkReport {
    /// What `--plot` draws: the benchmark's own figure, else the medians of each cell's first quantity.
    public var figure: Figure {
        let benchmark = BenchmarkList.all.first { $0.name == result.bench }
        if let own = benchmark?.figure(of: result) { return own }
        var names: [String] = []
        for cell in result.cells {
            if let name = cell.quantities.first?.name, !names.contains(name) { names.append(name) }
        }
        return Figure(
            title: "godwit bench \(result.bench)",
            charts: names.map { name in
                let cells = result.cells.filter { $0.quantities.first?.name == name }
                return Chart(
                    title: name, vertical: name,
                    content: .bars(groups: cells.map(\.name), series: [(name, cells.map { $0.median(name) })]))
            })
    }
}
