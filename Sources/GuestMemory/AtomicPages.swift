public import Host
import Synchronization

/// A bit for each page of a RAM block, which any number of threads read and change at once.
///
/// One page is inserted or removed by exactly one of those who try, and that one sees what the others wrote before. Words that were never
/// set cost no memory: the storage is untouched anonymous memory. Walking costs a load for each 64 pages; a ``DirtyBitmap`` is faster for
/// one thread, and where few are set.
@safe public final class AtomicPages: Sendable {
    public let pageCount: UInt64
    private let words: Mapping
    /// SAFETY: points to the start of `words`, which lives as long as this object, and holds `wordCount` words; zeroed memory is a valid
    /// word. Indices are checked at the doors.
    nonisolated(unsafe) private let word: UnsafeMutablePointer<Atomic<UInt64>>

    /// No page is set.
    public init(pageCount: UInt64) throws(SystemError) {
        self.pageCount = pageCount
        words = try Mapping(anonymousByteCount: max(1, Int((pageCount + 63) / 64)) * 8)
        unsafe word = UnsafeMutablePointer(bitPattern: words.hostAddress(at: 0))!
    }

    public func contains(_ page: PageIndex) -> Bool {
        unsafe word[index(of: page)].load(ordering: .acquiring) & Self.bit(of: page) != 0
    }

    /// - Returns: whether the page was not set: of several threads that insert it, one hears so.
    @discardableResult
    public func insert(_ page: PageIndex) -> Bool {
        let (index, bit) = (index(of: page), Self.bit(of: page))
        return unsafe word[index].bitwiseOr(bit, ordering: .acquiringAndReleasing).oldValue & bit == 0
    }

    /// - Returns: whether the page was set: of several threads that remove it, one hears so.
    @discardableResult
    public func remove(_ page: PageIndex) -> Bool {
        let (index, bit) = (index(of: page), Self.bit(of: page))
        return unsafe word[index].bitwiseAnd(~bit, ordering: .acquiringAndReleasing).oldValue & bit != 0
    }

    /// Sets all pages of a range; others may change pages there meanwhile. - Returns: how many were not set.
    @discardableResult
    public func insert(_ pages: Range<PageIndex>) -> UInt64 {
        var fresh: UInt64 = 0
        forEachWord(of: pages) { index, mask in
            let old = unsafe word[index].bitwiseOr(mask, ordering: .acquiringAndReleasing).oldValue
            fresh += UInt64((mask & ~old).nonzeroBitCount)
        }
        return fresh
    }

    /// Unsets all pages of a range; others may change pages there meanwhile. - Returns: how many were set.
    @discardableResult
    public func remove(_ pages: Range<PageIndex>) -> UInt64 {
        var gone: UInt64 = 0
        forEachWord(of: pages) { index, mask in
            // What was never set is not touched for this.
            guard unsafe word[index].load(ordering: .relaxed) & mask != 0 else { return }
            let old = unsafe word[index].bitwiseAnd(~mask, ordering: .acquiringAndReleasing).oldValue
            gone += UInt64((mask & old).nonzeroBitCount)
        }
        return gone
    }

    /// In words of 64 pages: the last one's bits behind the last page are never set.
    public var wordCount: Int { Int((pageCount + 63) / 64) }

    /// The pages of a word, the first in the lowest bit.
    public func bits(inWord index: Int) -> UInt64 {
        precondition(index >= 0 && index < wordCount, "a word of the block")
        return unsafe word[index].load(ordering: .acquiring)
    }

    /// Sets pages of a word; bits behind the last page are ignored.
    public func insert(bits: UInt64, intoWord index: Int) {
        precondition(index >= 0 && index < wordCount, "a word of the block")
        let isLast = index == wordCount - 1 && pageCount % 64 != 0
        let mask = isLast ? ~(UInt64.max << (pageCount % 64)) : .max
        guard bits & mask != 0 else { return }
        unsafe word[index].bitwiseOr(bits & mask, ordering: .acquiringAndReleasing)
    }

    /// Pages of a range that are set, each as it is when it is looked at.
    public func count(in pages: Range<PageIndex>) -> UInt64 {
        var count: UInt64 = 0
        forEachWord(of: pages) { index, mask in
            count += UInt64((unsafe word[index].load(ordering: .relaxed) & mask).nonzeroBitCount)
        }
        return count
    }

    /// The next pages in a row that are set here and not in `others`; at most `limit`, each as it is when
    /// it is looked at. - Returns: `nil`: none from `page` on, before `end`.
    public func nextRun(
        from page: PageIndex, before end: PageIndex? = nil, limit: UInt64 = .max, missingFrom others: AtomicPages? = nil
    ) -> Range<PageIndex>? {
        let end = min(end?.value ?? pageCount, pageCount)
        var position = page.value
        var start: UInt64?
        while position < end {
            let index = Int(position / 64)
            var bits = unsafe word[index].load(ordering: .acquiring)
            if let others { bits &= ~(unsafe others.word[index].load(ordering: .acquiring)) }
            var ahead = bits >> (position % 64)
            var left = 64 - position % 64
            if start == nil {
                let skipped = min(UInt64(ahead.trailingZeroBitCount), left)
                position += skipped
                guard skipped < left else { continue }
                // The run begins in what was just looked at: a page that is gone in the next moment was set, and no run is empty.
                (ahead, left) = (ahead >> skipped, left - skipped)
                start = position
            }
            let ones = min(UInt64((~ahead).trailingZeroBitCount), left)
            position += ones
            if ones < left || position - (start ?? 0) >= limit { break }
        }
        guard let start, start < end else { return nil }
        return PageIndex(start)..<PageIndex(min(position, end, start.addingClamped(limit)))
    }

    // MARK: Words

    private func index(of page: PageIndex) -> Int {
        precondition(page.value < pageCount, "a page of the block")
        return Int(page.value / 64)
    }

    private static func bit(of page: PageIndex) -> UInt64 { 1 << (page.value % 64) }

    private func forEachWord(of pages: Range<PageIndex>, _ body: (Int, UInt64) -> Void) {
        precondition(pages.upperBound.value <= pageCount, "pages of the block")
        guard !pages.isEmpty else { return }
        let (first, last) = (pages.lowerBound.value, pages.upperBound.value - 1)
        for index in Int(first / 64)...Int(last / 64) {
            var mask = UInt64.max
            if index == Int(first / 64) { mask &= .max << (first % 64) }
            if index == Int(last / 64) { mask &= .max >> (63 - last % 64) }
            body(index, mask)
        }
    }
}

extension UInt64 {
    fileprivate func addingClamped(_ other: UInt64) -> UInt64 {
        let (sum, overflows) = addingReportingOverflow(other)
        return overflows ? .max : sum
    }
}
