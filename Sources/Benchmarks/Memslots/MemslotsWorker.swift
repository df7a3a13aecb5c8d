import Host
import KVM
import QMP

/// Runs one cell of `godwit bench memslots` in a process of its own.
enum MemslotsWorker: BenchmarkWorker {
    static let name = "memslots"

    /// - Parameter arguments: as `MemslotsRun` has them.
    static func measure(_ arguments: JSON) throws -> JSON {
        let run = MemslotsRun(
            strategy: SlotStrategy(rawValue: arguments["strategy"]?.stringValue ?? "") ?? .atomic,
            cpuCount: arguments["cpus"]?.integerValue() ?? 1, areAllOutside: arguments["outside"] == true,
            timedRuns: arguments["timed"]?.integerValue() ?? 1, trackedRuns: arguments["tracked"]?.integerValue() ?? 1)
        return try run.carryOut().json
    }
}

extension MemslotsRun {
    var arguments: JSON {
        [
            "strategy": .string(strategy.rawValue), "cpus": JSON(cpuCount), "outside": .bool(areAllOutside),
            "timed": JSON(timedRuns), "tracked": JSON(trackedRuns),
        ]
    }
}

extension MemslotsRun.Outcome {
    private static func list(_ numbers: [Double]) -> JSON { .array(numbers.map { .double($0) }) }

    fileprivate var json: JSON {
        [
            "sequence-ms": Self.list(sequenceMilliseconds), "commit-ms": Self.list(commitMilliseconds),
            "longest-commit-ms": Self.list(longestCommitMilliseconds),
            "tracked-commit-ms": Self.list(trackedCommitMilliseconds), "gap-ms": .double(gapMilliseconds),
            "failures": JSON(failures), "first-failure": firstFailure.map { .string($0) } ?? .null,
            "pauses": JSON(pauses), "commits": JSON(commits), "lost-pages": JSON(lostPages),
            "lost-writes": JSON(lostWrites), "writes": JSON(writes),
        ]
    }
}
