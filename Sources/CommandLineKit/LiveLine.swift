/// The line that shows a migration while it goes on.
public struct LiveLine: Sendable {
    /// Emphasis, or nothing at all where that is not wanted.
    public var showsColors: Bool

    public init(showsColors: Bool = false) { self.showsColors = showsColors }

    /// `round 3   97.2%   1.84 GB/s   dirty 412 MB/s   downtime ~12 ms   left ~800 ms`, at most `width` columns: what does
    /// not fit is left out from the right.
    public func text(_ figures: MigrationProgress.Figures, width: Int = .max) -> String {
        guard figures.round > 0 else { return figures.status }
        var fields = ["round \(figures.round)", Amount.decimal(figures.percent, digits: 1) + "%"]
        if figures.status != "active" { fields.append(figures.status) }
        fields.append(Amount.rate(figures.bytesPerSecond))
        if figures.status == "postcopy-active" {
            // The guest runs there and dirties nothing here.
            fields += ["\(figures.pagesLeft) pages left", "\(figures.requests) requested"]
            if let latency = figures.latency { fields.append(latency.words) }
        } else {
            fields.append("dirty \(Amount.rate(figures.dirtyBytesPerSecond))")
        }
        if let downtime = figures.expectedDowntimeNanoseconds {
            fields.append(downtime == 0 ? "downtime <1 ms" : "downtime ~\(Amount.time(nanoseconds: downtime))")
        }
        if let percentage = figures.throttlePercentage { fields.append("throttled \(percentage)%") }
        if figures.status == "active" { fields.append(Self.outlook(figures)) }
        // A sentence that does not fit is left at its first words.
        if figures.status == "active", figures.verdict?.state == .notConverging,
            fields.joined(separator: "   ").count > width
        {
            fields[fields.count - 1] = "not converging"
        }
        while fields.count > 1, fields.joined(separator: "   ").count > width { fields.removeLast() }
        let line = fields.joined(separator: "   ")
        guard showsColors, let head = fields.first else { return line }
        return Style.bold(head) + line.dropFirst(head.count)
    }

    /// What the VM says about the end, else what the rates do.
    private static func outlook(_ figures: MigrationProgress.Figures) -> String {
        switch figures.verdict?.state {
        case .notConverging?: return figures.verdict?.sentence ?? "not converging"
        case .converging?:
            return "left ~\(Amount.time(nanoseconds: (figures.verdict?.millisecondsLeft ?? 0) &* 1_000_000))"
        case .observing?, nil:
            if figures.verdict != nil, figures.nanosecondsLeft == nil { return "observing" }
            return figures.nanosecondsLeft.map { "left ~\(Amount.time(nanoseconds: $0))" } ?? "not converging"
        }
    }

    /// What a terminal is sent to replace the line by another.
    public static func replacing(_ text: String) -> String { "\r\u{1B}[2K\(text)" }
    /// What a terminal is sent to take the line away.
    public static let removal = "\r\u{1B}[2K"
}

/// Emphasis on a terminal that takes colours.
public enum Style {
    public static func bold(_ text: String) -> String { "\u{1B}[1m\(text)\u{1B}[0m" }
    public static func green(_ text: String) -> String { "\u{1B}[32m\(text)\u{1B}[0m" }
    public static func red(_ text: String) -> String { "\u{1B}[31m\(text)\u{1B}[0m" }
    public static func blue(_ text: String) -> String { "\u{1B}[34m\(text)\u{1B}[0m" }
}
