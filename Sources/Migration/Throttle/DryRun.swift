import Accelerator
import GuestMemory
import Host
import Machine

/// Watches a running guest for two seconds and tells what a migration would come to (`x-migrate-dry-run`). Nothing is moved.
///
/// The guest's writes are tracked as in a migration, beside one for another client, so it costs the guest a fault for each page that is found.
public struct DryRun: Sendable {
    /// Where the link's rate is taken from.
    public enum LinkSource: String, Sendable {
        /// The command said it.
        case argument = "bandwidth"
        case maxBandwidth = "max-bandwidth"
        case availableBandwidth = "avail-switchover-bandwidth"
    }

    /// What was seen, and what follows from it.
    public struct Report: Sendable {
        public var verdict: ConvergenceVerdict
        public var outcome: ConvergenceForecast.Outcome
        public var linkSource: LinkSource
        public var observedNanoseconds: UInt64
        public var collects: Int
        /// Bytes of memory that was ever touched, and of those that hold nothing but zeroes.
        public var allocatedBytes: UInt64
        public var zeroBytes: UInt64
        /// Distinct bytes dirtied while it was watched, per second.
        public var uniqueBytesPerSecond: UInt64
        /// Pages found by all collects: the faults it cost the guest.
        public var pagesFound: UInt64
        /// CPU time it took.
        public var cpuNanoseconds: UInt64
    }

    private let memory: GuestMemory
    private let tracker: any DirtyTracker
    private static let chunkPages: UInt64 = 1 << 14
    /// Whoever says more means no limit.
    private static let fastestLink: UInt64 = 1_000_000_000_000
    /// Pages that are looked into for zeroes.
    private static let samplePages: UInt64 = 2048

    init(memory: GuestMemory, tracker: any DirtyTracker) {
        self.memory = memory
        self.tracker = tracker
    }

    /// - Parameter bandwidth: bytes per second; `nil`: what the parameters say.
    /// - Throws: `MigrationError` where nothing says how fast the link is, and for a machine that cannot be watched.
    static func link(
        _ bandwidth: UInt64?, _ parameters: MigrationParameters
    ) throws(MigrationError) -> (bytesPerSecond: UInt64, source: LinkSource) {
        let said: [(UInt64?, LinkSource)] = [
            (bandwidth, .argument), (parameters.maxBandwidthBytesPerSecond, .maxBandwidth),
            (parameters.availableSwitchoverBytesPerSecond, .availableBandwidth),
        ]
        for case (let rate?, let source) in said where rate > 0 { return (min(rate, fastestLink), source) }
        throw MigrationError(
            "x-migrate-dry-run: how fast the link is cannot be known without using it; give 'bandwidth' (--bandwidth), or set "
                + "max-bandwidth or avail-switchover-bandwidth")
    }

    /// Watches for as long as the plan says. - Throws: `MigrationError` when tracking fails.
    func run(
        link: (bytesPerSecond: UInt64, source: LinkSource), _ parameters: MigrationParameters,
        autoConverge: AutoConverge?
    ) throws(MigrationError) -> Report {
        let seen: Sight
        do throws(AcceleratorError) { seen = try watch() } catch {
            throw MigrationError("x-migrate-dry-run: \(error.description)")
        }
        let observation = seen.observation
        var policy = SwitchoverPolicy(downtimeLimitNanoseconds: parameters.downtimeLimitMilliseconds * 1_000_000)
        if parameters.availableSwitchoverBytesPerSecond > 0 {
            policy.availableBytesPerSecond = parameters.availableSwitchoverBytesPerSecond
        }
        var carrier = ConvergenceForecast.Link(bytesPerSecond: Double(link.bytesPerSecond))
        carrier.roundSeconds = seen.collectSeconds
        var forecast = ConvergenceForecast(model: observation.model(), link: carrier, policy: policy)
        forecast.zeroPages = observation.allocatedPages * seen.zeroShare
        forecast.autoConverge = autoConverge
        let pages = memory.blocks.reduce(0) { $0 + $1.pageCount }
        forecast.chunkCount = Int((pages + Self.chunkPages - 1) / Self.chunkPages)
        forecast.writtenChunkCount = observation.chunkCount
        let outcome = forecast.outcome()
        return Report(
            verdict: ConvergenceVerdict(forecast, elapsedSeconds: 0, isCapped: link.source == .maxBandwidth),
            outcome: outcome, linkSource: link.source, observedNanoseconds: UInt64(observation.totalSeconds * 1e9),
            collects: observation.intervalCount, allocatedBytes: UInt64(observation.allocatedPages) * 4096,
            zeroBytes: UInt64(observation.allocatedPages * seen.zeroShare) * 4096,
            uniqueBytesPerSecond: UInt64(observation.uniqueBytesPerSecond), pagesFound: seen.pagesFound,
            cpuNanoseconds: seen.cpuNanoseconds)
    }

    // MARK: Watching

    private struct Sight {
        var observation: DirtyObservation
        var zeroShare = 0.0
        var pagesFound: UInt64 = 0
        /// The mean of a collect.
        var collectSeconds = 0.0
        var cpuNanoseconds: UInt64 = 0
    }

    private func watch() throws(AcceleratorError) -> Sight {
        let threadBefore = Clock.threadCPUNanoseconds
        let records = try tracker.makePages()
        var marks: [Mapping] = []
        do throws(SystemError) {
            for block in memory.blocks { marks.append(try Mapping(anonymousByteCount: Int(block.pageCount))) }
        } catch { throw AcceleratorError(error.description) }
        try tracker.start()
        defer { tracker.stop() }
        try tracker.collect(into: records)
        var sight = Sight(
            observation: DirtyObservation(allocatedPages: Double(records.reduce(0) { $0 + $1.count })))
        sight.zeroShare = zeroShare(of: records)
        try watchAfresh(records)
        records.forEach { $0.removeAll() }
        var began = Clock.monotonicNanoseconds
        var spent: UInt64 = 0
        var isExpensive = false
        while let seconds = ObservationPlan.interval(
            after: sight.observation.intervalCount, isExpensive: isExpensive)
        {
            let end = began + UInt64(seconds * 1e9)
            let now = Clock.monotonicNanoseconds
            if end > now { Clock.sleep(nanoseconds: end - now) }
            let before = Clock.monotonicNanoseconds
            try tracker.collect(into: records)
            let after = Clock.monotonicNanoseconds
            spent += after - before
            sight.observation.beginInterval(seconds: Double(max(after, began + 1) - began) / 1e9)
            try watchAfresh(records)
            // Each page is watched from a moment of its own on.
            began = after / 2 + Clock.monotonicNanoseconds / 2
            sight.pagesFound += count(records, marks, &sight.observation)
            records.forEach { $0.removeAll() }
            if sight.observation.intervalCount == ObservationPlan.decisiveCount {
                isExpensive = sight.pagesFound > ObservationPlan.expensivePages
            }
        }
        sight.collectSeconds = Double(spent) / 1e9 / Double(max(1, sight.observation.intervalCount))
        sight.cpuNanoseconds = Clock.threadCPUNanoseconds - threadBefore
        return sight
    }

    private func watchAfresh(_ records: [any DirtyPages]) throws(AcceleratorError) {
        for (block, record) in records.enumerated() {
            var position = PageIndex(0)
            while let run = record.nextRun(from: position, limit: 1) {
                let start = run.lowerBound.value / Self.chunkPages * Self.chunkPages
                let chunk = PageIndex(start)..<PageIndex(min(start + Self.chunkPages, record.pageCount))
                try tracker.willSend(chunk, of: block, marked: record)
                guard chunk.upperBound.value < record.pageCount else { break }
                position = chunk.upperBound
            }
        }
    }

    private func count(
        _ records: [any DirtyPages], _ marks: [Mapping], _ observation: inout DirtyObservation
    ) -> UInt64 {
        var found: UInt64 = 0
        for (block, record) in records.enumerated() {
            var position = PageIndex(0)
            while let run = record.nextRun(from: position, limit: Self.chunkPages) {
                let length = run.upperBound.value - run.lowerBound.value
                observation.count(
                    pages: Int(length), inChunk: block << 40 + Int(run.lowerBound.value / Self.chunkPages))
                // SAFETY: a record has no page past its block's end, and each block has as many marks as pages.
                unsafe marks[block].withMutableBytes(at: Int(run.lowerBound.value), count: Int(length)) { bytes in
                    for index in bytes.indices { unsafe observation.count(&bytes[index]) }
                }
                found += length
                position = run.upperBound
            }
        }
        return found
    }

    /// The part of the marked pages that holds nothing but zeroes, by a sample.
    private func zeroShare(of records: [any DirtyPages]) -> Double {
        let all = records.reduce(0) { $0 + $1.count }
        guard all > 0 else { return 0 }
        let step = max(1, all / Self.samplePages)
        var (next, passed, looked, zero) = (step / 2, UInt64(0), 0.0, 0.0)
        for (block, record) in records.enumerated() {
            var position = PageIndex(0)
            while let run = record.nextRun(from: position, limit: .max) {
                let length = run.upperBound.value - run.lowerBound.value
                while next < passed + length {
                    let page = run.lowerBound.advanced(by: Int(next - passed))
                    looked += 1
                    if memory.blocks[block].mapping.isZero(at: Int(page.offset.value), count: 4096) { zero += 1 }
                    next += step
                }
                passed += length
                position = run.upperBound
            }
        }
        return looked > 0 ? zero / looked : 0
    }
}
