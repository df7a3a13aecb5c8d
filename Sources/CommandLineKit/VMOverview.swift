public import Host
public import QMP

/// A VM in one row: what `godwit ps` and `godwit info` show.
public struct VMOverview: Equatable, Sendable {
    public var name: String
    public var processIdentifier: Int32?
    /// QEMU's words; `nil` if the VM does not answer.
    public var state: String?
    public var memoryBytes: UInt64?
    public var cpuCount: Int?
    public var migration: String?

    public init(
        name: String, processIdentifier: Int32? = nil, state: String? = nil, memoryBytes: UInt64? = nil,
        cpuCount: Int? = nil, migration: String? = nil
    ) {
        self.name = name
        self.processIdentifier = processIdentifier
        self.state = state
        self.memoryBytes = memoryBytes
        self.cpuCount = cpuCount
        self.migration = migration
    }

    /// Asks a VM. - Throws: `QMPClientError`.
    public init(
        of reference: VMReference, client: QMPClient, deadline: Deadline = .after(seconds: 10)
    ) throws(QMPClientError) {
        let name = try? client.execute("query-name", deadline: deadline)["name"]?.stringValue
        let memory = try client.execute("query-memory-size-summary", deadline: deadline)
        let migration = try client.execute("query-migrate", deadline: deadline)
        self.init(
            name: name ?? reference.description, processIdentifier: reference.processIdentifier,
            state: try client.execute("query-status", deadline: deadline)["status"]?.stringValue,
            memoryBytes: memory["base-memory"]?.integerValue(as: UInt64.self),
            cpuCount: try client.execute("query-cpus-fast", deadline: deadline).arrayValue?.count,
            migration: migration["status"]?.stringValue ?? "none")
    }

    public var json: JSON {
        [
            "name": .string(name), "pid": processIdentifier.map { JSON($0) } ?? .null,
            "state": state.map { .string($0) } ?? .null, "memory": memoryBytes.map { JSON($0) } ?? .null,
            "vcpus": cpuCount.map { JSON($0) } ?? .null, "migration": migration.map { .string($0) } ?? .null,
        ]
    }

    /// One row for each VM, under a heading.
    public static func table(_ overviews: [VMOverview]) -> String {
        var table = TextTable([
            ("NAME", .left), ("PID", .right), ("STATE", .left), ("MEMORY", .right), ("VCPUS", .right),
            ("MIGRATION", .left),
        ])
        for vm in overviews {
            table.add([
                vm.name, vm.processIdentifier.map(String.init) ?? "?", vm.state ?? "does not answer",
                vm.memoryBytes.map(Amount.memory) ?? "?", vm.cpuCount.map(String.init) ?? "?", vm.migration ?? "?",
            ])
        }
        return table.text
    }
}
