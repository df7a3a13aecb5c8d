import GuestMemory
import Host
import Synchronization

/// Makes huge again what arrived in pages of 4 KiB: the thread `collapse`.
///
/// Pages come in the steps in which they are asked for, so that none waits for 511 others; then the kernel copies a whole granule into a huge
/// page. That holds up whoever touches the granule, or changes the address space, for milliseconds: so while the stream goes on it is
/// done only when nobody has asked for a page for a while, and the rest behind the stream, for a tenth of the time.
final class Collapser: Sendable {
    private enum Stage {
        case streaming
        case behindStream
        case abandoned
    }

    /// A part of a block that becomes huge in one step.
    struct Granule {
        let block: Int
        let pages: Range<PageIndex>
        var failures = 0
        /// The kernel would not do it as long as the stream goes on.
        var isForTheEnd = false
    }

    private enum Outcome {
        case done
        case atTheEnd
        case failed
    }

    private let memory: GuestMemory
    private let pending: PendingPages
    private let report: @Sendable (Double) -> Void
    /// Blocks of hugetlb pages, by index.
    private let splits: [Int: SplitBlock]
    private let stage = Monitor(Stage.streaming)
    private let isRunning = Monitor(false)

    private static let quietNanoseconds: UInt64 = 20_000_000
    private static let lookNanoseconds: UInt64 = 50_000_000
    private static let longestRestNanoseconds: UInt64 = 100_000_000
    /// Whoever touches memory that is just being copied waits: it is, for so small a part of the time.
    private static let restShare: UInt64 = 9
    private static let attempts = 3

    /// - Parameter report: told of the share of allocated RAM that is huge, 0 to 1, once the stream has ended.
    init(
        _ memory: GuestMemory, _ pending: PendingPages, _ splits: [Int: SplitBlock],
        report: @escaping @Sendable (Double) -> Void
    ) {
        self.memory = memory
        self.pending = pending
        self.splits = splits
        self.report = report
    }

    /// After the last DISCARD.
    /// - Parameter done: called behind the stream, when all is huge that can be.
    func start(done: @escaping @Sendable () -> Void) throws(SystemError) {
        isRunning.withLock { $0 = true }
        do throws(SystemError) {
            _ = try HostThread.detached(name: "collapse") { [self] in
                run()
                isRunning.withLock { $0 = false }
                guard current == .behindStream else { return }
                done()
                reportShare()
            }
        } catch {
            isRunning.withLock { $0 = false }
            throw error
        }
    }

    /// All pages are here, and nobody is told of missing ones any more.
    func streamEnded() { stage.withLock { if $0 == .streaming { $0 = .behindStream } } }

    /// Nothing is touched any more. Again and again without harm.
    func abandon() {
        stage.withLock { $0 = .abandoned }
        isRunning.wait { $0 ? nil : () }
    }

    // MARK: The thread

    private var current: Stage { stage.withLock { $0 } }

    private func run() {
        var left = granules()
        while !left.isEmpty {
            var kept: [Granule] = []
            let began = current
            for var granule in left {
                guard isDue(granule) else {
                    kept.append(granule)
                    continue
                }
                // It came as one.
                if pending.blocks[granule.block].cameHuge.contains(granule.pages.lowerBound) { continue }
                guard waitForQuiet() else { return }
                switch collapse(granule) {
                case .done: continue
                case .atTheEnd: granule.isForTheEnd = true
                case .failed: granule.failures += 1
                }
                if granule.failures < Self.attempts { kept.append(granule) }
            }
            if current == .abandoned { return }
            if began == .behindStream, kept.allSatisfy({ $0.failures == 0 }) { break }
            if kept.count == left.count, !pause(Self.lookNanoseconds) { return }
            left = kept
        }
        stage.wait { $0 == .streaming ? nil : () }
    }

    /// Granules in which pages are awaited, of blocks that want huge pages.
    private func granules() -> [Granule] {
        var granules: [Granule] = []
        for (index, split) in splits {
            granules += split.splitUnits.map { Granule(block: index, pages: $0) }
        }
        let isAllowed = HostMemory.hasTransparentHugePages
        for (index, block) in memory.blocks.enumerated() where block.wantsHugePages && isAllowed {
            var start = block.firstHugePlace
            while let range = block.hugePlace(holding: start) {
                start = range.upperBound
                if pending.blocks[index].expected.count(in: range) > 0 {
                    granules.append(Granule(block: index, pages: range))
                }
            }
        }
        return granules
    }

    /// - Returns: false: it is over.
    private func waitForQuiet() -> Bool {
        while true {
            switch current {
            case .abandoned: return false
            case .behindStream: return true
            case .streaming:
                let quiet = pending.latency.quietNanoseconds
                if quiet >= Self.quietNanoseconds { return true }
                guard pause(Self.quietNanoseconds - quiet) else { return false }
            }
        }
    }

    /// - Returns: false: it is over.
    private func pause(_ nanoseconds: UInt64) -> Bool {
        let before = current
        stage.wait(deadline: .after(nanoseconds: nanoseconds)) { $0 == before ? nil : () }
        return current != .abandoned
    }

    /// All its pages are here.
    private func isDue(_ granule: Granule) -> Bool {
        if granule.isForTheEnd, current == .streaming { return false }
        let record = pending.blocks[granule.block]
        let (start, end) = (granule.pages.lowerBound, granule.pages.upperBound)
        return record.expected.nextRun(from: start, before: end, missingFrom: record.placed) == nil
    }

    private func collapse(_ granule: Granule) -> Outcome {
        let block = memory.blocks[granule.block]
        let began = Clock.monotonicNanoseconds
        do throws(SystemError) {
            if let split = splits[granule.block] {
                try split.makeHuge(granule.pages)
            } else {
                let isBehind = current == .behindStream
                let touched = try block.touchedPages(in: granule.pages)
                // The kernel fills nothing up while it tells of missing pages: zeroes that cost no memory yet count as missing.
                if touched < UInt64(granule.pages.count), !isBehind { return .atTheEnd }
                // Zeroes alone are worth no huge page.
                if touched == 0 { return .done }
                try block.collapse(granule.pages)
            }
        } catch { return .failed }
        _ = pause(min(Self.restShare * (Clock.monotonicNanoseconds - began), Self.longestRestNanoseconds))
        return .done
    }

    private func reportShare() {
        var (huge, allocated): (UInt64, UInt64) = (0, 0)
        for block in memory.blocks {
            guard let pages = try? block.touchedPages(in: block.pages), let part = block.hugePages() else { return }
            allocated += pages
            huge += part
        }
        report(allocated == 0 ? 0 : Double(huge) / Double(allocated))
    }
}
