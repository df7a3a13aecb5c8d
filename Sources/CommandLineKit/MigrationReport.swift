/// A migration in words, in the shape of QEMU's `info migrate`, and its downtime part by part.
public struct MigrationReport: Sendable {
    public let reading: MigrationReading
    public var showsColors: Bool
    /// Characters of the longest bar.
    static let barWidth = 32

    public init(_ reading: MigrationReading, showsColors: Bool = false) {
        self.reading = reading
        self.showsColors = showsColors
    }

    /// Several lines, each with its newline.
    public var text: String {
        if reading.status == "none", reading.errorDescription == nil { return "Migration status: none\n" }
        var lines = ["Migration status: \(coloredStatus)"]
        if let error = reading.errorDescription { lines.append("error: \(error)") }
        func add(_ name: String, _ value: UInt64?, _ unit: String) {
            if let value { lines.append("\(name): \(value) \(unit)") }
        }
        add("total time", reading.totalMilliseconds, "ms")
        if reading.status != "completed" { add("expected downtime", reading.expectedDowntimeMilliseconds, "ms") }
        add("downtime", reading.downtimeMilliseconds, "ms")
        if reading.brokenSwitchovers > 0 {
            let longest = Self.milliseconds(reading.longestBrokenNanoseconds)
            lines.append("broken switchovers: \(reading.brokenSwitchovers) (longest \(longest) ms)")
        }
        add("setup", reading.setupMilliseconds, "ms")
        if let verdict = reading.verdict { lines.append("verdict: \(verdict.sentence)") }
        add("cpu throttle percentage", reading.throttlePercentage, "%")
        if reading.hasRAM { lines += ramLines }
        if let handover = reading.handover { lines.append("handover: \(handover)") }
        return lines.map { $0 + "\n" }.joined() + downtimeText + latencyText
    }

    private var coloredStatus: String {
        guard showsColors else { return reading.status }
        switch reading.status {
        case "completed": return Style.green(reading.status)
        case "failed", "cancelled", "x-unsettled", "x-paused", "postcopy-paused": return Style.red(reading.status)
        default: return Style.bold(reading.status)
        }
    }

    private var ramLines: [String] {
        var lines = [
            "transferred ram: \(reading.transferredBytes >> 10) kbytes",
            "throughput: \(Amount.decimal(throughput, digits: 2)) mbps",
            "remaining ram: \(reading.remainingBytes >> 10) kbytes",
            "total ram: \(reading.totalBytes >> 10) kbytes",
            "duplicate: \(reading.duplicatePages) pages",
            "normal: \(reading.normalPages) pages",
            "normal bytes: \(reading.normalPages &* reading.pageBytes >> 10) kbytes",
            "dirty sync count: \(reading.round)",
            "page size: \(reading.pageBytes >> 10) kbytes",
            "pages-per-second: \(reading.pagesPerSecond)",
        ]
        if reading.dirtyPagesPerSecond > 0 { lines.append("dirty pages rate: \(reading.dirtyPagesPerSecond) pages") }
        if let hole = reading.holePages { lines.append("never touched: \(hole) pages") }
        lines.append("precopy ram: \(reading.precopyBytes >> 10) kbytes")
        if reading.downtimeBytes > 0 { lines.append("downtime ram: \(reading.downtimeBytes >> 10) kbytes") }
        if reading.postcopyBytes > 0 {
            lines.append("postcopy ram: \(reading.postcopyBytes >> 10) kbytes")
            lines.append("postcopy request count: \(reading.postcopyRequests)")
        }
        return lines
    }

    /// While it goes on the last round's; of a whole migration the mean, as its last round is next to nothing.
    private var throughput: Double {
        guard reading.status == "completed", let time = reading.totalMilliseconds, time > 0 else {
            return reading.megabitsPerSecond
        }
        return Double(reading.transferredBytes) * 8 / Double(time) / 1000
    }

    /// The downtime as a whole, then a line with a bar for each part; empty where the VM did not tell. The parts are what
    /// they add up to: a rest that is in none of them has a line of its own.
    public var downtimeText: String {
        guard !reading.downtimeParts.isEmpty else { return "" }
        let sum = reading.downtimeParts.reduce(0) { $0 + $1.nanoseconds }
        let whole = max(reading.downtimeNanoseconds ?? sum, sum)
        var parts = reading.downtimeParts
        if whole > sum { parts.append(.init(name: "other", nanoseconds: whole - sum)) }
        let width = parts.map(\.name.count).max() ?? 0
        var text = "downtime \(Self.milliseconds(whole)) ms:\n"
        for part in parts {
            let name = part.name + String(repeating: " ", count: width - part.name.count)
            let time = Self.milliseconds(part.nanoseconds)
            let bar = Self.bar(part: part.nanoseconds, of: whole)
            text += "  \(name)  \(String(repeating: " ", count: max(0, 10 - time.count)))\(time) ms"
            text += bar.isEmpty ? "\n" : "  \(showsColors ? Style.blue(bar) : bar)\n"
        }
        return text
    }

    /// Exact to the microsecond.
    private static func milliseconds(_ nanoseconds: UInt64) -> String {
        Amount.decimal(Double(nanoseconds) / 1e6, digits: 3)
    }

    /// A bar in eighths of a character.
    static func bar(part: UInt64, of whole: UInt64) -> String {
        guard whole > 0 else { return "" }
        let eighths = Int((Double(part) / Double(whole) * Double(barWidth * 8)).rounded())
        let tip = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8]
        return String(repeating: "█", count: eighths / 8) + tip
    }
}
