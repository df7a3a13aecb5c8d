/// Draws one chart at its place in the figure: axes, legend, then bars or lines.
struct ChartDrawing {
    private let chart: Chart
    private let top: Double
    private let scale: AxisScale
    /// Of a line chart.
    private let horizontalScale: AxisScale?

    private let left = 70.0
    private let right = Figure.width - 20
    private var upper: Double { top + 66 }
    private var lower: Double { top + Figure.chartHeight - 58 }

    init(_ chart: Chart, top: Double) {
        self.chart = chart
        self.top = top
        let values: [Double]
        switch chart.content {
        case .bars(_, let series):
            values = series.flatMap { $0.values.compactMap(\.self) }
            horizontalScale = nil
        case .lines(let series):
            values = series.flatMap { $0.points.map(\.y) }
            let places = series.flatMap { $0.points.map(\.x) }
            horizontalScale =
                chart.hasLogarithmicX
                ? AxisScale(logarithmicCovering: places) : AxisScale(covering: places, startsAtZero: false)
        }
        scale = chart.hasLogarithmicY ? AxisScale(logarithmicCovering: values) : AxisScale(covering: values)
    }

    var elements: [SVGElement] {
        var elements: [SVGElement] = [.label(chart.title, x: 20, y: top + 18, style: "ink chart")]
        elements += legend + verticalAxis
        switch chart.content {
        case .bars(let groups, let series): elements += bars(groups, series)
        case .lines(let series): elements += lines(series)
        }
        elements.append(.line(from: (left, lower), to: (right, lower), style: "axis"))
        elements.append(.label(chart.horizontal, x: (left + right) / 2, y: lower + 46, anchor: "middle"))
        return elements
    }

    // MARK: Axes and legend

    private func height(of value: Double) -> Double { lower - scale.fraction(of: value) * (lower - upper) }

    private var verticalAxis: [SVGElement] {
        var elements: [SVGElement] = scale.ticks.flatMap { tick -> [SVGElement] in
            let y = height(of: tick)
            return [
                .line(from: (left, y), to: (right, y), style: "grid"),
                .label(scale.text(of: tick), x: left - 6, y: y + 4, anchor: "end"),
            ]
        }
        elements.append(.label(chart.vertical, x: 18, y: (upper + lower) / 2, anchor: "middle", turned: true))
        return elements
    }

    /// A coloured square and a name for each series, on as many lines as that takes; nothing for a single one.
    private var legend: [SVGElement] {
        guard chart.seriesNames.count > 1 else { return [] }
        var (x, y) = (left, top + 28)
        return chart.seriesNames.enumerated().flatMap { index, name -> [SVGElement] in
            let width = 32 + Double(name.count) * 6.6
            if x + width > right, x > left { (x, y) = (left, y + 16) }
            defer { x += width }
            return [
                .box(x: x, y: y, width: 11, height: 11, style: "fill\(index % Figure.colourCount)"),
                .label(name, x: x + 16, y: y + 10),
            ]
        }
    }

    // MARK: Contents

    private func bars(_ groups: [String], _ series: [(name: String, values: [Double?])]) -> [SVGElement] {
        guard !groups.isEmpty, !series.isEmpty else { return [] }
        let groupWidth = (right - left) / Double(groups.count)
        let barWidth = groupWidth * 0.8 / Double(series.count)
        var elements: [SVGElement] = []
        for (place, group) in groups.enumerated() {
            let start = left + Double(place) * groupWidth + groupWidth * 0.1
            for (index, one) in series.enumerated() {
                guard one.values.indices.contains(place), let value = one.values[place], value.isFinite else {
                    continue
                }
                let y = height(of: value)
                elements.append(
                    .box(
                        x: start + Double(index) * barWidth, y: y, width: barWidth * 0.92, height: lower - y,
                        style: "fill\(index % Figure.colourCount)",
                        title: "\(one.name), \(group): \(Digits.text(value))"))
            }
            elements += groupLabel(group, middle: start + groupWidth * 0.4, width: groupWidth)
        }
        return elements
    }

    /// The group's name below its bars, on two lines where one is too long.
    private func groupLabel(_ name: String, middle: Double, width: Double) -> [SVGElement] {
        let fits = max(3, Int(width / 6.2))
        var lines = [""]
        for word in name.split(separator: " ") {
            if lines[lines.count - 1].isEmpty {
                lines[lines.count - 1] = String(word)
            } else if lines[lines.count - 1].count + word.count < fits || lines.count == 3 {
                lines[lines.count - 1] += " \(word)"
            } else {
                lines.append(String(word))
            }
        }
        return lines.enumerated().map { index, line in
            .label(line, x: middle, y: lower + 13 + Double(index) * 11, anchor: "middle", style: "ink small")
        }
    }

    private func lines(_ series: [(name: String, points: [(x: Double, y: Double)])]) -> [SVGElement] {
        guard let horizontalScale else { return [] }
        var elements = horizontalScale.ticks.map { tick -> SVGElement in
            let x = left + horizontalScale.fraction(of: tick) * (right - left)
            return .label(horizontalScale.text(of: tick), x: x, y: lower + 16, anchor: "middle")
        }
        for (index, one) in series.enumerated() {
            let colour = index % Figure.colourCount
            let places = one.points.filter { $0.x.isFinite && $0.y.isFinite }.map { point in
                (x: left + horizontalScale.fraction(of: point.x) * (right - left), y: height(of: point.y))
            }
            let path = places.map { "\(SVGElement.length($0.x)),\(SVGElement.length($0.y))" }.joined(separator: " ")
            elements.append(SVGElement("polyline", [("class", "line\(colour)"), ("points", path)]))
            for (place, point) in zip(places, one.points) {
                elements.append(
                    SVGElement(
                        "circle",
                        [
                            ("class", "fill\(colour)"), ("cx", SVGElement.length(place.x)),
                            ("cy", SVGElement.length(place.y)), ("r", "3"),
                        ],
                        children: [
                            SVGElement("title", text: "\(one.name), \(Digits.text(point.x)): \(Digits.text(point.y))")
                        ]))
            }
        }
        return elements
    }
}
