/// What the founding thread reports of its series for a channel of requested pages: the mean time of a page request, in milliseconds.
///
/// Other machines with a network between them, and whole huge pages.
struct PublishedLatency: Sendable {
    let pages: String
    let series: String
    let milliseconds: Double

    static let all = [
        PublishedLatency(pages: "4 KiB", series: "before", milliseconds: 10.68),
        PublishedLatency(pages: "4 KiB", series: "with it", milliseconds: 0.57),
        PublishedLatency(pages: "2 MiB", series: "with it", milliseconds: 5.02),
        PublishedLatency(pages: "1 GiB", series: "with it", milliseconds: 649),
    ]

    var row: BenchmarkCell {
        BenchmarkCell([("published", pages), ("series", series)], [("mean-us", [milliseconds * 1000])])
    }
}
