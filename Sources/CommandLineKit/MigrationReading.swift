public import QMP

/// One look at a migration: what `query-migrate` returned, as values. Members a VM did not tell are zero or `nil`.
public struct MigrationReading: Equatable, Sendable {
    /// A stretch of the time in which the guest stood still.
    public struct DowntimePart: Equatable, Sendable {
        public let name: String
        public let nanoseconds: UInt64
    }

    /// QEMU's word, `x-paused` or `x-unsettled`; `none` before any migration.
    public let status: String
    /// Bytes of guest RAM, and of those that are known to need sending.
    public let totalBytes: UInt64
    public let remainingBytes: UInt64
    /// Bytes on the wire.
    public let transferredBytes: UInt64
    public let duplicatePages: UInt64
    public let normalPages: UInt64
    public let holePages: UInt64?
    public let pageBytes: UInt64
    /// Times that the dirty pages were collected.
    public let round: UInt64
    public let dirtyPagesPerSecond: UInt64
    public let pagesPerSecond: UInt64
    /// 10^6 bits per second.
    public let megabitsPerSecond: Double
    public let precopyBytes: UInt64
    public let downtimeBytes: UInt64
    /// Sent after the guest moved, and how often it asked for pages.
    public let postcopyBytes: UInt64
    public let postcopyRequests: UInt64
    /// What those requests took; `nil` before the first.
    public let pageLatency: LatencyReading?
    public let totalMilliseconds: UInt64?
    public let setupMilliseconds: UInt64?
    /// `nil` as long as nothing was measured: what the VM tells then is its limit.
    public let expectedDowntimeMilliseconds: UInt64?
    public let downtimeMilliseconds: UInt64?
    public let downtimeNanoseconds: UInt64?
    public let downtimeParts: [DowntimePart]
    /// Switchovers that were broken off to keep the downtime limit, and the longest standstill among them.
    public let brokenSwitchovers: UInt64
    public let longestBrokenNanoseconds: UInt64
    /// By which rule the right to run was handed over.
    public let handover: String?
    /// Why it failed, or what an operator must settle.
    public let errorDescription: String?
    /// Whether it gets to its end (`x-verdict`); `nil` where the VM does not tell.
    public let verdict: VerdictReading?
    /// The part of its time in which the guest is kept from running, in percent; `nil` while it is not.
    public let throttlePercentage: UInt64?
    /// Whether there are figures about RAM at all.
    public let hasRAM: Bool

    public init(_ json: JSON) {
        let ram = json["ram"]
        func count(_ name: String) -> UInt64 { ram?[name]?.integerValue(as: UInt64.self) ?? 0 }
        func milliseconds(_ name: String) -> UInt64? { json[name]?.integerValue(as: UInt64.self) }
        status = json["status"]?.stringValue ?? "none"
        hasRAM = ram != nil
        totalBytes = count("total")
        remainingBytes = count("remaining")
        transferredBytes = count("transferred")
        duplicatePages = count("duplicate")
        normalPages = count("normal")
        holePages = (ram?["x-hole"] ?? json["x-hole"])?.integerValue(as: UInt64.self)
        pageBytes = ram?["page-size"]?.integerValue(as: UInt64.self) ?? 4096
        round = count("dirty-sync-count")
        dirtyPagesPerSecond = count("dirty-pages-rate")
        pagesPerSecond = count("pages-per-second")
        megabitsPerSecond = ram?["mbps"]?.doubleValue ?? 0
        precopyBytes = count("precopy-bytes")
        downtimeBytes = count("downtime-bytes")
        postcopyBytes = count("postcopy-bytes")
        postcopyRequests = count("postcopy-requests")
        pageLatency = LatencyReading(json)
        totalMilliseconds = milliseconds("total-time")
        setupMilliseconds = milliseconds("setup-time")
        expectedDowntimeMilliseconds =
            json["x-expected-downtime-unknown"] == true ? nil : milliseconds("expected-downtime")
        downtimeMilliseconds = milliseconds("downtime")
        downtimeNanoseconds = json["x-downtime-ns"]?.integerValue(as: UInt64.self)
        downtimeParts = Self.parts(json["x-downtime-parts"])
        let broken = json["x-broken-switchovers"]
        brokenSwitchovers = broken?["count"]?.integerValue(as: UInt64.self) ?? 0
        longestBrokenNanoseconds = broken?["longest-ns"]?.integerValue(as: UInt64.self) ?? 0
        handover = json["x-handover"]?.stringValue
        errorDescription = json["error-desc"]?.stringValue
        verdict = VerdictReading(json["x-verdict"])
        throttlePercentage = milliseconds("cpu-throttle-percentage")
    }

    /// `[{"name": "stop", "nanoseconds": 1200}, ...]`, in the order in which it happened.
    private static func parts(_ json: JSON?) -> [DowntimePart] {
        (json?.arrayValue ?? []).compactMap { part in
            guard let name = part["name"]?.stringValue,
                let nanoseconds = part["nanoseconds"]?.integerValue(as: UInt64.self)
            else { return nil }
            return DowntimePart(name: name, nanoseconds: nanoseconds)
        }
    }

    /// Whether the migration is over, one way or the other, or waits for an operator.
    public var isOver: Bool {
        ["completed", "failed", "cancelled", "x-unsettled", "x-paused", "postcopy-paused"].contains(status)
    }
}

extension MigrationReading {
    /// - Throws: `CommandFailure` that says what became of the migration and of the guest, unless it was completed.
    public func requireCompletion(of vm: String, to uri: String) throws(CommandFailure) {
        let what = "migration of \(vm) to \(uri)"
        switch status {
        case "completed": return
        case "cancelled": throw CommandFailure("\(what) was cancelled; the guest is here as before")
        case "x-paused":
            throw CommandFailure(
                "\(what) is paused: \(errorDescription ?? "the connection was lost"); the guest runs here; go on with "
                    + "'godwit migrate \(vm) --resume \(uri)', or end it with 'godwit migrate \(vm) --cancel'")
        case "postcopy-paused":
            throw CommandFailure(
                "\(what) is paused: \(errorDescription ?? "the connection was lost after the guest moved"); keep this VM unless "
                    + "the destination is complete: nobody else has that memory; go on with 'godwit migrate \(vm) --resume \(uri)'"
            )
        case "x-unsettled":
            throw CommandFailure(
                "\(what) ended in doubt: \(errorDescription ?? "the connection was lost at the handover"); the guest stands "
                    + "still here; settle it with 'godwit migrate \(vm) --settle ask-destination'")
        default: throw CommandFailure("\(what) failed: \(errorDescription ?? "the VM gives no reason (\(status))")")
        }
    }
}
