public import Host
public import QMP

/// A measured dirty rate: what `godwit info NAME dirty-rate` shows.
public struct DirtyRateReading: Equatable, Sendable {
    /// The VM's answer to `query-dirty-rate`.
    public let json: JSON

    public init(_ json: JSON) { self.json = json }

    /// From what tells most to what every VM can do.
    private static let modes = ["dirty-ring", "dirty-bitmap", "page-sampling"]

    /// Has a VM measure for a second, and waits for the result; one that measures already is waited for.
    /// - Throws: `QMPClientError`.
    public init(measuredBy client: QMPClient, deadline: Deadline = .after(seconds: 90)) throws(QMPClientError) {
        var answer = try client.execute("query-dirty-rate")
        if answer["status"] != "measuring" { try Self.start(client) }
        repeat {
            Clock.sleep(nanoseconds: 20_000_000)
            answer = try client.execute("query-dirty-rate")
        } while answer["status"] == "measuring" && !deadline.hasPassed
        guard answer["status"] == "measured" else {
            let reason = answer["x-error"]?.stringValue ?? "calc-dirty-rate: no result came in time; try again"
            throw .refused(QMPError(reason))
        }
        self.init(answer)
    }

    private static func start(_ client: QMPClient) throws(QMPClientError) {
        for mode in modes {
            do throws(QMPClientError) {
                try client.execute("calc-dirty-rate", ["calc-time": 1, "mode": .string(mode)])
                return
            } catch {
                // What this VM cannot do, it refuses; the last mode's refusal is another's measurement, or worth telling.
                guard case .refused = error, mode != modes.last else { throw error }
            }
        }
    }

    /// The rate of the VM, and of each vCPU where they are told apart.
    public var text: String {
        var table = TextTable([("VCPU", .left), ("DIRTY RATE", .right), ("PERIOD", .right), ("MODE", .left)])
        let period = "\(json["calc-time"]?.integerValue(as: UInt64.self) ?? 0) s"
        let mode = json["mode"]?.stringValue ?? "?"
        func add(_ name: String, _ rate: JSON?) {
            let mebibytes = rate?.integerValue(as: UInt64.self)
            table.add([name, mebibytes.map { "\($0) MiB/s" } ?? "?", period, mode])
        }
        add("all", json["dirty-rate"])
        for cpu in json["vcpu-dirty-rate"]?.arrayValue ?? [] {
            add(cpu["id"]?.integerValue(as: UInt64.self).map(String.init) ?? "?", cpu["dirty-rate"])
        }
        return table.text
    }
}
