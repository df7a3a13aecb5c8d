import CommandLineKit
import Host
import QMP

/// One migration of a big guest between two processes on this machine, verified at the destination.
struct BigGuestMigration {
    let cell: BigGuestCell
    let options: BenchmarkOptions
    let warmMemory: WarmMemory
    /// How long the migration may take.
    let seconds: UInt64

    /// One run's quantities.
    struct Sample {
        var quantities: [String: Double] = [:]
        /// Milliseconds of the standstill's parts, in order; only Godwit tells.
        var parts: [(name: String, milliseconds: Double)] = []
    }

    private static let readySeconds: UInt64 = 300
    /// QEMU's default; what it costs to keep a shorter limit is not the question here.
    private static let downtimeLimitMilliseconds = 300
    /// What a process takes besides its guest's pages, and the huge pages at the edges of what was filled.
    private static let processBytes: UInt64 = 128 << 20

    /// - Throws: `CommandFailure` for a run that failed, or whose memory does not verify; `MigrationTookTooLong`.
    func measure() throws -> Sample {
        try warmMemory.refill(options)
        let folder = try PrivateFolder("bench")
        defer { folder.remove() }
        let source = try start("source", in: folder.path)
        defer { source.child.end() }
        let destination = try start("destination", in: folder.path, isDestination: true)
        defer { destination.child.end() }
        let watch = try HeartbeatWatch(
            source: Self.serial("source", folder.path), destination: Self.serial("destination", folder.path))
        defer { watch.end() }
        let processes = [source.child, destination.child].map(\.process.identifier)
        warmMemory.follow(processes)
        let uri = try destination.child.listeningAddress()
        for vm in [source.child, destination.child] {
            try vm.prepareMigration(downtimeLimitMilliseconds: Self.downtimeLimitMilliseconds)
        }
        try waitUntilReady(source)
        // Again: what KVM keeps for itself has taken of what was free.
        warmMemory.follow(processes)
        let answer = try source.child.migrate(to: uri, what: cell.name, seconds: seconds, options)
        let blackout = try watch.gapMilliseconds()
        try destination.verify()
        let memory = ProcessMemory.residentBytes(of: destination.child.process.identifier)
        try requireHoles(memory)
        return try sample(answer, blackout: blackout, residentBytes: memory)
    }

    private func sample(_ answer: JSON, blackout: Double, residentBytes: UInt64) throws(CommandFailure) -> Sample {
        let reading = MigrationReading(answer)
        let figures = try MigrationFigures(reading, of: cell.name)
        var sample = Sample()
        sample.quantities = [
            "setup-ms": figures.setupMilliseconds, "total-ms": figures.totalMilliseconds,
            "downtime-ms": figures.downtimeMilliseconds, "blackout-ms": blackout,
            "sent-mb": Double(figures.transferredBytes) / 1e6, "destination-mb": Double(residentBytes) / 1e6,
        ]
        sample.parts = reading.downtimeParts.map { ($0.name, Double($0.nanoseconds) / 1e6) }
        return sample
    }

    private static func serial(_ role: String, _ folder: String) -> String { "\(folder)/\(role).serial" }

    private func start(_ role: String, in folder: String, isDestination: Bool = false) throws -> any MeasuredVM {
        let machine = MeasuredMachine(
            method: .log, memoryMegabytes: cell.gibibytes << 10, cpuCount: cell.cpuCount, guest: cell.guest,
            isDestination: isDestination, serialPath: Self.serial(role, folder))
        return try machine.start(role, in: folder, by: cell.vmm)
    }

    /// Until all vCPUs have filled their part; then they sleep.
    private func waitUntilReady(_ vm: any MeasuredVM) throws {
        try options.waitUntilReady(cell.name, seconds: Self.readySeconds, lookEveryMilliseconds: 100) {
            try vm.guest().isReady
        }
        Clock.sleep(nanoseconds: 300_000_000)
    }

    /// The checker looks at every page the guest filled. The others must not be there at all.
    private func requireHoles(_ residentBytes: UInt64) throws(CommandFailure) {
        guard residentBytes > 0 else {
            throw CommandFailure("\(cell.name): the host does not tell what memory the destination has taken")
        }
        guard cell.vmm == .godwit, residentBytes > cell.filledBytes + Self.processBytes else { return }
        throw CommandFailure(
            "\(cell.name): the destination has taken \(Amount.memory(residentBytes)) for \(BigGuestCell.words(cell.filledBytes)) "
                + "that are not zero: holes did not stay holes")
    }
}
