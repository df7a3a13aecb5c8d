import GuestMemory
import Host

/// Pages chosen at random, and what they hold: a page that holds something else later was written.
///
/// Pages are chosen from equal parts of each block, one from each, so that none comes twice and all of memory is looked at alike. Holes are
/// told by the kernel and not looked into.
struct PageSample {
    private let block: RAMBlock
    private let pages: [PageIndex]
    private var sums: [UInt64] = []

    /// Measures over the time of the request. - Throws: `SystemError`.
    static func bytesPerSecond(of memory: GuestMemory, _ request: DirtyRateRequest) throws(SystemError) -> Double {
        var random = SystemRandomNumberGenerator()
        var samples: [PageSample] = []
        // The first look takes time, and each page counts from when it was looked at: on average from the middle of it.
        let began = Clock.monotonicNanoseconds
        for block in memory.blocks {
            samples.append(PageSample(of: block, pagesPerGibibyte: request.samplePages, using: &random))
            try samples[samples.count - 1].look()
        }
        let looked = Clock.monotonicNanoseconds
        Clock.sleep(nanoseconds: request.nanoseconds)
        let woke = Clock.monotonicNanoseconds
        var bytes = 0.0
        for index in samples.indices { bytes += try samples[index].changedBytes() }
        let done = Clock.monotonicNanoseconds
        let elapsed = Double(woke - looked) + Double(looked - began) / 2 + Double(done - woke) / 2
        return bytes / elapsed * 1e9
    }

    init(of block: RAMBlock, pagesPerGibibyte: UInt64, using random: inout some RandomNumberGenerator) {
        self.block = block
        let total = block.pageCount
        let wanted = total.multipliedReportingOverflow(by: pagesPerGibibyte).partialValue >> 18
        let count = max(min(pagesPerGibibyte, total), min(wanted, total))
        let (part, rest) = (total / count, total % count)
        pages = (0..<count).map { index in
            // The first `rest` parts have a page more.
            let start = index * part + min(index, rest)
            return PageIndex(start + UInt64.random(in: 0..<part + (index < rest ? 1 : 0), using: &random))
        }
    }

    /// Keeps what the pages hold now.
    mutating func look() throws(SystemError) { sums = try current() }

    /// Bytes of the block that were written since, by the share of the sample.
    mutating func changedBytes() throws(SystemError) -> Double {
        let now = try current()
        let changed = zip(sums, now).reduce(0) { $0 + ($1.0 == $1.1 ? 0 : 1) }
        return Double(block.byteCount) * Double(changed) / Double(max(1, pages.count))
    }

    private func current() throws(SystemError) -> [UInt64] {
        let runs = try block.allocatedRuns(in: block.pages)
        var sums: [UInt64] = []
        sums.reserveCapacity(pages.count)
        var run = runs.startIndex
        var contents = [UInt64](repeating: 0, count: Int(GuestPage.byteCount / 8))
        let zero = Self.sum(contents)
        for page in pages {
            while run < runs.endIndex, runs[run].upperBound <= page { run += 1 }
            guard run < runs.endIndex, runs[run].contains(page) else {
                sums.append(zero)
                continue
            }
            let offset = Int(page.offset.value)
            try unsafe contents.withUnsafeMutableBufferPointer { (buffer) throws(SystemError) in
                try unsafe block.copy(at: offset, into: UnsafeMutableRawBufferPointer(buffer))
            }
            sums.append(Self.sum(contents))
        }
        return sums
    }

    /// 64 bits from all of a page's: each word is mixed into one of four sums, by its place.
    private static func sum(_ words: [UInt64]) -> UInt64 {
        let factor: UInt64 = 0x9e37_79b9_7f4a_7c15
        var (a, b, c, d): (UInt64, UInt64, UInt64, UInt64) = (1, 2, 3, 4)
        func mix(_ sum: inout UInt64, _ word: UInt64) {
            sum = (sum ^ word) &* factor
            sum ^= sum &>> 29
        }
        for index in stride(from: 0, to: words.count, by: 4) {
            mix(&a, words[index])
            mix(&b, words[index &+ 1])
            mix(&c, words[index &+ 2])
            mix(&d, words[index &+ 3])
        }
        mix(&a, b)
        mix(&a, c)
        mix(&a, d)
        return a
    }
}
