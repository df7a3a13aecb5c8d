import Host

/// Pages as the destination has them, so that the next version can be sent as a difference. Of limited size; keyed by block and page.
///
/// Eight places for each page, found by the low bits of its number: a contiguous working set as large as the cache fits, save eight pages
/// at worst. A page that was used in this round or the last keeps its place, as in QEMU's cache: a working set that is larger than the cache would else push
/// out every page just before it comes again.
struct XBZRLECache: ~Copyable {
    /// Bytes of pages it holds at most.
    let byteCount: UInt64
    /// The page in place `slot` begins at `slot * pageBytes`. Untouched memory until then.
    let pages: Mapping
    /// Per place: the key and one (zero: empty), the round in which it was used last.
    private let tags: Mapping
    private let ways: UInt64
    private let setMask: UInt64
    private let setBits: UInt64

    static let pageBytes = 4096
    private static let tagBytes = 16
    private static let mostWays: UInt64 = 8
    private static let lifetimeRounds: UInt64 = 2

    /// - Parameter byteCount: a power of two, at least a page.
    init(byteCount: UInt64) throws(SystemError) {
        precondition(Self.isSize(byteCount), "XBZRLECache: a power of two of at least a page")
        let slots = byteCount / UInt64(Self.pageBytes)
        let pages = try Mapping(anonymousByteCount: Int(byteCount))
        let tags = try Mapping(anonymousByteCount: Int(slots) * Self.tagBytes)
        // Only advice: the first touch of a page costs a sixth then, and a cache is filled while a guest waits for convergence.
        try? pages.advise(.hugePages)
        self.pages = pages
        self.tags = tags
        self.byteCount = byteCount
        ways = min(slots, Self.mostWays)
        setMask = slots / ways - 1
        setBits = UInt64(setMask.nonzeroBitCount)
    }

    /// What QEMU takes as a size, and this process can address.
    static func isSize(_ byteCount: UInt64) -> Bool {
        byteCount >= UInt64(pageBytes) && byteCount <= 1 << 46 && byteCount.nonzeroBitCount == 1
    }

    /// Where the page is, as an offset in `pages`; it counts as used. `nil` if it is not here.
    mutating func find(block: Int, page: UInt64, round: UInt64) -> Int? {
        let key = Self.key(block, page)
        let first = firstSlot(block, page)
        for slot in first..<(first + ways) where load(slot, 0) == key {
            store(round, slot, 8)
            return Int(slot) * Self.pageBytes
        }
        return nil
    }

    /// A place for a page that is not here: an empty one, else that of the page unused for longest. The caller fills it at once.
    ///
    /// - Returns: its offset in `pages`; `nil` if all that could make room were used lately.
    mutating func insert(block: Int, page: UInt64, round: UInt64) -> Int? {
        let first = firstSlot(block, page)
        var choice: UInt64?
        var oldest = round
        for slot in first..<(first + ways) {
            if load(slot, 0) == 0 {
                choice = slot
                break
            }
            let used = load(slot, 8)
            guard used + Self.lifetimeRounds <= round, used < oldest else { continue }
            (choice, oldest) = (slot, used)
        }
        guard let choice else { return nil }
        store(Self.key(block, page), choice, 0)
        store(round, choice, 8)
        return Int(choice) * Self.pageBytes
    }

    /// Never zero.
    private static func key(_ block: Int, _ page: UInt64) -> UInt64 { UInt64(block) << 48 | (page + 1) }

    private func firstSlot(_ block: Int, _ page: UInt64) -> UInt64 {
        // Each time the sets are used up the next page goes one further, so that equal distances do not all meet in one set.
        ((page &+ page >> setBits &+ UInt64(block) &* 0x9e37) & setMask) * ways
    }

    private func load(_ slot: UInt64, _ field: Int) -> UInt64 {
        tags.load(at: Int(slot) * Self.tagBytes + field, as: UInt64.self)
    }

    private func store(_ value: UInt64, _ slot: UInt64, _ field: Int) {
        tags.store(value, at: Int(slot) * Self.tagBytes + field)
    }
}
