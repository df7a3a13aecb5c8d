/// Dirty rate and dirty limit as QEMU's monitor for people has them; the commands of QMP do the work.
extension HumanMonitor {
    /// `calc_dirty_rate`, `set_vcpu_dirty_limit` or `cancel_vcpu_dirty_limit`.
    func dirtyRate(_ command: String, _ words: [String]) throws -> [String] {
        let options = words.filter { $0.hasPrefix("-") && MemoryListing.number($0) == nil && $0.count == 2 }
        let numbers = try words.filter { !options.contains($0) }.map { try number($0, command) }
        if command == "calc_dirty_rate" {
            for option in options where option != "-r" && option != "-b" {
                throw Usage(command: command, sentence: "\(command): unsupported option \(option)")
            }
            try expect(1...2, numbers, command)
            var arguments: [String: JSON] = ["calc-time": numbers[0]]
            if numbers.count > 1 { arguments["sample-pages"] = numbers[1] }
            if Set(options).count > 1 {
                throw QMPError("Either dirty-ring or dirty-bitmap can be specified!")
            }
            if options.contains("-r") { arguments["mode"] = "dirty-ring" }
            if options.contains("-b") { arguments["mode"] = "dirty-bitmap" }
            try perform("calc-dirty-rate", arguments)
            return [
                "Starting dirty rate measurement with period \(numbers[0]) seconds",
                "[Please use 'info dirty_rate' to check results]",
            ]
        }
        if let option = options.first {
            throw Usage(command: command, sentence: "\(command): unsupported option \(option)")
        }
        var arguments: [String: JSON] = [:]
        if command == "set_vcpu_dirty_limit" {
            try expect(1...2, numbers, command)
            arguments["dirty-rate"] = numbers[0]
            if numbers.count > 1 { arguments["cpu-index"] = numbers[1] }
            try perform("set-vcpu-dirty-limit", arguments)
        } else {
            try expect(0...1, numbers, command)
            if let cpu = numbers.first { arguments["cpu-index"] = cpu }
            try perform("cancel-vcpu-dirty-limit", arguments)
        }
        return ["[Please use 'info vcpu_dirty_limit' to query dirty limit for virtual CPU]"]
    }

    private func expect(_ counts: ClosedRange<Int>, _ numbers: [JSON], _ command: String) throws {
        guard !counts.contains(numbers.count) else { return }
        throw Usage(
            command: command,
            sentence: "\(command): \(counts.lowerBound) to \(counts.upperBound) numbers are expected")
    }

    /// `info dirty_rate`.
    func dirtyRateLines() throws -> [String] {
        let info = try value("query-dirty-rate")
        let mode = info["mode"]?.stringValue ?? ""
        var lines = [
            "Status: \(info["status"]?.stringValue ?? "")", "Start Time: \(info["start-time"] ?? 0) (sec)",
            "Period: \(info["calc-time"] ?? 0) (sec)", "Mode: \(mode)",
        ]
        if mode == "page-sampling" { lines.insert("Sample Pages: \(info["sample-pages"] ?? 0) (per GB)", at: 2) }
        lines.append("Dirty rate: " + (info["dirty-rate"].map { "\($0) (MB/s)" } ?? "(not ready)"))
        for cpu in info["vcpu-dirty-rate"]?.arrayValue ?? [] {
            lines.append("vcpu[\(cpu["id"] ?? 0)], Dirty rate: \(cpu["dirty-rate"] ?? 0) (MB/s)")
        }
        if let failure = info["x-error"]?.stringValue { lines.append("Error: \(failure)") }
        return lines
    }

    /// `info vcpu_dirty_limit`.
    func dirtyLimitLines() throws -> [String] {
        let limits = try value("query-vcpu-dirty-limit").arrayValue ?? []
        guard !limits.isEmpty else { return ["Dirty page limit not enabled!"] }
        return limits.map {
            "vcpu[\($0["cpu-index"] ?? 0)], limit rate \($0["limit-rate"] ?? 0) (MB/s), "
                + "current rate \($0["current-rate"] ?? 0) (MB/s)"
        }
    }
}
