import CommandLineKit

/// How written pages are found.
enum TrackingMethod: String, Sendable, CaseIterable {
    case log
    case ring4096 = "ring 4096"
    case ring65536 = "ring 65536"
    case auto

    /// What `godwit run --accel` is told.
    var godwitAccelerator: String {
        switch self {
        case .log: "kvm,dirty-tracking=log"
        case .ring4096: "kvm,dirty-ring-size=4096"
        case .ring65536: "kvm,dirty-ring-size=65536"
        case .auto: "kvm"
        }
    }

    /// What `qemu-system-x86_64 -accel` is told; `nil`: QEMU has no such choice.
    var qemuAccelerator: String? {
        switch self {
        case .log: "kvm"
        case .ring4096: "kvm,dirty-ring-size=4096"
        case .ring65536: "kvm,dirty-ring-size=65536"
        case .auto: nil
        }
    }
}

/// What the guest does while it is migrated.
struct TrackingLoad: Hashable, Sendable {
    /// `nil`: as fast as it can.
    var megabytesPerSecond: UInt64?
    var isRandom: Bool

    var rate: String { megabytesPerSecond.map { "\($0) MB/s" } ?? "unthrottled" }
    var order: String { isRandom ? "random" : "sequential" }

    /// How long the guest may stand still, in milliseconds. What an unthrottled guest dirties in a round hardly gets less from round to
    /// round, so that a tight limit would measure luck.
    var downtimeLimitMilliseconds: Int { megabytesPerSecond == nil ? 2000 : 300 }

    func guest(workingSetMegabytes: UInt64) -> String {
        let rate = megabytesPerSecond.map { "rate=\($0 * 1_000_000)," } ?? ""
        return "dirty,working-set=\(workingSetMegabytes)M,\(rate)\(order)"
    }

    static let all: [TrackingLoad] = [100, 400, 800, nil].flatMap { rate in
        [false, true].map { TrackingLoad(megabytesPerSecond: rate, isRandom: $0) }
    }
}

/// One cell of the table.
struct TrackingCell: Hashable, Sendable {
    var vmm: MeasuredVMM
    var method: TrackingMethod
    var load: TrackingLoad

    var parameters: [(name: String, value: String)] {
        [("vmm", vmm.rawValue), ("tracking", method.rawValue), ("guest", load.rate), ("order", load.order)]
    }

    var name: String { BenchmarkCell(parameters).name }
}

/// One measurement of the last collection.
struct CollectCell: Hashable, Sendable {
    var gibibytes: UInt64
    var method: TrackingMethod

    var name: String { "collect \(gibibytes) GiB \(method.rawValue)" }
}

/// How large everything is.
struct TrackingScale: Sendable {
    var memoryMegabytes: UInt64
    var workingSetMegabytes: UInt64
    /// How long the guest is watched before it is moved.
    var settleMilliseconds: UInt64
    var runs: Int
    var cells: [TrackingCell]
    var collectCells: [CollectCell]
    var collectSamples: Int
    var limitSeconds: UInt64
    var gapMemoryGiB: [UInt64]
    var gapTouchedMegabytes: UInt64
    var gapRounds: Int
    var gapStretchMilliseconds: UInt64

    /// QEMU's take some ten seconds each: five are enough to tell where it stands.
    func runs(of cell: TrackingCell) -> Int { cell.vmm == .qemu ? min(runs, 5) : runs }

    static func full(runs: Int?, hasQEMU: Bool) -> TrackingScale {
        TrackingScale(
            memoryMegabytes: 2048, workingSetMegabytes: 1024, settleMilliseconds: 500, runs: runs ?? 11,
            cells: TrackingLoad.all.flatMap { load in
                TrackingMethod.allCases.map { TrackingCell(vmm: .godwit, method: $0, load: load) }
                    + TrackingMethod.allCases.filter { hasQEMU && $0.qemuAccelerator != nil }
                    .map { TrackingCell(vmm: .qemu, method: $0, load: load) }
            },
            collectCells: [TrackingMethod.ring65536, .log].flatMap { method in
                [1, 512].map { CollectCell(gibibytes: $0, method: method) }
            }, collectSamples: 42, limitSeconds: 10, gapMemoryGiB: [1, 256, 512], gapTouchedMegabytes: 4096,
            gapRounds: 5,
            gapStretchMilliseconds: 1000)
    }

    static func quick(runs: Int?) -> TrackingScale {
        let loads = [
            TrackingLoad(megabytesPerSecond: 400, isRandom: false),
            TrackingLoad(megabytesPerSecond: nil, isRandom: true),
        ]
        var cells = loads.flatMap { load in
            [TrackingMethod.log, .ring65536, .auto].map { TrackingCell(vmm: .godwit, method: $0, load: load) }
        }
        // For the CPU time alone.
        cells += [TrackingMethod.log, .ring65536].map {
            TrackingCell(vmm: .godwit, method: $0, load: TrackingLoad(megabytesPerSecond: 100, isRandom: false))
        }
        return TrackingScale(
            memoryMegabytes: 512, workingSetMegabytes: 256, settleMilliseconds: 100, runs: runs ?? 5, cells: cells,
            collectCells: [1, 512].map { CollectCell(gibibytes: $0, method: .ring65536) }, collectSamples: 21,
            limitSeconds: 3, gapMemoryGiB: [1, 512], gapTouchedMegabytes: 1024, gapRounds: 2,
            gapStretchMilliseconds: 250)
    }
}
