import CommandLineKit
import QMP

/// One migration of a guest of any size, as `godwit bench big-guests` makes them: what tests and curious people ask for.
struct BigGuestWorker: BenchmarkWorker {
    static let name = "big-guest"

    /// Takes `vmm`, `gibibytes`, `cpus` and `filled` (bytes). - Returns: what was measured, by name.
    static func measure(_ arguments: JSON) throws -> JSON {
        guard let vmm = arguments["vmm"]?.stringValue.flatMap(MeasuredVMM.init(rawValue:)),
            let gibibytes = arguments["gibibytes"]?.integerValue(as: UInt64.self), (1...65_536).contains(gibibytes),
            let cpus = arguments["cpus"]?.integerValue(), (1...64).contains(cpus),
            let filled = arguments["filled"]?.integerValue(as: UInt64.self), filled < gibibytes << 30
        else { throw CommandFailure("the worker needs vmm, gibibytes, cpus and filled, and got \(arguments)") }
        let cell = BigGuestCell(vmm: vmm, gibibytes: gibibytes, cpuCount: cpus, filledBytes: filled)
        let warmMemory = try WarmMemory(byteCount: 2 * filled)
        defer { warmMemory.end() }
        let sample = try BigGuestMigration(
            cell: cell, options: BenchmarkOptions(), warmMemory: warmMemory, seconds: 300
        ).measure()
        var members = sample.quantities.mapValues { JSON.double($0) }
        for part in sample.parts { members["\(part.name)-ms"] = .double(part.milliseconds) }
        return .object(members)
    }
}
