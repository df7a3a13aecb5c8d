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
            timedRuns: arguments["timed"]?.integerValue() ?? 1, trackedRuns: arguments["tracked"]?.integerValue() ?? 1,
            timeLimitSeconds: arguments["seconds"]?.integerValue(as: UInt64.self) ?? 60)
        return try run.carryOut().json
    }
}

extension MemslotsRun {
    var arguments: JSON {
        [
            "strategy": .string(strategy.rawValue), "cpus": JSON(cpuCount), "outside": .bool(areAllOutside),
            "timed": JSON(timedRuns), "tracked": JSON(trackedRuns), "seconds": JSON(timeLimitSeconds),
        ]
    }
}

extension MemslotsRun.Outcome {
    private static func list(_ numbers: [Double]) -> JSON { .array(numbers.map { .double($0) }) }

    var json: JSON {
        [
            "sequence-ms": Self.list(sequenceMilliseconds), "commit-ms": Self.list(commitMilliseconds),
            "longest-commit-ms": Self.list(longestCommitMilliseconds),
            "tracked-commit-ms": Self.list(trackedCommitMilliseconds),
            "outside-gap-ms": Self.list(gapMilliseconds.map { [$0] } ?? []),
            "first": .bool(isFirst), "failures": JSON(failures),
            "first-failure": firstFailure.map { .string($0) } ?? .null,
            "pauses": JSON(pauses), "commits": JSON(commits), "lost-pages": JSON(lostPages),
            "first-lost-page": firstLostPage.map { .string($0) } ?? .null,
            "lost-writes": JSON(lostWrites), "writes": JSON(writes), "rounds": JSON(rounds),
        ]
    }
}

/// Runs the random changes of `godwit bench memslots` in a process of its own.
enum MemslotsStressWorker: BenchmarkWorker {
    static let name = "memslots-stress"

    /// - Parameter arguments: `changes`, `cpus` and `seed`.
    static func measure(_ arguments: JSON) throws -> JSON {
        let stress = MemslotsStress(
            changes: arguments["changes"]?.integerValue() ?? 1000, cpuCount: arguments["cpus"]?.integerValue() ?? 4,
            seed: arguments["seed"]?.integerValue(as: UInt64.self) ?? 1)
        return try stress.carryOut().json
    }
}
