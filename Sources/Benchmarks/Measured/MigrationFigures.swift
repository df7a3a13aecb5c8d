import CommandLineKit

/// What every measured migration must have told once it is completed. What is not told is not nothing: such a run has failed.
struct MigrationFigures: Equatable, Sendable {
    let setupMilliseconds: Double
    let totalMilliseconds: Double
    /// In fractions, where the VM tells them.
    let downtimeMilliseconds: Double
    let transferredBytes: UInt64
    let rounds: UInt64

    /// - Parameter what: which migration, for the sentence.
    /// - Throws: `CommandFailure` that names the figures which are missing.
    init(_ reading: MigrationReading, of what: String) throws(CommandFailure) {
        let downtime =
            reading.downtimeNanoseconds.map { Double($0) / 1e6 } ?? reading.downtimeMilliseconds.map { Double($0) }
        let missing = [
            ("setup-time", reading.setupMilliseconds == nil), ("total-time", reading.totalMilliseconds == nil),
            ("downtime", downtime == nil), ("ram", !reading.hasRAM),
        ].filter(\.1).map(\.0)
        guard let setup = reading.setupMilliseconds, let total = reading.totalMilliseconds, let downtime,
            missing.isEmpty
        else { throw CommandFailure("\(what): query-migrate does not tell \(missing.joined(separator: ", "))") }
        setupMilliseconds = Double(setup)
        totalMilliseconds = Double(total)
        downtimeMilliseconds = downtime
        transferredBytes = reading.transferredBytes
        rounds = reading.round
    }
}
