import GuestMemory
import Host
import MigrationStream

/// Decides how pages go out from the second round on when the capability `xbzrle` is set: as a difference to what the destination has,
/// from a copy, or not at all.
///
/// What makes it right: the cache holds what was sent, to the byte. The guest runs on, so a page is copied once (`working`), and
/// compared, encoded, sent and kept from that copy alone. A page that is not in the cache was never sent from it, so it may go straight
/// from guest memory.
struct XBZRLESender: ~Copyable {
    /// How a page goes out.
    enum Form: Equatable {
        /// The destination has it as it is.
        case unchanged
        /// As that many bytes at the start of `encoding`.
        case delta(byteCount: Int)
        /// Whole, from this offset of `pages`.
        case copy(at: Int)
        /// Whole, from guest memory.
        case direct
    }

    private var cache: XBZRLECache
    /// The page that `form` was asked for, as it is sent.
    let working: Mapping
    let encoding: Mapping
    /// Passes over what was dirty; the first sends everything and is not looked at.
    private var round: UInt64 = 0
    /// What is left of the pass under way; `nil` between two.
    private var pagesLeft: UInt64?
    private var counts = XBZRLECounts()

    /// Some bytes must be gained by a difference: its head is longer than that of a page by three.
    static let longestDelta = XBZRLE.longestEncoding - 4

    init(cacheBytes: UInt64) throws(SystemError) {
        let cache = try XBZRLECache(byteCount: cacheBytes)
        let working = try Mapping(anonymousByteCount: XBZRLECache.pageBytes)
        let encoding = try Mapping(anonymousByteCount: XBZRLECache.pageBytes)
        self.cache = cache
        self.working = working
        self.encoding = encoding
        counts.cacheBytes = cacheBytes
    }

    var isActive: Bool { round > 0 }
    /// Copies of pages, see `Form.copy`. They stay as they are until the round ends.
    var pages: Mapping { cache.pages }

    /// A round of so many pages begins. One that goes on after an interruption belongs to the same pass.
    mutating func roundBegins(pages: UInt64) {
        guard pagesLeft == nil else { return }
        pagesLeft = pages
        cache.roundBegins()
    }

    /// A pass is over when a round was sent to its end, or when as many pages were sent as there were at its beginning: on a slow link
    /// every round may be interrupted.
    mutating func roundEnded(pages: UInt64, isInterrupted: Bool) {
        let left = pagesLeft ?? 0
        pagesLeft = left - min(left, pages)
        guard !isInterrupted || pagesLeft == 0 else { return }
        round += 1
        pagesLeft = nil
    }

    /// Takes another size; what was kept is forgotten. Between rounds. Without the memory for it the old size stays.
    mutating func resize(to cacheBytes: UInt64) {
        guard cacheBytes != cache.byteCount, let other = try? XBZRLECache(byteCount: cacheBytes) else { return }
        cache = other
        counts.cacheBytes = cacheBytes
    }

    /// Nothing is known any more of what the other side has. - Returns: false when there is no memory to go on.
    mutating func forget() -> Bool {
        guard let other = try? XBZRLECache(byteCount: cache.byteCount) else { return false }
        cache = other
        pagesLeft = nil
        return true
    }

    /// The page is not zero. - Parameter keeps: also the pages that are not in the cache go into it (not in the last round, nor when few are left: to keep
    /// one takes longer than to send it over a fast link).
    mutating func form(block: Int, page: PageIndex, in memory: Mapping, keeps: Bool) -> Form {
        let offset = Int(page.offset.value)
        counts.seen += 1
        guard let place = cache.find(block: block, page: page.value) else {
            counts.misses += 1
            guard keeps, let place = cache.insert(block: block, page: page.value) else { return .direct }
            cache.pages.copy(from: memory, at: offset, count: XBZRLECache.pageBytes, to: place)
            return .copy(at: place)
        }
        counts.pages += 1
        working.copy(from: memory, at: offset, count: XBZRLECache.pageBytes)
        switch encode(place) {
        case .unchanged: return .unchanged
        case .bytes(let count):
            cache.pages.copy(from: working, at: 0, count: XBZRLECache.pageBytes, to: place)
            counts.bytes += UInt64(count) + 3
            return .delta(byteCount: count)
        case .tooLong:
            cache.pages.copy(from: working, at: 0, count: XBZRLECache.pageBytes, to: place)
            counts.overflows += 1
            counts.bytes += UInt64(XBZRLECache.pageBytes)
            return .copy(at: place)
        }
    }

    /// The page is sent as zeros.
    mutating func sentZero(block: Int, page: PageIndex) {
        counts.seen += 1
        guard let place = cache.find(block: block, page: page.value) else { return }
        cache.pages.zero(at: place, count: XBZRLECache.pageBytes)
    }

    private func encode(_ place: Int) -> XBZRLE.Encoding {
        unsafe cache.pages.withBytes(at: place, count: XBZRLECache.pageBytes) { old in
            unsafe working.withBytes(at: 0, count: XBZRLECache.pageBytes) { new in
                unsafe encoding.withMutableBytes(at: 0, count: Self.longestDelta) { room in
                    unsafe XBZRLE.encode(from: old, to: new, into: room)
                }
            }
        }
    }

    /// What was counted since it was last taken.
    mutating func takeCounts() -> XBZRLECounts {
        defer { counts = XBZRLECounts(cacheBytes: counts.cacheBytes) }
        return counts
    }
}

/// What `query-migrate` says as `xbzrle-cache`, as differences.
struct XBZRLECounts: Sendable, Equatable {
    var cacheBytes: UInt64 = 0
    /// Pages looked at, zero pages among them.
    var seen: UInt64 = 0
    /// Pages that were in the cache, whatever became of them, and those that were not.
    var pages: UInt64 = 0
    var misses: UInt64 = 0
    /// Bytes that the former took on the wire, without the first word of each record.
    var bytes: UInt64 = 0
    /// Pages that changed too much.
    var overflows: UInt64 = 0
    /// Pages that were not sent whole: they are neither `normal` nor `duplicate`.
    var deltasAndUnchanged: UInt64 { pages - overflows }
}
