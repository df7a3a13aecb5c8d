/// A result with the machine it was measured on: what is printed, written as JSON, and read back.
public struct BenchmarkReport: Sendable {
    let machine: MachineDescription
    public let result: BenchmarkResult

    /// What `measure` returns, with the machine as it was before.
    public init(measuring measure: () throws -> BenchmarkResult) rethrows {
        machine = .current
        result = try measure()
    }

    init(machine: MachineDescription, result: BenchmarkResult) {
        self.machine = machine
        self.result = result
    }
}
