public import Host

/// One client's record of dirty pages of one RAM block: a bit per page, and a summary bit per 64 words of them.
///
/// Words that were never set cost neither memory nor time: the storage is untouched anonymous memory, and every walk goes by the
/// summary. Work is done on 64 pages at a time with a masked head and tail. Not thread-safe: it belongs to one thread at a time.
@safe public final class DirtyBitmap: DirtyPages {
    public let pageCount: UInt64
    /// Dirty pages.
    public private(set) var count: UInt64 = 0
    private let words: Mapping
    private let summary: Mapping
    /// SAFETY: point to the starts of `words` and `summary`, which live as long as this object; indices are checked at the doors.
    private let word: UnsafeMutablePointer<UInt64>
    private let mark: UnsafeMutablePointer<UInt64>

    /// A bitmap of `pageCount` clean pages.
    public init(pageCount: UInt64) throws(SystemError) {
        self.pageCount = pageCount
        let wordCount = Int((pageCount + 63) / 64)
        words = try Mapping(anonymousByteCount: max(1, wordCount) * 8)
        summary = try Mapping(anonymousByteCount: max(1, (wordCount + 4095) / 4096) * 8)
        unsafe word = UnsafeMutablePointer(bitPattern: words.hostAddress(at: 0))!
        unsafe mark = UnsafeMutablePointer(bitPattern: summary.hostAddress(at: 0))!
    }

    /// Marks a range of pages.
    public func set(_ pages: Range<PageIndex>) {
        forEachWord(of: pages) { index, mask in merge(mask, into: index) }
    }

    /// Unmarks a range of pages.
    public func clear(_ pages: Range<PageIndex>) {
        forEachWord(of: pages) { index, mask in
            let old = unsafe word[index]
            guard old & mask != 0 else { return }
            unsafe word[index] = old & ~mask
            count -= UInt64((old & mask).nonzeroBitCount)
        }
    }

    public func contains(_ page: PageIndex) -> Bool {
        precondition(page.value < pageCount, "a page of the block")
        return unsafe word[Int(page.value / 64)] >> (page.value % 64) & 1 != 0
    }

    /// Merges what a tracker reported: bit i of `reported` is page `first` + i. `first` is a multiple of 64.
    @unsafe public func merge(_ reported: UnsafeBufferPointer<UInt64>, at first: PageIndex) {
        precondition(first.value % 64 == 0, "reports start at a multiple of 64 pages")
        let start = Int(first.value / 64)
        let limit = Int((pageCount + 63) / 64)
        for index in reported.indices {
            let bits = unsafe reported[index]
            guard bits != 0 else { continue }
            precondition(start + index < limit, "a report inside the block")
            merge(bits & validMask(start + index), into: start + index)
        }
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
        guard page.value < pageCount, limit > 0, count > 0 else { return nil }
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
        return PageIndex(start)..<PageIndex(min(end, start + limit, pageCount))
    }

    // MARK: Words

    @inline(__always)
    private func merge(_ bits: UInt64, into index: Int) {
        let old = unsafe word[index]
        let fresh = bits & ~old
        guard fresh != 0 else { return }
        unsafe word[index] = old | bits
        unsafe mark[index / 4096] |= 1 << UInt64(index / 64 % 64)
        count += UInt64(fresh.nonzeroBitCount)
    }

    private func validMask(_ index: Int) -> UInt64 {
        let first = UInt64(index) * 64
        return pageCount - first >= 64 ? ~0 : (1 << (pageCount - first)) - 1
    }

    private func forEachWord(of pages: Range<PageIndex>, _ body: (Int, UInt64) -> Void) {
        precondition(pages.upperBound.value <= pageCount, "pages of the block")
        var page = pages.lowerBound.value
        let end = pages.upperBound.value
        while page < end {
            let stop = min(end, (page / 64 + 1) * 64)
            let length = stop - page
            let mask: UInt64 = length == 64 ? ~0 : ((1 << length) - 1) << (page % 64)
            body(Int(page / 64), mask)
            page = stop
        }
    }

    /// Goes by the summary; a summary bit whose words have all been cleared is lowered on the way.
    private func nextNonzeroWord(after index: Int) -> Int? {
        let wordCount = Int((pageCount + 63) / 64)
        var candidate = index + 1
        while candidate < wordCount {
            let group = candidate / 64
            let marks = unsafe mark[group / 64] & (~0 << UInt64(group % 64))
            guard marks != 0 else {
                candidate = (group / 64 + 1) * 4096
                continue
            }
            let marked = group / 64 * 64 + marks.trailingZeroBitCount
            let start = max(candidate, marked * 64)
            let end = min(wordCount, (marked + 1) * 64)
            for position in start..<end where unsafe word[position] != 0 { return position }
            if start == marked * 64 { unsafe mark[marked / 64] &= ~(1 << UInt64(marked % 64)) }
            candidate = end
        }
        return nil
    }
}
