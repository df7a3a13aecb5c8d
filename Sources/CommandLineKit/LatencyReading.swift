public import QMP

/// How long pages took that a guest which moved before its memory asked for, in nanoseconds.
public struct LatencyReading: Equatable, Sendable {
    /// Who measured it.
    public enum Place: Sendable {
        /// From the guest's access to a missing page until the page is there.
        case destination
        /// From the request that arrived until the page has left.
        case source
    }

    public let place: Place
    public let count: UInt64
    public let median: UInt64
    public let ninety: UInt64
    public let ninetyNine: UInt64
    public let longest: UInt64
    /// Counts by powers of two: element n is for 2^n up to 2^(n+1) microseconds.
    public let octaves: [UInt64]

    /// - Parameter json: what `query-migrate` returned. - Returns: `nil` as long as nothing was measured.
    public init?(_ json: JSON) {
        if let told = json["x-postcopy-latency-ns"] {
            self.init(told, json["postcopy-latency-dist"], at: .destination)
        } else if let told = json["x-postcopy-service-ns"] {
            self.init(told, told["dist"], at: .source)
        } else {
            return nil
        }
    }

    private init?(_ told: JSON, _ octaves: JSON?, at place: Place) {
        func number(_ name: String) -> UInt64? { told[name]?.integerValue(as: UInt64.self) }
        guard let count = number("count"), count > 0, let median = number("p50"), let ninety = number("p90"),
            let ninetyNine = number("p99"), let longest = number("max")
        else { return nil }
        self.place = place
        self.count = count
        self.median = median
        self.ninety = ninety
        self.ninetyNine = ninetyNine
        self.longest = longest
        self.octaves = (octaves?.arrayValue ?? []).map { $0.integerValue(as: UInt64.self) ?? 0 }
    }

    /// `p50 41 us, p99 130 us, max 2.1 ms`.
    public var words: String {
        [("p50", median), ("p99", ninetyNine), ("max", longest)].map { "\($0) \(Amount.time(nanoseconds: $1))" }.joined(
            separator: ", ")
    }
}

extension MigrationReport {
    /// What requested pages took: the shares in a line, then one with a bar for each power of two; empty where none was asked for.
    public var latencyText: String {
        guard let latency = reading.pageLatency else { return "" }
        let what =
            switch latency.place {
            case .destination: "page latency"
            case .source: "page requests at the source"
            }
        var text =
            "\(what): \(latency.count) pages, p50 \(Amount.time(nanoseconds: latency.median)), "
            + "p90 \(Amount.time(nanoseconds: latency.ninety)), p99 \(Amount.time(nanoseconds: latency.ninetyNine)), "
            + "max \(Amount.time(nanoseconds: latency.longest))\n"
        guard let first = latency.octaves.firstIndex(where: { $0 > 0 }),
            let last = latency.octaves.lastIndex(where: { $0 > 0 })
        else { return text }
        let most = latency.octaves.max() ?? 0
        func right(_ text: String, _ width: Int) -> String {
            String(repeating: " ", count: max(0, width - text.count)) + text
        }
        let width = "\(most)".count
        for octave in first...last {
            let start = octave == 0 ? "0 us" : Amount.time(nanoseconds: UInt64(1000) << UInt64(octave))
            let end = Amount.time(nanoseconds: UInt64(1000) << UInt64(octave + 1))
            let count = latency.octaves[octave]
            let bar = Self.bar(part: count, of: most)
            text += "  \(right(start, 6)) to \(right(end, 6))  \(right("\(count)", width))"
            text += bar.isEmpty ? "\n" : "  \(showsColors ? Style.blue(bar) : bar)\n"
        }
        return text
    }
}
