import Migration

extension ConvergenceVerdict {
    /// `x-verdict`: rates in bytes per second, times in milliseconds; `remedies` has the cheapest first.
    var json: JSON {
        var members: [String: JSON] = [
            "state": .string(state.rawValue), "converging": .bool(state == .converging), "sentence": .string(sentence),
        ]
        func add(_ name: String, milliseconds nanoseconds: UInt64?) {
            if let nanoseconds { members[name] = JSON((nanoseconds + 500_000) / 1_000_000) }
        }
        add("expected-end-ms", milliseconds: remainingNanoseconds)
        add("expected-total-ms", milliseconds: totalNanoseconds)
        if let uniqueBytesPerSecond { members["unique-dirty-rate"] = JSON(uniqueBytesPerSecond) }
        if let linkBytesPerSecond { members["link-rate"] = JSON(linkBytesPerSecond) }
        if state == .converging { add("expected-downtime-ms", milliseconds: downtimeNanoseconds) }
        if throttlePercentage > 0 { members["expected-throttle-percentage"] = JSON(throttlePercentage) }
        if state == .notConverging { members["remedies"] = .array(remedies.map(\.json)) }
        return .object(members)
    }
}

extension ConvergenceRemedy {
    /// The capability or parameter to set, and to what.
    fileprivate var json: JSON {
        switch self {
        case .downtimeLimit(let milliseconds): ["name": "downtime-limit", "value": JSON(milliseconds)]
        case .bandwidth(let bytesPerSecond): ["name": "max-bandwidth", "value": JSON(bytesPerSecond)]
        case .autoConverge(let percentage): ["name": "auto-converge", "value": JSON(percentage)]
        }
    }
}

extension DryRun.Report {
    /// The answer to `x-migrate-dry-run`: what was seen, then the members of `x-verdict` as the migration would begin.
    var json: JSON {
        var members = verdict.json.objectValue ?? [:]
        members["observed-ms"] = JSON(observedNanoseconds / 1_000_000)
        members["collects"] = JSON(collects)
        members["allocated-bytes"] = JSON(allocatedBytes)
        members["zero-bytes"] = JSON(zeroBytes)
        members["observed-dirty-rate"] = JSON(uniqueBytesPerSecond)
        members["rounds"] = JSON(outcome.rounds)
        members["link-source"] = .string(linkSource.rawValue)
        members["pages-found"] = JSON(pagesFound)
        members["cpu-us"] = JSON(cpuNanoseconds / 1000)
        members["downtime-limit-ms"] = JSON(verdict.downtimeLimitNanoseconds / 1_000_000)
        return .object(members)
    }
}
