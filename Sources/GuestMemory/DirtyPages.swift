/// A record of dirty pages of one RAM block: a `DirtyBitmap`, whose cost follows the block's touched part, or a `DirtySet`, whose cost
/// follows the number of dirty pages. Not thread-safe: it belongs to one thread at a time.
public protocol DirtyPages: AnyObject {
    /// Pages of the block.
    var pageCount: UInt64 { get }
    /// Dirty pages.
    var count: UInt64 { get }
    /// Marks a range of pages.
    func set(_ pages: Range<PageIndex>)
    /// Unmarks a range of pages.
    func clear(_ pages: Range<PageIndex>)
    func contains(_ page: PageIndex) -> Bool
    /// Marks what `words` report: bit i of them is page `first` + i. Bits past the block's end are left out.
    @unsafe func merge(_ words: UnsafeBufferPointer<UInt64>, at first: PageIndex)
    /// The words of a range of pages that starts at a multiple of 64; bits past the range may be set.
    @unsafe func withWords<R>(of pages: Range<PageIndex>, _ body: (UnsafeBufferPointer<UInt64>) -> R) -> R
    /// The next run of dirty pages at or after `page`, at most `limit` long; `nil` if there is none.
    func nextRun(from page: PageIndex, limit: UInt64) -> Range<PageIndex>?
}

extension DirtyPages {
    public var isEmpty: Bool { count == 0 }
}
