import Testing

@testable import Benchmarks

@Suite("plots")
struct PlotTests {
    private static let charts = [
        Chart(
            title: "bars & <bars>", vertical: "total \"time\" (ms)",
            content: .bars(
                groups: ["100 MB/s sequential", "unthrottled"],
                series: [("log", [10, 20]), ("ring\u{1}", [nil, 15]), ("auto", [.nan, 0])])),
        Chart(
            title: "lines", horizontal: "GiB", vertical: "ms",
            content: .lines(series: [("a", [(1, 2), (512, 3), (8192, .infinity)]), ("b", [(1, 0), (512, 1)])]),
            hasLogarithmicX: true),
        Chart(title: "nothing", vertical: "", content: .bars(groups: [], series: [])),
        Chart(title: "no points", vertical: "", content: .lines(series: [("none", [])]), hasLogarithmicY: true),
    ]

    @Test("what is drawn is well-formed XML, whatever the names and values are")
    func wellFormed() throws {
        let svg = Figure(title: "a < b & c > \"d\"", charts: Self.charts).svg()
        let markup = try WellFormedMarkup(svg)
        #expect(markup.elements["svg"] == 1)
        #expect(markup.elements["polyline"] == 3)
        #expect(markup.texts.contains("a &lt; b &amp; c &gt; &quot;d&quot;"))
        #expect(!svg.unicodeScalars.contains { $0.value < 0x20 && $0 != "\n" })
        #expect(!svg.contains("nan") && !svg.contains("inf"))
    }

    @Test("the reader of markup finds what is not well-formed")
    func faults() {
        for bad in ["<a>", "<a></b>", "<a b=c/>", "<a>&x</a>", "<a b=\"1\" b=\"2\"/>", "<a", "x<a/>"] {
            #expect(throws: WellFormedMarkup.Fault.self, "\(bad)") { try WellFormedMarkup(bad) }
        }
    }

    @Test("one figure is always the same bytes, with colours for light and dark")
    func deterministic() {
        let figure = Figure(title: "t", charts: Self.charts)
        #expect(figure.svg() == figure.svg())
        #expect(figure.svg().contains("prefers-color-scheme:dark"))
    }

    @Test("a bar is drawn for each value that was measured, and none for the others")
    func barCount() throws {
        let chart = Chart(
            title: "", vertical: "", content: .bars(groups: ["x", "y"], series: [("a", [1, nil]), ("b", [2, .nan])]))
        let markup = try WellFormedMarkup(Figure(title: "t", charts: [chart]).svg())
        // The page, two squares of the legend, two bars.
        #expect(markup.elements["rect"] == 5)
        #expect(markup.texts.contains("b, x: 2"))
    }

    @Test("a bar twice as large is twice as high")
    func proportion() throws {
        let chart = Chart(title: "", vertical: "", content: .bars(groups: ["x", "y"], series: [("a", [50, 100])]))
        let heights = Figure(title: "t", charts: [chart]).svg().split(separator: "\n")
            .filter { $0.contains("class=\"fill0\"") }
            .compactMap { line -> Double? in
                guard let start = line.firstRange(of: "height=\"") else { return nil }
                return Double(line[start.upperBound...].prefix { $0 != "\"" })
            }
        try #require(heights.count == 2)
        #expect(abs(heights[1] - 2 * heights[0]) < 0.2, "\(heights)")
    }

    @Test(
        "an axis covers its values with round numbers",
        arguments: [[3.0], [0, 0], [0.031, 0.07], [99, 101], [1e9, 5e9], [-5, 5], []])
    func axis(values: [Double]) {
        let scale = AxisScale(covering: values)
        #expect(scale.lower <= min(0, values.min() ?? 0) && scale.upper >= values.max() ?? 0)
        #expect((2...22).contains(scale.ticks.count))
        #expect(scale.upper > scale.lower)
        #expect(Set(scale.ticks.map { scale.text(of: $0) }).count == scale.ticks.count, "\(scale)")
    }

    @Test("equal factors are equal distances on a logarithmic axis")
    func logarithmic() {
        let scale = AxisScale(logarithmicCovering: [1, 8192])
        #expect(scale.lower == 1 && scale.upper == 10_000)
        #expect(abs(scale.fraction(of: 100) - 0.5) < 1e-9)
        #expect(scale.fraction(of: 0) == 0 && scale.fraction(of: -1) == 0)
    }
}
