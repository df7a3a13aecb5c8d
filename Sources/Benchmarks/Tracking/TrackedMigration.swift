import CommandLineKit
import Host
import QMP

/// One live migration between two processes on this machine, measured, and verified page by page at the destination.
struct TrackedMigration {
    let cell: TrackingCell
    let scale: TrackingScale
    let options: BenchmarkOptions

    /// One run's quantities, in the order of the table.
    typealias Sample = [(name: String, value: Double)]

    private static let migrationSeconds: UInt64 = 60

    /// - Throws: `CommandFailure` for a run that failed, or whose memory does not verify.
    func measure() throws -> (sample: Sample, method: String?) {
        let folder = try PrivateFolder("bench")
        defer { folder.remove() }
        let source = try start("source", in: folder.path)
        defer { source.child.end() }
        let destination = try start("destination", in: folder.path, isDestination: true)
        defer { destination.child.end() }
        let uri = try destination.child.listeningAddress()
        for vm in [source, destination] {
            try vm.child.prepareMigration(downtimeLimitMilliseconds: cell.load.downtimeLimitMilliseconds)
        }
        try options.waitUntilReady(cell.name) { try source.guest().isReady }

        let rateBefore = try rate(of: source)
        let threads = try source.child.execute("query-cpus-fast").arrayValue ?? []
        let threadIDs = threads.compactMap { $0["thread-id"]?.integerValue() }
        let before = try ProcessorTime(process: source.child.process.identifier, threads: threadIDs)
        let touchesBefore = try source.guest().touches
        let answer = try source.child.migrate(to: uri, what: cell.name, seconds: Self.migrationSeconds, options)
        let after = try ProcessorTime(process: source.child.process.identifier, threads: threadIDs)
        let touches = try source.guest().touches - touchesBefore
        try destination.verify()

        let figures = try MigrationFigures(MigrationReading(answer), of: cell.name)
        let total = figures.totalMilliseconds
        let process = after.processMilliseconds - before.processMilliseconds
        var sample: Sample = [
            ("total-ms", total), ("downtime-ms", figures.downtimeMilliseconds), ("rounds", Double(figures.rounds)),
            ("sent-mb", Double(figures.transferredBytes) / 1e6),
            ("source-cpu-ms", process),
            ("source-vmm-cpu-ms", max(0, process - (after.threadMilliseconds - before.threadMilliseconds))),
            ("rate-before-mbs", rateBefore), ("rate-during-mbs", Double(touches) * 4096 / 1e3 / max(1, total)),
        ]
        if let tracking = answer["x-tracking-cpu"]?.doubleValue {
            sample.insert(("tracking-cpu-ms", tracking / 1e3), at: 4)
        }
        return (sample, answer["x-dirty-tracking"]?.stringValue)
    }

    private func start(_ role: String, in folder: String, isDestination: Bool = false) throws -> any MeasuredVM {
        let machine = MeasuredMachine(
            method: cell.method, memoryMegabytes: scale.memoryMegabytes,
            guest: cell.load.guest(workingSetMegabytes: scale.workingSetMegabytes), isDestination: isDestination,
            takesMemoryBeforehand: isDestination)
        return try machine.start(role, in: folder, by: cell.vmm)
    }

    /// Megabytes of pages that the guest touches per second, left alone.
    private func rate(of vm: any MeasuredVM) throws -> Double {
        let (start, first) = (Clock.monotonicNanoseconds, try vm.guest().touches)
        Clock.sleep(nanoseconds: scale.settleMilliseconds * 1_000_000)
        let (end, second) = (Clock.monotonicNanoseconds, try vm.guest().touches)
        return Double(second - first) * 4096 / 1e6 / (Double(end - start) / 1e9)
    }
}
