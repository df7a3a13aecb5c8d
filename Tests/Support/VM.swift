import Glibc
public import Host
public import QMP

/// A VM that a test started: a `godwit` or a QEMU, which answer the same commands.
public struct VM {
    public let name: String
    public let process: ChildProcess
    public let stem: String
    public let client: QMPClient

    /// What it printed on its error output so far.
    public var log: String { String(decoding: (try? Descriptor.contents(of: stem + ".err")) ?? [], as: UTF8.self) }

    public func status() throws -> String? { try client.execute("query-status")["status"]?.stringValue }

    /// Where it waits for a migration. Its monitor may answer a moment before it does.
    public func port() throws -> String {
        var port: String?
        let isThere = try wait(seconds: 10) {
            port = try migration()["socket-address"]?[0]?["port"]?.stringValue
            return port != nil
        }
        guard isThere, let port else { throw TestObstacle("\(name) does not wait for a migration on a port: \(log)") }
        return port
    }

    /// Waits until the log has the words.
    public func waitForLog(_ words: String, seconds: UInt64 = 30) -> Bool {
        wait(seconds: seconds) { log.contains(words) }
    }

    public func waitForGuest() throws {
        let isReady = wait(seconds: 30) { (try? client.execute("x-query-guest"))?["ready"] == true }
        guard isReady else { throw TestObstacle("the guest of \(name) did not fill its memory: \(log)") }
    }

    // MARK: Migration

    public func migration() throws -> JSON { try client.execute("query-migrate") }

    public func migrationStatus() throws -> String { try migration()["status"]?.stringValue ?? "none" }

    public func migrate(to uri: String) throws { try client.execute("migrate", ["uri": .string(uri)]) }

    /// Waits until its migration has one of the states. - Returns: the last `query-migrate`.
    @discardableResult
    public func waitForMigration(_ states: String..., seconds: UInt64 = 30) throws -> JSON {
        let deadline = Deadline.after(seconds: seconds)
        while true {
            let answer = try migration()
            let status = answer["status"]?.stringValue ?? "none"
            if states.contains(status) { return answer }
            let isOver = ["completed", "failed", "cancelled"].contains(status)
            guard !isOver, !deadline.hasPassed else {
                throw TestObstacle("the migration of \(name) is '\(answer)', not \(states); it says: \(log)")
            }
            Clock.sleep(nanoseconds: 2_000_000)
        }
    }

    // MARK: Memory

    /// Writes guest memory from address 0 into a file.
    public func saveMemory(_ byteCount: UInt64, to path: String) throws {
        try client.execute("pmemsave", ["val": 0, "size": JSON(byteCount), "filename": .string(path)])
    }

    // MARK: Waiting

    /// Asks again and again. - Returns: whether the answer was yes before the time was over.
    public func wait(seconds: UInt64, until isSo: () throws -> Bool) rethrows -> Bool {
        let deadline = Deadline.after(seconds: seconds)
        while !(try isSo()) {
            if deadline.hasPassed { return false }
            Clock.sleep(nanoseconds: 3_000_000)
        }
        return true
    }
}

extension Workbench {
    /// Writes a VM's memory into a file by a client of its own: it may wait for pages that do not come, and nobody else need.
    /// - Returns: `nil` until it is over, then "saved", or what the VM said.
    public func savingMemory(
        of vm: VM, _ byteCount: UInt64, to path: String, seconds: UInt64
    ) throws -> Monitor<String?> {
        let monitor = try QMPClient(path: "\(runtime)/\(vm.name).qmp")
        let outcome = Monitor<String?>(nil)
        _ = try HostThread.detached(name: "pmemsave") {
            var words = "saved"
            do {
                try monitor.execute(
                    "pmemsave", ["val": 0, "size": JSON(byteCount), "filename": .string(path)],
                    deadline: .after(seconds: seconds))
            } catch { words = "\(error)" }
            outcome.withLock { [words] in $0 = words }
        }
        return outcome
    }
}
