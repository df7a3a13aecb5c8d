import GuestMemory
import Host
import MigrationStream
import Synchronization
import Transport

/// Writes pages to their places in a file (capability `mapped-ram`), straight from guest memory: on the sender's own thread, or on
/// several threads `file-send-N` with the capability `multifd`.
///
/// A page that is written again overwrites its place. A page of zeros is not written: its bit is clear. The bitmaps are kept here, and
/// written when all pages are (`seal`). Until the end of the stream behind them is written, too, whoever reads the file finds it cut off.
final class MappedRAMWriter: Sendable {
    struct Item: Sendable {
        let block: Int
        let runs: [Range<PageIndex>]
        let findsZeroes: Bool
    }

    private struct Work {
        var items: [Item] = []
        /// Items taken and not done.
        var underWay = 0
        var bytes: UInt64 = 0
        var failure: ChannelError?
        var isOver = false

        /// - Returns: why nothing may begin any more.
        mutating func begin() -> ChannelError? {
            if failure == nil { underWay += 1 }
            return failure
        }
    }

    private let memory: GuestMemory
    private let regions: [MappedRegion]
    /// The file of the stream; and for pages the same, or one without the page cache.
    private let stream: Descriptor
    private let pages: Descriptor
    private let offset: UInt64
    private let threads: Int
    private let statistics: OutgoingStatistics
    private let bitmaps: Mutex<[[UInt64]]>
    private let work = Monitor(Work())
    private let isSealed = Atomic(false)
    /// Bytes of the stream's end may be in the file: then its fate is the operator's to settle.
    private let beganEnd = Atomic(false)

    /// Two items for each thread: one is written, one waits.
    private var mostWaiting: Int { threads }
    private static let lookMilliseconds: UInt64 = 20
    /// Kept free behind the state, so that the end of the stream does not meet a full disk once the guest has been given up.
    private static let reservedBytes = 64 << 10

    /// - Parameters:
    ///   - channel: to the file, at the stream's start.
    ///   - threads: besides the caller's; 0 for none.
    init(
        _ channel: Channel, at offset: UInt64, regions: [MappedRegion], threads: Int, direct: Bool,
        memory: GuestMemory, statistics: OutgoingStatistics
    ) throws(ChannelError) {
        guard let file = channel.file else {
            throw .unusable("\(channel.peer): mapped-ram needs a regular file, where pages have places")
        }
        stream = file
        do throws(SystemError) { pages = direct ? try file.openedDirect(writing: true) : file } catch {
            throw .system(error)
        }
        self.memory = memory
        self.regions = regions
        self.offset = offset
        self.threads = threads
        self.statistics = statistics
        bitmaps = Mutex(regions.map { [UInt64](repeating: 0, count: Int($0.bitmapBytes / 8)) })
    }

    func start() throws(SystemError) {
        for index in 0..<threads {
            _ = try HostThread(name: "file-send-\(index + 1)") { [self] in run() }
        }
    }

    // MARK: The sender's thread

    /// Writes the item, or queues it when there is room. - Returns: false when `isOver` said so while there was none.
    func write(_ item: Item, unless isOver: () -> Bool) throws(ChannelError) -> Bool {
        guard threads > 0 else {
            if let failure = work.withLock({ $0.begin() }) { throw failure }
            defer { work.withLock { $0.underWay -= 1 } }
            try perform(item)
            return true
        }
        while true {
            let room = work.wait(deadline: .after(milliseconds: Self.lookMilliseconds)) {
                work -> Result<Void, ChannelError>? in
                if let failure = work.failure { return .failure(failure) }
                return work.items.count < mostWaiting ? .success(()) : nil
            }
            if let room {
                try room.get()
                work.withLock { $0.items.append(item) }
                return true
            }
            if isOver() { return false }
        }
    }

    /// Waits until all that was queued is in the file: no page of a later round may overtake one. - Returns: bytes since the last time.
    func synchronize(moved: () -> Void) throws(ChannelError) -> UInt64 {
        var seen: UInt64 = 0
        while true {
            let result = work.wait(deadline: .after(seconds: 1)) { work -> Result<UInt64, ChannelError>? in
                if let failure = work.failure { return .failure(failure) }
                guard work.items.isEmpty, work.underWay == 0 else { return nil }
                defer { work.bytes = 0 }
                return .success(work.bytes)
            }
            if let result { return try result.get() }
            let bytes = work.withLock { $0.bytes }
            if bytes != seen { moved() }
            seen = bytes
        }
    }

    /// All pages and the state behind them were written: writes the bitmaps, and returns when all of it is on the disk.
    /// The second time, behind the end of the stream, only the latter.
    /// - Parameter moved: called now and then, as the disk may take its time.
    func seal(moved: @Sendable () -> Void) throws(ChannelError) {
        let first = !isSealed.load(ordering: .relaxed)
        do throws(SystemError) {
            if first {
                for (region, words) in zip(regions, bitmaps.withLock({ $0 })) {
                    try stream.writeAll(
                        words.flatMap { word in (0..<8).map { UInt8(truncatingIfNeeded: word >> ($0 * 8)) } },
                        at: region.bitmapOffset)
                }
                // Not zeros: a zero byte is the end of a stream.
                try stream.writeAll(
                    [UInt8](repeating: 0xff, count: Self.reservedBytes), at: stream.position())
            } else {
                try stream.truncate(to: stream.position())
            }
        } catch { throw .system(error) }
        try waitForDisk(moved)
        isSealed.store(true, ordering: .relaxed)
    }

    /// Returns when all that was written is on the disk.
    /// - Parameter moved: called now and then, as the disk may take its time.
    func waitForDisk(_ moved: @Sendable () -> Void) throws(ChannelError) {
        let outcome = Monitor<Result<Void, SystemError>?>(nil)
        let stream = stream
        // One descriptor is enough: it is about the file.
        do throws(SystemError) {
            _ = try HostThread(name: "file-sync") {
                var result: Result<Void, SystemError> = .success(())
                do throws(SystemError) { try stream.synchronize() } catch { result = .failure(error) }
                outcome.withLock { $0 = result }
            }
            while true {
                if let result = outcome.wait(deadline: .after(seconds: 1), until: { $0 }) { return try result.get() }
                moved()
            }
        } catch { throw .system(error) }
    }

    /// Ends the threads. A file that is not complete is cut back to where the stream began, so that nobody takes it for one.
    func end() {
        work.withLock { work in
            work.items = []
            work.isOver = true
            work.failure = work.failure ?? .cancelled
        }
        // A write that is under way would make the file longer again.
        work.wait(deadline: .after(seconds: 3)) { $0.underWay == 0 ? () : nil }
        if !beganEnd.load(ordering: .relaxed) { try? stream.truncate(to: offset) }
    }

    /// Bytes of the stream are about to be written to the file.
    func noteBytes() { if isSealed.load(ordering: .relaxed) { beganEnd.store(true, ordering: .relaxed) } }

    // MARK: Pages

    private func run() {
        HostThread.sleepExactly()
        while let item = next() {
            do throws(ChannelError) { try perform(item) } catch {
                work.withLock { $0.failure = $0.failure ?? error }
            }
            work.withLock { $0.underWay -= 1 }
        }
    }

    private func next() -> Item? {
        work.wait { work -> Item?? in
            if work.isOver { return .some(nil) }
            guard !work.items.isEmpty else { return nil }
            work.underWay += 1
            return work.items.removeFirst()
        } ?? nil
    }

    private func perform(_ item: Item) throws(ChannelError) {
        let mapping = memory.blocks[item.block].mapping
        let region = regions[item.block]
        var data: [Range<PageIndex>] = []
        var zeroes: [Range<PageIndex>] = []
        for run in item.runs {
            for page in run {
                let isZero = item.findsZeroes && mapping.isZero(at: Int(page.offset.value), count: Wire.pageSize)
                if isZero { Self.add(page, to: &zeroes) } else { Self.add(page, to: &data) }
            }
        }
        var vector = IOVector()
        var bytes: UInt64 = 0
        do throws(SystemError) {
            for run in data {
                let (start, end) = (run.lowerBound.offset.value, run.upperBound.offset.value)
                vector.append(mapping, offset: Int(start), count: Int(end - start))
                try pages.writeAll(&vector, at: region.pagesOffset + start)
                vector.removeAll()
                bytes += end - start
            }
        } catch { throw .system(error) }
        bitmaps.withLock { bitmaps in
            for run in data { Self.mark(run, true, in: &bitmaps[item.block]) }
            for run in zeroes { Self.mark(run, false, in: &bitmaps[item.block]) }
        }
        let zero = zeroes.reduce(0) { $0 + $1.upperBound.value - $1.lowerBound.value }
        statistics.sent(
            bytes: bytes, normal: bytes / UInt64(Wire.pageSize), duplicate: zero, overChannels: threads > 0)
        work.withLock { $0.bytes += bytes }
    }

    private static func add(_ page: PageIndex, to runs: inout [Range<PageIndex>]) {
        if let last = runs.last, last.upperBound == page {
            runs[runs.count - 1] = last.lowerBound..<page.advanced(by: 1)
        } else {
            runs.append(page..<page.advanced(by: 1))
        }
    }

    /// Sets or clears the bits of a run, a word at a time.
    static func mark(_ run: Range<PageIndex>, _ on: Bool, in words: inout [UInt64]) {
        var page = run.lowerBound.value
        while page < run.upperBound.value {
            let count = min(64 - page % 64, run.upperBound.value - page)
            let mask: UInt64 = (count == 64 ? .max : (1 << count) - 1) << (page % 64)
            if on { words[Int(page / 64)] |= mask } else { words[Int(page / 64)] &= ~mask }
            page += count
        }
    }
}
