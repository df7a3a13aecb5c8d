extension Figure {
    static let width = 860.0
    /// From one chart's top to the next one's.
    static let chartHeight = 340.0
    private static let headHeight = 40.0

    /// The picture. The same figure gives the same bytes; colours follow the reader's light or dark scheme.
    public func svg() -> String {
        let height = Self.headHeight + Double(charts.count) * Self.chartHeight
        var children = [
            SVGElement("title", text: title), SVGElement("style", text: Self.style),
            .box(x: 0, y: 0, width: Self.width, height: height, style: "page"),
            .label(title, x: 20, y: 26, style: "ink head"),
        ]
        for (index, chart) in charts.enumerated() {
            let top = Self.headHeight + Double(index) * Self.chartHeight
            children.append(SVGElement("g", children: ChartDrawing(chart, top: top).elements))
        }
        let box = "0 0 \(SVGElement.length(Self.width)) \(SVGElement.length(height))"
        let root = SVGElement(
            "svg",
            [
                ("xmlns", "http://www.w3.org/2000/svg"), ("viewBox", box), ("width", SVGElement.length(Self.width)),
                ("height", SVGElement.length(height)), ("role", "img"),
            ], children: children)
        return root.rendered()
    }

    /// How many series have a colour of their own; the next begin again.
    static let colourCount = 8

    /// Colours that people with the common kinds of colour blindness can tell apart (after Okabe and Ito), lighter on dark.
    private static let style: String = {
        let light = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5a5a5a", "#8c6d1f"]
        let dark = ["#4aa8e0", "#ff8a3d", "#2fd0a0", "#e79bc6", "#9ad8ff", "#ffc04d", "#b0b0b0", "#d0b060"]
        func rules(_ colours: [String], page: String, ink: String, faint: String) -> String {
            var text = ".page{fill:\(page)}.ink{fill:\(ink)}.grid{stroke:\(faint)}.axis{stroke:\(ink)}"
            for (index, colour) in colours.enumerated() {
                text += ".fill\(index){fill:\(colour)}.line\(index){stroke:\(colour);fill:none;stroke-width:2}"
            }
            return text
        }
        return "text{font:12px system-ui,sans-serif}.head{font-size:16px;font-weight:600}.chart{font-weight:600}"
            + ".small{font-size:10px}" + rules(light, page: "#ffffff", ink: "#1f2328", faint: "#d8dee4")
            + "@media(prefers-color-scheme:dark){"
            + rules(dark, page: "#0d1117", ink: "#e6edf3", faint: "#30363d") + "}"
    }()
}
