public import QMP

/// Whether a migration gets to its end: `x-verdict`, and the answer to `x-migrate-dry-run`, as values.
public struct VerdictReading: Equatable, Sendable {
    public enum State: String, Sendable { case observing, converging, notConverging = "not-converging" }

    public let state: State
    /// As the VM words it: `converging: about 3.2 s to go, downtime about 45 ms`.
    public let sentence: String
    public let millisecondsLeft: UInt64?
    public let downtimeMilliseconds: UInt64?

    /// `nil` where there is none.
    public init?(_ json: JSON?) {
        guard let json, let state = json["state"]?.stringValue.flatMap(State.init),
            let sentence = json["sentence"]?.stringValue
        else { return nil }
        self.state = state
        self.sentence = sentence
        millisecondsLeft = json["expected-end-ms"]?.integerValue(as: UInt64.self)
        downtimeMilliseconds = json["expected-downtime-ms"]?.integerValue(as: UInt64.self)
    }
}

/// What a dry run found: the answer to `x-migrate-dry-run`.
public struct DryRunReading: Equatable, Sendable {
    public let json: JSON
    public let verdict: VerdictReading?

    public init(_ json: JSON) {
        self.json = json
        verdict = VerdictReading(json)
    }

    public var converges: Bool { verdict?.state == .converging }

    private func number(_ name: String) -> UInt64 { json[name]?.integerValue(as: UInt64.self) ?? 0 }

    /// Several lines, each with its newline.
    public func text(of vm: String) -> String {
        let zero = number("zero-bytes")
        let memory = number("allocated-bytes")
        var lines = [
            "dry run of \(vm): watched for \(Amount.time(nanoseconds: number("observed-ms") &* 1_000_000)), nothing was moved",
            "memory to send: \(Amount.memory(memory))" + (zero > 0 ? ", \(Amount.memory(zero)) of it zeroes" : ""),
            "guest dirties: \(Amount.rate(Double(number("observed-dirty-rate")))) of distinct pages",
            "link: \(Amount.rate(Double(number("link-rate")))), taken from \(source)",
            "verdict: \(verdict?.sentence ?? "none")",
        ]
        if converges {
            lines.append("total time: about \(time("expected-total-ms")) in \(number("rounds")) rounds")
            lines.append("downtime: about \(time("expected-downtime-ms")), the limit is \(time("downtime-limit-ms"))")
        }
        lines.append(
            "cost: \(number("pages-found")) pages were watched afresh in \(number("collects")) collects, "
                + "\(Amount.time(nanoseconds: number("cpu-us") &* 1000)) of CPU time")
        return lines.map { $0 + "\n" }.joined()
    }

    private var source: String {
        switch json["link-source"]?.stringValue {
        case "bandwidth"?: "--bandwidth"
        case let name?: "the parameter \(name)"
        case nil: "nowhere"
        }
    }

    private func time(_ name: String) -> String { Amount.time(nanoseconds: number(name) &* 1_000_000) }
}
