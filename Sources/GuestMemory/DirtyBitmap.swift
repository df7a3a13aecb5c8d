public import Host

/// One client's record of dirty pages of one RAM block: a bit per page, and a summary bit per 64 words of them.
///
/// Words that were never set cost neither memory nor time: the storage is untouched anonymous memory, and every walk goes by the
/// summary. Work is done on 64 pages at a time with a masked head and tail. Not thread-safe: it belongs to one thread at a time.
@safe public final class DirtyBitmap: DirtyPages {
    public let pageCount: UInt64
    private let words: Mapping
    private let summary: Mapping
    /// SAFETY: point to the starts of `words` and `summary`, which live as long as this object; indices are checked at the doors.
    let word: UnsafeMutablePointer<UInt64>
    let mark: UnsafeMutablePointer<UInt64>
    let wordCount: Int
    /// Dirty pages, while it is known. Merging does not count: that would halve its speed; who asks has it counted once.
    var knownCount: UInt64? = 0

    /// Words that one bit of the summary stands for.
    static let groupWords = 64
    /// Ranges of more words are not counted as they are set or cleared.
    private static let countedWords = 512

    /// A bitmap of `pageCount` clean pages.
    public init(pageCount: UInt64) throws(SystemError) {
        self.pageCount = pageCount
        wordCount = Int((pageCount + 63) / 64)
        words = try Mapping(anonymousByteCount: max(1, wordCount) * 8)
        summary = try Mapping(anonymousByteCount: max(1, (wordCount + 4095) / 4096) * 8)
        unsafe word = UnsafeMutablePointer(bitPattern: words.hostAddress(at: 0))!
        unsafe mark = UnsafeMutablePointer(bitPattern: summary.hostAddress(at: 0))!
    }

    /// Dirty pages. After a merge the first question costs a walk over what is marked.
    public var count: UInt64 {
        if let knownCount { return knownCount }
        var sum: UInt64 = 0
        unsafe forEachGroup(in: allPages) { _, words in
            guard let start = words.baseAddress else { return }
            sum += unsafe UInt64(WordScan.bitCount(start, words.count))
        }
        knownCount = sum
        return sum
    }

    public var isEmpty: Bool {
        if let knownCount { return knownCount == 0 }
        return nextRun(from: PageIndex(0), limit: 1) == nil
    }

    /// Marks a range of pages.
    public func set(_ pages: Range<PageIndex>) {
        let bits = checked(pages)
        let (word, mark) = unsafe (word, mark)
        if let known = knownCount, bits.count <= Self.countedWords * 64 {
            var fresh = 0
            unsafe WordScan.forEachWord(of: bits) { index, mask in
                fresh &+= unsafe (mask & ~word[index]).nonzeroBitCount
                unsafe word[index] |= mask
            }
            knownCount = known + UInt64(fresh)
        } else {
            unsafe WordScan.forEachWord(of: bits) { index, mask in unsafe word[index] |= mask }
            knownCount = nil
        }
        guard !bits.isEmpty else { return }
        let groups = bits.lowerBound / (64 * Self.groupWords)..<(bits.upperBound - 1) / (64 * Self.groupWords) + 1
        unsafe WordScan.forEachWord(of: groups) { index, mask in unsafe mark[index] |= mask }
    }

    @unsafe public func insert(_ pages: UnsafeBufferPointer<UInt64>) {
        let (word, mark, limit) = unsafe (word, mark, pageCount)
        var fresh: UInt64 = 0
        for index in pages.indices {
            let page = unsafe pages[index]
            guard page < limit else { continue }
            let bit: UInt64 = 1 << (page % 64)
            let old = unsafe word[Int(page / 64)]
            guard old & bit == 0 else { continue }
            unsafe word[Int(page / 64)] = old | bit
            unsafe mark[Int(page >> 18)] |= 1 << (page >> 12 & 63)
            fresh &+= 1
        }
        if let known = knownCount { knownCount = known + fresh }
    }

    /// Unmarks a range of pages.
    public func clear(_ pages: Range<PageIndex>) {
        let bits = checked(pages)
        let word = unsafe word
        // Words that were never set are not touched for this.
        let counts = bits.count <= Self.countedWords * 64
        var gone = 0
        forEachMarkedWord(in: bits) { index, mask in
            let old = unsafe word[index]
            guard old & mask != 0 else { return }
            if counts { gone &+= (old & mask).nonzeroBitCount }
            unsafe word[index] = old & ~mask
        }
        if counts, let known = knownCount { knownCount = known - UInt64(gone) } else { knownCount = nil }
    }

    public func removeAll() {
        let word = unsafe word
        forEachMarkedWord(in: 0..<wordCount * 64) { index, _ in unsafe word[index] = 0 }
        for index in 0..<(wordCount + 4095) / 4096 where unsafe mark[index] != 0 { unsafe mark[index] = 0 }
        knownCount = 0
    }

    public func contains(_ page: PageIndex) -> Bool {
        precondition(page.value < pageCount, "a page of the block")
        return unsafe word[Int(page.value / 64)] >> (page.value % 64) & 1 != 0
    }

    /// The words of a range of pages that starts at a multiple of 64; bits past the range may be set.
    @unsafe public func withWords<R>(of pages: Range<PageIndex>, _ body: (UnsafeBufferPointer<UInt64>) -> R) -> R {
        precondition(
            pages.lowerBound.value % 64 == 0 && pages.upperBound.value <= pageCount, "whole words of the block")
        let first = Int(pages.lowerBound.value / 64)
        let count = Int((pages.upperBound.value + 63) / 64) - first
        return unsafe body(UnsafeBufferPointer(start: word + first, count: count))
    }

    /// The next run of dirty pages at or after `page`, at most `limit` long; `nil` if there is none.
    public func nextRun(from page: PageIndex, limit: UInt64) -> Range<PageIndex>? {
        guard page.value < pageCount, limit > 0, knownCount != 0 else { return nil }
        var index = Int(page.value / 64)
        var bits = unsafe word[index] & (~0 << (page.value % 64))
        if bits == 0 {
            guard let next = nextNonzeroWord(after: index) else { return nil }
            index = next
            bits = unsafe word[index]
        }
        let start = UInt64(index) * 64 + UInt64(bits.trailingZeroBitCount)
        var end = start
        while end < pageCount, end - start < limit {
            let rest = unsafe word[Int(end / 64)] >> (end % 64)
            let ones = UInt64((~rest).trailingZeroBitCount)
            let step = min(ones, 64 - end % 64)
            end += step
            if end % 64 != 0 || step == 0 { break }
        }
        let stop = end - start > limit ? start + limit : end
        return PageIndex(start)..<PageIndex(min(stop, pageCount))
    }

    // MARK: Words

    private func checked(_ pages: Range<PageIndex>) -> Range<Int> {
        precondition(pages.upperBound.value <= pageCount, "pages of the block")
        return Int(pages.lowerBound.value)..<Int(pages.upperBound.value)
    }

    /// The words of `bits` in groups that have a mark, with masks of which bits of them.
    @inline(__always)
    func forEachMarkedWord(in bits: Range<Int>, _ body: (Int, UInt64) -> Void) {
        forEachMarkedGroup(in: bits) { part in unsafe WordScan.forEachWord(of: part, body) }
    }

    /// The parts of `bits` that lie in groups with a mark.
    @inline(__always)
    func forEachMarkedGroup(in bits: Range<Int>, _ body: (Range<Int>) -> Void) {
        let groupBits = 64 * Self.groupWords
        guard !bits.isEmpty else { return }
        let groups = bits.lowerBound / groupBits..<(bits.upperBound - 1) / groupBits + 1
        unsafe WordScan.forEachWord(of: groups) { index, mask in
            var marks = unsafe mark[index] & mask
            while marks != 0 {
                let group = index &* 64 &+ marks.trailingZeroBitCount
                marks &= marks &- 1
                body(bits.clamped(to: group * groupBits..<(group + 1) * groupBits))
            }
        }
    }

    /// The words in which pages of a range may be dirty: pieces that begin at a multiple of 64 pages, in order.
    func forEachGroup(in pages: Range<PageIndex>, _ body: (PageIndex, UnsafeBufferPointer<UInt64>) -> Void) {
        forEachMarkedGroup(in: checked(pages)) { part in
            let first = part.lowerBound / 64
            let piece = unsafe UnsafeBufferPointer(start: word + first, count: (part.upperBound + 63) / 64 - first)
            unsafe body(PageIndex(UInt64(first) * 64), piece)
        }
    }

    /// Goes by the summary; a summary bit whose words have all been cleared is lowered on the way.
    private func nextNonzeroWord(after index: Int) -> Int? {
        let groupWords = Self.groupWords
        var candidate = index + 1
        while candidate < wordCount {
            let group = candidate / groupWords
            let marks = unsafe mark[group / 64] & (~0 << UInt64(group % 64))
            guard marks != 0 else {
                candidate = (group / 64 + 1) * 64 * groupWords
                continue
            }
            let marked = group / 64 * 64 + marks.trailingZeroBitCount
            let start = max(candidate, marked * groupWords)
            let end = min(wordCount, (marked + 1) * groupWords)
            var position = start
            while position < end, unsafe word[position] == 0 { position &+= 1 }
            if position < end { return position }
            if start == marked * groupWords { unsafe mark[marked / 64] &= ~(1 << UInt64(marked % 64)) }
            candidate = end
        }
        return nil
    }
}
