import Glibc
import GuestMemory
import Host
import MigrationStream
import Synchronization

/// Reads the pages that stand at places of their own in a file (capability `mapped-ram`) into guest memory: by several threads
/// `file-recv-N`; or lazily, where long runs of pages are shown as they stand in the file, and read when the guest touches them.
final class MappedRAMReader: Sendable {
    /// How files are read.
    struct Plan: Sendable {
        /// `nil`: as many as the host has processors, at most eight.
        let threads: Int?
        let isDirect: Bool
        let isLazy: Bool

        var threadCount: Int { threads ?? min(max(HostMemory.processorCount, 1), 8) }
    }

    /// The file of the stream; and for pages the same, or one without the page cache, which reads whole pages only.
    private let file: Descriptor
    private let pages: Descriptor
    private let memory: GuestMemory
    private let received: ReceivedPages
    private let statistics: IncomingStatistics
    private let threads: Int
    private let isLazy: Bool
    /// The next piece to be read, for all threads.
    private let next = Atomic<UInt64>(0)

    private struct Work {
        var running = 0
        var failure: SystemError?
        var isOver = false
    }
    private let work = Monitor(Work())

    /// A piece: a huge page of the guest.
    private static let piecePages: UInt64 = 512
    /// Lazily, runs of 256 KiB and longer are shown, and what lies between is read: each costs the kernel a mapping of its own.
    private static let shownPages: UInt64 = 64
    /// The kernel allows 65,530 mappings (vm.max_map_count).
    private static let mostShown = 16_384

    init(
        _ file: Descriptor, pages: Descriptor, memory: GuestMemory, received: ReceivedPages,
        statistics: IncomingStatistics, threads: Int,
        isLazy: Bool
    ) {
        self.file = file
        self.pages = pages
        self.memory = memory
        self.received = received
        self.statistics = statistics
        self.threads = threads
        self.isLazy = isLazy
    }

    /// Fills guest memory from the file, block by block.
    /// - Parameter goesOn: called now and then; when it returns false, reading ends early.
    /// - Throws: `MigrationError`: a file that is shorter than it says, a bitmap with pages that are not there, an I/O error.
    func load(_ regions: [MappedRegion], while goesOn: () -> Bool) throws(MigrationError) {
        do throws(SystemError) {
            let size = try file.size()
            for region in regions {
                guard region.end <= size else {
                    throw SystemError(
                        "read", file.name, code: ENODATA,
                        remedy:
                            "the pages of RAM block '\(memory.blocks[region.block].name)' would end at byte \(region.end), the file has "
                            + "\(size); it was cut off")
                }
                var words = try bitmap(of: region)
                if isLazy, memory.blocks[region.block].canShowFiles { try show(region, &words) }
                try read(region, words, while: goesOn)
                guard goesOn() else { return }
            }
        } catch { throw MigrationError(error.description) }
    }

    private func bitmap(of region: MappedRegion) throws(SystemError) -> [UInt64] {
        let bytes = try file.read(at: region.bitmapOffset, count: Int(region.bitmapBytes))
        var words = [UInt64](repeating: 0, count: bytes.count / 8)
        for index in words.indices {
            var word: UInt64 = 0
            for byte in 0..<8 { word |= UInt64(bytes[index * 8 + byte]) << (byte * 8) }
            words[index] = word
        }
        let rest = region.pageCount % 64
        if rest > 0, let last = words.last, last >> rest != 0 {
            throw SystemError(
                "read", file.name, code: EBADMSG,
                remedy:
                    "the bitmap of RAM block '\(memory.blocks[region.block].name)' marks pages behind its end; the file is damaged"
            )
        }
        return words
    }

    // MARK: Reading

    private func read(
        _ region: MappedRegion, _ words: [UInt64], while goesOn: () -> Bool
    ) throws(SystemError) {
        next.store(0, ordering: .relaxed)
        work.withLock { $0 = Work(running: threads) }
        for index in 0..<threads {
            do throws(SystemError) {
                _ = try HostThread(name: "file-recv-\(index + 1)") { [self] in
                    let failure = readPieces(region, words)
                    work.withLock { work in
                        work.running -= 1
                        work.failure = work.failure ?? failure
                        if failure != nil { work.isOver = true }
                    }
                }
            } catch {
                work.withLock { work in
                    work.running -= threads - index
                    work.failure = work.failure ?? error
                    work.isOver = true
                }
                break
            }
        }
        while work.wait(deadline: .after(milliseconds: 200), until: { $0.running == 0 ? () : nil }) == nil {
            if !goesOn() { work.withLock { $0.isOver = true } }
        }
        if let failure = work.withLock({ $0.failure }) { throw failure }
    }

    /// - Returns: why it could not go on.
    private func readPieces(_ region: MappedRegion, _ words: [UInt64]) -> SystemError? {
        var vector = IOVector()
        let mapping = memory.blocks[region.block].mapping
        let pieces = (region.pageCount + Self.piecePages - 1) / Self.piecePages
        while !work.withLock({ $0.isOver }) {
            let piece = next.add(1, ordering: .relaxed).oldValue
            guard piece < pieces else { return nil }
            let start = piece * Self.piecePages
            let runs = Self.runs(in: words, start..<min(start + Self.piecePages, region.pageCount))
            guard !runs.isEmpty else { continue }
            if runs.count == 1, runs[0].upperBound.value - runs[0].lowerBound.value == Self.piecePages {
                // Only advice: where the host has no huge pages, small ones serve.
                try? mapping.advise(
                    .hugePages, at: Int(start) * Wire.pageSize, count: Int(Self.piecePages) * Wire.pageSize)
            }
            var count: UInt64 = 0
            for run in runs {
                let (from, to) = (run.lowerBound.offset.value, run.upperBound.offset.value)
                vector.removeAll()
                vector.append(mapping, offset: Int(from), count: Int(to - from))
                do throws(SystemError) { try pages.readAll(&vector, at: region.pagesOffset + from) } catch {
                    return error
                }
                count += run.upperBound.value - run.lowerBound.value
            }
            received.mark(runs, of: region.block)
            statistics.received(
                bytes: count * UInt64(Wire.pageSize), normal: count, duplicate: 0, overChannels: threads > 1)
        }
        return nil
    }

    /// The runs of set bits among some pages.
    static func runs(in words: [UInt64], _ pages: Range<UInt64>) -> [Range<PageIndex>] {
        var runs: [Range<PageIndex>] = []
        var page = pages.lowerBound
        while page < pages.upperBound {
            let word = words[Int(page / 64)] >> (page % 64)
            guard word != 0 else {
                page = (page / 64 + 1) * 64
                continue
            }
            page += UInt64(word.trailingZeroBitCount)
            let ones = UInt64((~(words[Int(page / 64)] >> (page % 64))).trailingZeroBitCount)
            let end = min(page + min(ones, 64 - page % 64), pages.upperBound)
            guard page < end else { break }
            if let last = runs.last, last.upperBound.value == page {
                runs[runs.count - 1] = last.lowerBound..<PageIndex(end)
            } else {
                runs.append(PageIndex(page)..<PageIndex(end))
            }
            page = end
        }
        return runs
    }

    // MARK: Lazily

    /// Shows the long runs, and takes them out of what is to be read.
    private func show(_ region: MappedRegion, _ words: inout [UInt64]) throws(SystemError) {
        let all = Self.runs(in: words, 0..<region.pageCount)
        var shortest = Self.shownPages
        var chosen = all.filter { $0.upperBound.value - $0.lowerBound.value >= shortest }
        while chosen.count > Self.mostShown {
            shortest *= 2
            chosen.removeAll { $0.upperBound.value - $0.lowerBound.value < shortest }
        }
        try memory.blocks[region.block].show(chosen, of: file, at: region.pagesOffset)
        received.mark(chosen, of: region.block)
        for run in chosen { MappedRAMWriter.mark(run, false, in: &words) }
    }
}
