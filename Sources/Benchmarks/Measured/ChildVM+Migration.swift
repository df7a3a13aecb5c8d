import CommandLineKit
import Host
import QMP

/// A migration that did not end in time: QEMU may never converge where we do.
struct MigrationTookTooLong: Error, CustomStringConvertible {
    let what: String
    let seconds: UInt64

    var description: String { "\(what): no end of the migration within \(seconds) s" }
}

extension ChildVM {
    /// So that nothing holds a migration up but the VM and the host.
    private static let unlimitedBytesPerSecond = 1 << 40

    /// The same for all VMMs: no limit to its bandwidth to speak of, and events that tell its end.
    func prepareMigration(downtimeLimitMilliseconds: Int) throws {
        try execute("migrate-set-capabilities", ["capabilities": [["capability": "events", "state": true]]])
        try execute(
            "migrate-set-parameters",
            [
                "max-bandwidth": JSON(Self.unlimitedBytesPerSecond),
                "downtime-limit": JSON(downtimeLimitMilliseconds),
            ])
    }

    /// - Parameter guest: what `x-query-guest` answered.
    /// - Returns: the pages that a built-in guest has touched so far.
    func touches(_ guest: JSON) throws(CommandFailure) -> UInt64 {
        guard let touches = guest["touches"]?.integerValue(as: UInt64.self) else {
            throw CommandFailure("\(role) VM: x-query-guest does not tell how many pages the guest has touched")
        }
        return touches
    }

    /// Migrates, and waits for the end by events (the capability `events` is on), because asking would take time from what is measured.
    ///
    /// - Returns: the last answer to `query-migrate`.
    /// - Throws: `MigrationTookTooLong`; `CommandFailure` for a migration that failed.
    func migrate(to uri: String, what: String, seconds: UInt64, _ options: BenchmarkOptions) throws -> JSON {
        let client = try client()
        try execute("migrate", ["uri": .string(uri)])
        let deadline = Deadline.after(seconds: seconds)
        var status = ""
        while !["completed", "failed", "cancelled"].contains(status) {
            try options.checkInterruption()
            guard !deadline.hasPassed else { throw MigrationTookTooLong(what: what, seconds: seconds) }
            do throws(QMPClientError) {
                status =
                    try client.waitForEvent("MIGRATION", deadline: .after(milliseconds: 200)).data["status"]?
                    .stringValue ?? ""
            } catch {
                guard case .timedOut = error else { throw CommandFailure("\(role) VM: \(error)") }
            }
        }
        let answer = try execute("query-migrate")
        do { try MigrationReading(answer).requireCompletion(of: what, to: uri) } catch {
            throw CommandFailure("\(error) (\(logTail(lines: 1).joined()))")
        }
        return answer
    }
}
