/// A record of dirty pages of one RAM block: a `DirtyBitmap`, whose cost follows the block's touched part, or a `DirtySet`, whose cost
/// follows the number of dirty pages. Not thread-safe: it belongs to one thread at a time.
public protocol DirtyPages: AnyObject {
    /// Pages of the block.
    var pageCount: UInt64 { get }
    /// Dirty pages.
    var count: UInt64 { get }
    var isEmpty: Bool { get }
    /// Marks a range of pages.
    func set(_ pages: Range<PageIndex>)
    /// Marks single pages by number: in any order, any of them more than once. Numbers past the block's end are left out.
    @unsafe func insert(_ pages: UnsafeBufferPointer<UInt64>)
    /// Unmarks a range of pages.
    func clear(_ pages: Range<PageIndex>)
    /// Unmarks all pages.
    func removeAll()
    func contains(_ page: PageIndex) -> Bool
    /// Marks what a part of `words` reports, 64 pages at a time whatever the alignments are: bit `firstBit` + i of them is page
    /// `first` + i, for i below `pageCount`. Bits past the block's end are left out.
    /// - Precondition: the bits lie inside `words`.
    @unsafe func merge(
        _ words: UnsafeBufferPointer<UInt64>, fromBit firstBit: UInt64, pageCount: UInt64, at first: PageIndex)
    /// Marks what `other` marks, which stays as it is.
    /// - Precondition: `other` has no page past this record's end.
    func formUnion(_ other: any DirtyPages)
    /// Tests and clears: the dirty pages among `pages` are dirty in `other` from now on, and clean here.
    func take(_ pages: Range<PageIndex>, into other: any DirtyPages)
    /// The words of a range of pages that starts at a multiple of 64; bits past the range may be set.
    @unsafe func withWords<R>(of pages: Range<PageIndex>, _ body: (UnsafeBufferPointer<UInt64>) -> R) -> R
    /// The next run of dirty pages at or after `page`, at most `limit` long; `nil` if there is none.
    func nextRun(from page: PageIndex, limit: UInt64) -> Range<PageIndex>?
}

extension DirtyPages {
    public var isEmpty: Bool { count == 0 }

    /// All pages of the block.
    public var allPages: Range<PageIndex> { PageIndex(0)..<PageIndex(pageCount) }

    /// Marks what `words` report: bit i of them is page `first` + i. Bits past the block's end are left out.
    @unsafe public func merge(_ words: UnsafeBufferPointer<UInt64>, at first: PageIndex) {
        unsafe merge(words, fromBit: 0, pageCount: UInt64(words.count) * 64, at: first)
    }

    /// Marks one page.
    public func insert(_ page: PageIndex) { set(page..<page.advanced(by: 1)) }

    /// Moves everything into `other`: dirty there, clean here.
    public func takeAll(into other: any DirtyPages) { take(allPages, into: other) }

    /// Marks what a record of another kind marks, run by run.
    func addRuns(of other: any DirtyPages) {
        var position = PageIndex(0)
        while let run = other.nextRun(from: position, limit: .max) {
            set(run)
            position = run.upperBound
        }
    }
}
