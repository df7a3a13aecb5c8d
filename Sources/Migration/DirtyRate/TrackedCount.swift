import Accelerator
import GuestMemory
import Host

/// Counts written pages by a tracker: whatever was touched before is watched afresh, and what is reported after that was written since.
struct TrackedCount {
    private let tracker: any DirtyTracker
    private let memory: GuestMemory

    /// Pages that are watched afresh at a time: 64 MiB, as in a migration.
    private static let chunkPages: UInt64 = 1 << 14

    init(_ tracker: any DirtyTracker, _ memory: GuestMemory) {
        self.tracker = tracker
        self.memory = memory
    }

    /// Pages that were written at least once, as a rate. - Throws: `AcceleratorError`.
    func bytesPerSecond(over nanoseconds: UInt64) throws(AcceleratorError) -> Double {
        try whileTracking { (records, began) throws(AcceleratorError) in
            Clock.sleep(nanoseconds: nanoseconds)
            try tracker.collect(into: records)
            let elapsed = Double(Clock.monotonicNanoseconds - began)
            let pages = records.reduce(0) { $0 + $1.count }
            return Double(pages * GuestPage.byteCount) / elapsed * 1e9
        }
    }

    /// What each vCPU's ring took up, as rates. - Throws: `AcceleratorError`.
    func bytesPerSecondByCPU(
        over nanoseconds: UInt64, _ control: any DirtyRateControl
    ) throws(AcceleratorError) -> [Double] {
        try whileTracking { (_, _) throws(AcceleratorError) in
            try control.harvest()
            let (first, began) = (control.dirtiedPages, Clock.monotonicNanoseconds)
            Clock.sleep(nanoseconds: nanoseconds)
            try control.harvest()
            let (last, elapsed) = (control.dirtiedPages, Double(Clock.monotonicNanoseconds - began))
            return zip(first, last).map { Double(($1 &- $0) * GuestPage.byteCount) / elapsed * 1e9 }
        }
    }

    /// - Parameter body: is given empty records and when pages were watched from on: the middle, as each chunk has its own moment.
    private func whileTracking<R>(
        _ body: ([any DirtyPages], UInt64) throws(AcceleratorError) -> R
    ) throws(AcceleratorError) -> R {
        let records = try tracker.makePages()
        try tracker.start()
        defer { tracker.stop() }
        try tracker.collect(into: records)
        let began = Clock.monotonicNanoseconds
        for (block, record) in records.enumerated() {
            var position = PageIndex(0)
            while let run = record.nextRun(from: position, limit: 1) {
                let start = run.lowerBound.value / Self.chunkPages * Self.chunkPages
                let chunk = PageIndex(start)..<PageIndex(min(start + Self.chunkPages, record.pageCount))
                try tracker.willSend(chunk, of: block, marked: record)
                guard chunk.upperBound.value < record.pageCount else { break }
                position = chunk.upperBound
            }
            record.removeAll()
        }
        return try body(records, began / 2 + Clock.monotonicNanoseconds / 2)
    }
}
