public import CommandLineKit
public import QMP

extension BenchmarkReport {
    /// The object that `godwit bench NAME --json` prints. Members of JSON objects have no order: `columns` and `quantity-columns` of a
    /// cell tell the one of the tables.
    public var json: JSON {
        [
            "bench": .string(result.bench), "machine": machine.json, "runs": JSON(result.runs),
            "cells": .array(result.cells.map(\.json)), "promises": .array(result.promises.map(\.json)),
            "notes": .array(result.notes.map { .string($0) }),
        ]
    }

    /// Reads what `json` wrote. - Throws: `CommandFailure` with what is missing.
    public init(_ json: JSON) throws(CommandFailure) {
        guard let name = json["bench"]?.stringValue, let cells = json["cells"]?.arrayValue,
            let promises = json["promises"]?.arrayValue
        else { throw CommandFailure("no result of 'godwit bench NAME --json': it lacks bench, cells or promises") }
        let result = BenchmarkResult(
            bench: name, runs: json["runs"]?.integerValue() ?? 1,
            cells: cells.map { BenchmarkCell($0) },
            promises: promises.compactMap { BenchmarkPromise($0) },
            notes: (json["notes"]?.arrayValue ?? []).compactMap(\.stringValue))
        self.init(machine: MachineDescription(json["machine"]), result: result)
    }
}

extension BenchmarkCell {
    var json: JSON {
        let measured = quantities.map { ($0.name, Self.json(of: $0.samples)) }
        return [
            "name": .string(name), "columns": .array(parameters.map { .string($0.name) }),
            "quantity-columns": .array(quantities.map { .string($0.name) }),
            "parameters": .object(
                Dictionary(parameters.map { ($0.name, .string($0.value)) }, uniquingKeysWith: { first, _ in first })),
            "quantities": .object(Dictionary(measured, uniquingKeysWith: { first, _ in first })),
        ]
    }

    private static func json(of samples: [Double]) -> JSON {
        [
            "median": number(samples.median), "minimum": number(samples.min()), "maximum": number(samples.max()),
            "samples": .array(samples.map { number($0) }),
        ]
    }

    /// JSON has no number for what is not finite.
    static func number(_ value: Double?) -> JSON {
        guard let value, value.isFinite else { return .null }
        return .double(value)
    }

    init(_ json: JSON) {
        func names(_ member: String) -> [String] { (json[member]?.arrayValue ?? []).compactMap(\.stringValue) }
        self.init(
            names("columns").compactMap { name in json["parameters"]?[name]?.stringValue.map { (name, $0) } },
            names("quantity-columns").compactMap { name in
                guard let samples = json["quantities"]?[name]?["samples"]?.arrayValue else { return nil }
                return (name, samples.compactMap(\.doubleValue))
            })
    }
}

extension BenchmarkPromise {
    var json: JSON {
        [
            "name": .string(name), "value": BenchmarkCell.number(value), "limit": BenchmarkCell.number(limit),
            "better": .string(better.rawValue), "holds": .bool(holds),
        ]
    }

    /// `nil` of what is no promise. Whether it holds is decided anew.
    init?(_ json: JSON) {
        guard let name = json["name"]?.stringValue, let better = json["better"]?.stringValue.flatMap(Better.init) else {
            return nil
        }
        self.init(name, json["value"]?.doubleValue ?? .nan, limit: json["limit"]?.doubleValue, better: better)
    }
}
