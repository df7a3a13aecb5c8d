import Migration

/// `info migrate`: a migration in lines for people, laid out as QEMU 7.2 does.
struct MigrationReport {
    private let info: MigrationInfo
    private let downtimeLimitMilliseconds: UInt64

    init(_ info: MigrationInfo, downtimeLimitMilliseconds: UInt64) {
        self.info = info
        self.downtimeLimitMilliseconds = downtimeLimitMilliseconds
    }

    var lines: [String] {
        var lines: [String] = []
        if info.direction != nil, info.status != .none {
            lines += times
            if info.status != .setup, info.direction == .outgoing, let ram = info.ram { lines += Self.lines(of: ram) }
            if info.status != .setup, let xbzrle = info.xbzrle { lines += Self.lines(of: xbzrle) }
        }
        if !info.listening.isEmpty {
            lines.append("socket address: [")
            lines += info.listening.map { address in
                switch address {
                case .inet(let host, let port): "\ttcp:\(host):\(port)"
                case .unix(let path): "\tunix:\(path)"
                }
            }
            lines.append("]")
        }
        return lines
    }

    private var times: [String] {
        let error = info.errorDescription.map { " (\($0))" } ?? ""
        var lines = ["Migration status: \(info.status.rawValue)\(error)"]
        lines.append("total time: \((info.totalNanoseconds ?? 0) / 1_000_000) ms")
        if info.status == .completed, let downtime = info.downtime {
            lines.append("downtime: \(downtime.nanoseconds / 1_000_000) ms")
        }
        if info.brokenSwitchovers > 0 {
            lines.append(
                "broken switchovers: \(info.brokenSwitchovers) (longest \(info.longestBrokenNanoseconds / 1_000_000) ms)"
            )
        }
        if let expected = info.expectedMilliseconds(limit: downtimeLimitMilliseconds) {
            lines.append("expected downtime: \(expected) ms")
        }
        if let setup = info.setupNanoseconds { lines.append("setup: \(setup / 1_000_000) ms") }
        if let verdict = info.verdict { lines.append("verdict: \(verdict.sentence)") }
        if let percentage = info.throttlePercentage { lines.append("cpu throttle percentage: \(percentage)") }
        return lines
    }

    private static func lines(of ram: MigrationInfo.RAM) -> [String] {
        var lines = [
            "transferred ram: \(ram.transferred >> 10) kbytes",
            "throughput: \(hundredths(ram.mbps)) mbps",
            "remaining ram: \(ram.remaining >> 10) kbytes",
            "total ram: \(ram.total >> 10) kbytes",
            "duplicate: \(ram.duplicate) pages",
            "skipped: 0 pages",
            "normal: \(ram.normal) pages",
            "normal bytes: \(ram.normalBytes >> 10) kbytes",
            "dirty sync count: \(ram.dirtySyncCount)",
            "page size: 4 kbytes",
            "multifd bytes: \(ram.multifdBytes >> 10) kbytes",
            "pages-per-second: \(ram.pagesPerSecond)",
        ]
        if ram.dirtyPagesRate > 0 { lines.append("dirty pages rate: \(ram.dirtyPagesRate) pages") }
        if ram.precopyBytes > 0 { lines.append("precopy ram: \(ram.precopyBytes >> 10) kbytes") }
        if ram.postcopyRequests > 0 { lines.append("postcopy request count: \(ram.postcopyRequests)") }
        if ram.postcopyBytes > 0 { lines.append("postcopy ram: \(ram.postcopyBytes >> 10) kbytes") }
        if ram.downtimeBytes > 0 { lines.append("downtime ram: \(ram.downtimeBytes >> 10) kbytes") }
        return lines
    }

    private static func lines(of xbzrle: MigrationInfo.XBZRLE) -> [String] {
        [
            "cache size: \(xbzrle.cacheBytes) bytes",
            "xbzrle transferred: \(xbzrle.bytes >> 10) kbytes",
            "xbzrle pages: \(xbzrle.pages) pages",
            "xbzrle cache miss: \(xbzrle.cacheMisses) pages",
            "xbzrle cache miss rate: \(hundredths(xbzrle.cacheMissRate))",
            "xbzrle encoding rate: \(hundredths(xbzrle.encodingRate))",
            "xbzrle overflow: \(xbzrle.overflows)",
        ]
    }

    /// `0.04`: two digits after the point.
    private static func hundredths(_ value: Double) -> String {
        let all = UInt64(min(max(value, 0) * 100, 1e15).rounded())
        let fraction = all % 100
        return "\(all / 100).\(fraction < 10 ? "0" : "")\(fraction)"
    }
}
