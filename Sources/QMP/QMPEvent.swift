import Host

/// Something that happened in the VM, as QMP tells it: a name such as `STOP`, a moment, and data.
public struct QMPEvent: Sendable, Equatable {
    public let name: String
    /// An object; empty when the event has no data.
    public let data: JSON
    /// Microseconds since 1970 on the clock of the sender's host.
    public let microseconds: UInt64

    /// An event of this moment.
    public init(_ name: String, data: JSON = [:]) {
        self.init(name, data: data, microseconds: Clock.realtimeNanoseconds / 1000)
    }

    init(_ name: String, data: JSON, microseconds: UInt64) {
        self.name = name
        self.data = data
        self.microseconds = microseconds
    }

    /// `nil` if the message is no event.
    init?(_ json: JSON) {
        guard let name = json["event"]?.stringValue else { return nil }
        let seconds = json["timestamp"]?["seconds"]?.integerValue(as: UInt64.self) ?? 0
        let rest = json["timestamp"]?["microseconds"]?.integerValue(as: UInt64.self) ?? 0
        let (whole, isTooLarge) = seconds.multipliedReportingOverflow(by: 1_000_000)
        self.init(name, data: json["data"] ?? [:], microseconds: isTooLarge ? 0 : whole &+ rest)
    }

    var json: JSON {
        var members: [String: JSON] = [
            "event": .string(name),
            "timestamp": [
                "seconds": JSON(microseconds / 1_000_000), "microseconds": JSON(microseconds % 1_000_000),
            ],
        ]
        if data != [:] { members["data"] = data }
        return .object(members)
    }
}
