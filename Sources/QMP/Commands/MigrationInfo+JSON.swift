import Migration

extension MigrationInfo {
    /// The answer to `query-migrate`: QEMU's fields, times rounded down to milliseconds, and ours with `x-`.
    ///
    /// Without a migration it is empty but for `socket-address`. Unlike QEMU's, a destination counts what it received,
    /// and a migration that failed or was cancelled keeps its numbers.
    /// - Parameter downtimeLimitMilliseconds: what `expected-downtime` says as long as nothing was measured.
    func json(downtimeLimitMilliseconds: UInt64) -> JSON {
        var members: [String: JSON] = [:]
        if !listening.isEmpty { members["socket-address"] = .array(listening.map(\.json)) }
        guard direction != nil, status != .none else { return .object(members) }
        members["status"] = .string(status.rawValue)
        if let errorDescription { members["error-desc"] = .string(errorDescription) }
        guard status != .setup else { return .object(members) }
        if let ram { members["ram"] = ram.json }
        if let xbzrle { members["xbzrle-cache"] = xbzrle.json }
        if let totalNanoseconds { members["total-time"] = milliseconds(totalNanoseconds) }
        if let setupNanoseconds { members["setup-time"] = milliseconds(setupNanoseconds) }
        if let rule { members["x-handover"] = .string(rule.rawValue) }
        if let dirtyTracking { members["x-dirty-tracking"] = .string(dirtyTracking) }
        if let trackingCPUNanoseconds { members["x-tracking-cpu"] = JSON(trackingCPUNanoseconds / 1000) }
        if let expected = expectedMilliseconds(limit: downtimeLimitMilliseconds) {
            members["expected-downtime"] = JSON(expected)
            if expectedDowntimeNanoseconds == nil { members["x-expected-downtime-unknown"] = true }
        }
        if let blockTime { blockTime.add(to: &members) }
        if let pageLatency { pageLatency.add(to: &members) }
        if let hugeShare { members["x-huge-share"] = .double(hugeShare) }
        if let safetyNet { members["x-safety-net"] = safetyNet.json }
        if let serviceTime {
            members["x-postcopy-service-ns"] = serviceTime.json([
                "dist": .array(serviceTime.octaves(24).map { JSON($0) })
            ])
        }
        if resumptions > 0 {
            members["x-resumed"] = ["count": JSON(resumptions), "repeated-bytes": JSON(repeatedPages * 4096)]
        }
        if let keptNanoseconds { members["x-kept-seconds"] = JSON(keptNanoseconds / 1_000_000_000) }
        if brokenSwitchovers > 0 { members["x-broken-switchovers"] = brokenJSON }
        if let throttlePercentage { members["cpu-throttle-percentage"] = JSON(throttlePercentage) }
        if let dirtyLimitThrottleMicroseconds {
            members["dirty-limit-throttle-time-per-round"] = JSON(dirtyLimitThrottleMicroseconds)
        }
        if let dirtyLimitRingFullMicroseconds {
            members["dirty-limit-ring-full-time"] = JSON(dirtyLimitRingFullMicroseconds)
        }
        if let verdict { members["x-verdict"] = verdict.json }
        if status == .completed, let downtime {
            members["downtime"] = milliseconds(downtime.nanoseconds)
            members["x-downtime-ns"] = JSON(downtime.nanoseconds)
            members["x-downtime-parts"] = downtime.partsJSON
        }
        return .object(members)
    }

    /// Switchovers that were broken off to keep the downtime limit: all are counted, the last ones told in full.
    private var brokenJSON: JSON {
        [
            "count": JSON(brokenSwitchovers), "longest-ns": JSON(longestBrokenNanoseconds),
            "attempts": .array(
                brokenAttempts.map { attempt in
                    [
                        "number": JSON(attempt.switchover.number), "nanoseconds": JSON(attempt.switchover.nanoseconds),
                        "limit-ns": JSON(attempt.switchover.limitNanoseconds),
                        "reason": .string(attempt.switchover.reason), "parts": attempt.parts.partsJSON,
                    ]
                }),
        ]
    }

    /// What a standstill would take now: measured, or else the limit. `nil` unless an outgoing migration is at work.
    func expectedMilliseconds(limit: UInt64) -> UInt64? {
        switch status {
        case .active, .preSwitchover, .device, .cancelling:
            direction == .outgoing ? expectedDowntimeNanoseconds.map { $0 / 1_000_000 } ?? limit : nil
        default: nil
        }
    }

    private func milliseconds(_ nanoseconds: UInt64) -> JSON { JSON(nanoseconds / 1_000_000) }
}

extension MigrationInfo.BlockTime {
    /// QEMU's names and units (10.1): what all and each stood still in milliseconds, the means of single waits in nanoseconds.
    fileprivate func add(to members: inout [String: JSON]) {
        members["postcopy-blocktime"] = JSON(allNanoseconds / 1_000_000)
        members["postcopy-vcpu-blocktime"] = .array(cpus.map { JSON($0.nanoseconds / 1_000_000) })
        members["postcopy-vcpu-latency"] = .array(cpus.map { JSON($0.meanNanoseconds) })
        members["postcopy-non-vcpu-latency"] = JSON(others.meanNanoseconds)
    }
}

extension LatencyHistogram {
    /// QEMU's names and units (10.1): the mean in nanoseconds, and counts by powers of two of microseconds, 24 as there. Then ours.
    fileprivate func add(to members: inout [String: JSON]) {
        members["postcopy-latency"] = JSON(meanNanoseconds)
        members["postcopy-latency-dist"] = .array(octaves(24).map { JSON($0) })
        members["x-postcopy-latency-ns"] = json([:])
    }

    /// How many there were, and what half, 90 and 99 of 100, and all took at most.
    fileprivate func json(_ further: [String: JSON]) -> JSON {
        let own: [String: JSON] = [
            "count": JSON(count), "p50": JSON(nanoseconds(atMille: 500)), "p90": JSON(nanoseconds(atMille: 900)),
            "p99": JSON(nanoseconds(atMille: 990)), "max": JSON(longestNanoseconds),
        ]
        return .object(own.merging(further) { own, _ in own })
    }
}

extension MigrationInfo.Downtime {
    fileprivate var partsJSON: JSON {
        .array(parts.map { ["name": .string($0.name), "nanoseconds": JSON($0.nanoseconds)] })
    }
}

extension MigrationInfo.RAM {
    fileprivate var json: JSON {
        [
            "transferred": JSON(transferred), "remaining": JSON(remaining), "total": JSON(total),
            "duplicate": JSON(duplicate), "skipped": 0, "normal": JSON(normal), "normal-bytes": JSON(normalBytes),
            "dirty-pages-rate": JSON(dirtyPagesRate), "mbps": .double(mbps), "dirty-sync-count": JSON(dirtySyncCount),
            "postcopy-requests": JSON(postcopyRequests), "page-size": 4096, "multifd-bytes": JSON(multifdBytes),
            "pages-per-second": JSON(pagesPerSecond),
            "precopy-bytes": JSON(precopyBytes), "downtime-bytes": JSON(downtimeBytes),
            "postcopy-bytes": JSON(postcopyBytes),
            "dirty-sync-missed-zero-copy": 0, "x-hole": JSON(hole),
        ]
    }
}

extension MigrationInfo.XBZRLE {
    fileprivate var json: JSON {
        [
            "cache-size": JSON(cacheBytes), "bytes": JSON(bytes), "pages": JSON(pages),
            "cache-miss": JSON(cacheMisses), "cache-miss-rate": .double(cacheMissRate),
            "encoding-rate": .double(encodingRate), "overflow": JSON(overflows),
        ]
    }
}

extension ListeningAddress {
    /// QAPI's `SocketAddress`; the port is a string there.
    fileprivate var json: JSON {
        switch self {
        case .inet(let host, let port):
            [
                "type": "inet", "host": .string(host), "port": .string(port),
                host.contains(":") ? "ipv6" : "ipv4": true,
            ]
        case .unix(let path): ["type": "unix", "path": .string(path)]
        }
    }
}

extension MigrationInfo.SafetyNet {
    fileprivate var json: JSON {
        [
            "epochs": JSON(epochs), "pages": JSON(pages), "bytes": JSON(bytes), "paused-ns": JSON(pausedNanoseconds),
            "longest-pause-ns": JSON(longestPauseNanoseconds), "over": .bool(isOver),
        ]
    }
}
