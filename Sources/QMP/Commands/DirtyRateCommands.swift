import Accelerator
import Migration

/// How fast the guest writes to its memory, and limits to it.
struct DirtyRateCommands: Sendable {
    private let meter: DirtyRateMeter

    init(_ meter: DirtyRateMeter) { self.meter = meter }

    var all: [Command] {
        [
            Command("calc-dirty-rate", Self.measuring) { [meter] call in
                try meter.start(Self.request(call.arguments))
                return [:]
            },
            Command("query-dirty-rate", [.optional("calc-time-unit", .enumeration(Self.units))]) { [meter] call in
                meter.info().json(try Self.unit(call.arguments))
            },
            Command(
                "set-vcpu-dirty-limit",
                [.optional("cpu-index", .integer), .required("dirty-rate", .unsigned(bits: 64))]
            ) { [meter] call in
                try Self.setLimit(call.arguments, meter)
                return [:]
            },
            Command("cancel-vcpu-dirty-limit", [.optional("cpu-index", .integer)]) { [meter] call in
                let control = try meter.control(for: "cancel-vcpu-dirty-limit")
                try control.setLimit(nil, of: Self.cpu(call.arguments, control))
                return [:]
            },
            Command("query-vcpu-dirty-limit") { [meter] _ in
                .array(
                    meter.limits.map {
                        [
                            "cpu-index": JSON($0.cpu), "limit-rate": JSON($0.limitBytesPerSecond >> 20),
                            "current-rate": JSON($0.currentBytesPerSecond >> 20),
                        ]
                    })
            },
        ]
    }

    private static let units = DirtyRateRequest.Unit.allCases.map(\.rawValue)
    private static let measuring: [Parameter] = [
        .required("calc-time", .integer), .optional("calc-time-unit", .enumeration(units)),
        .optional("sample-pages", .integer), .optional("mode", .enumeration(DirtyRateMode.allCases.map(\.rawValue))),
    ]

    private static func unit(_ arguments: Arguments) throws(QMPError) -> DirtyRateRequest.Unit {
        try arguments.string(ifPresent: "calc-time-unit").flatMap(DirtyRateRequest.Unit.init) ?? .second
    }

    private static func request(_ arguments: Arguments) throws -> DirtyRateRequest {
        try DirtyRateRequest(
            mode: arguments.string(ifPresent: "mode").flatMap(DirtyRateMode.init) ?? .pageSampling,
            calcTime: arguments.integer("calc-time"), unit: unit(arguments),
            samplePages: arguments.integer(ifPresent: "sample-pages"))
    }

    private static func setLimit(_ arguments: Arguments, _ meter: DirtyRateMeter) throws {
        let control = try meter.control(for: "set-vcpu-dirty-limit")
        let mebibytes: UInt64 = try arguments.integer("dirty-rate")
        let most = UInt64(Int64.max) >> 20
        guard mebibytes <= most else {
            throw QMPError.parameter("dirty-rate", expects: "at most \(most) MB/s, or 0 for no limit")
        }
        // As in QEMU, a limit of nothing is none.
        try control.setLimit(mebibytes == 0 ? nil : mebibytes << 20, of: cpu(arguments, control))
    }

    private static func cpu(_ arguments: Arguments, _ control: any DirtyRateControl) throws(QMPError) -> Int? {
        guard let index: Int64 = try arguments.integer(ifPresent: "cpu-index") else { return nil }
        let count = control.dirtiedPages.count
        guard let cpu = Int(exactly: index), (0..<count).contains(cpu) else {
            throw .parameter(
                "cpu-index", expects: count == 1 ? "0, the only vCPU" : "a vCPU of this machine, 0 to \(count - 1)")
        }
        return cpu
    }
}

extension DirtyRateInfo {
    /// QEMU's `DirtyRateInfo`; rates in MiB/s. `x-error` tells why the last measurement came to nothing.
    func json(_ unit: DirtyRateRequest.Unit) -> JSON {
        var members: [String: JSON] = [
            "status": .string(status.rawValue), "start-time": JSON(startSeconds),
            "calc-time": JSON((request?.nanoseconds ?? 0) / unit.nanoseconds),
            "calc-time-unit": .string(unit.rawValue), "sample-pages": JSON(request?.samplePages ?? 0),
            "mode": .string((request?.mode ?? .pageSampling).rawValue),
        ]
        if let bytesPerSecond { members["dirty-rate"] = Self.mebibytes(bytesPerSecond) }
        if let bytesPerSecondByCPU {
            members["vcpu-dirty-rate"] = .array(
                bytesPerSecondByCPU.enumerated().map { ["id": JSON($0), "dirty-rate": Self.mebibytes($1)] })
        }
        if let failure { members["x-error"] = .string(failure) }
        return .object(members)
    }

    private static func mebibytes(_ bytes: Double) -> JSON { JSON(UInt64((bytes / 1_048_576).rounded())) }
}
