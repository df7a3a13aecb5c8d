import Host

/// Pages as the destination has them, so that the next version can be sent as a difference. Of limited size; keyed by block and page.
///
/// Eight places for each page, found by the low bits of its number: a contiguous working set as large as the cache fits, save eight pages
/// at worst. A page keeps its place until four times as many pages as the cache holds were looked for without it, and in any case if it was used in
/// this round or the last. So of a working set up to four times as large as the cache the same part stays, and is found in each cycle of the
/// guest; whoever made room for the newest, or counted short rounds, would push out every page just before it comes again.
struct XBZRLECache: ~Copyable {
    /// Bytes of pages it holds at most.
    let byteCount: UInt64
    /// The page in place `slot` begins at `slot * pageBytes`. Untouched memory until then.
    let pages: Mapping
    /// Per place: the key and one (zero: empty), the time of its last use.
    private let tags: Mapping
    private let ways: UInt64
    private let setMask: UInt64
    private let setBits: UInt64
    private let slots: UInt64
    /// Time passes by pages looked for; `times` are when this round and the one before began.
    private var now: UInt64 = 0
    private var times: (round: UInt64, previous: UInt64) = (0, 0)

    static let pageBytes = 4096
    private static let tagBytes = 16
    private static let mostWays: UInt64 = 8
    /// In cache sizes.
    private static let lifetime: UInt64 = 4

    /// - Parameter byteCount: a power of two, at least a page.
    init(byteCount: UInt64) throws(SystemError) {
        precondition(Self.isSize(byteCount), "XBZRLECache: a power of two of at least a page")
        slots = byteCount / UInt64(Self.pageBytes)
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

    mutating func roundBegins() { times = (now, times.round) }

    /// Where the page is, as an offset in `pages`; it counts as used. `nil` if it is not here.
    mutating func find(block: Int, page: UInt64) -> Int? {
        now += 1
        let key = Self.key(block, page)
        let set = set(block, page)
        for way in 0..<ways where load(set, way, 0) == key {
            store(now, set, way, 8)
            return place(set, way)
        }
        return nil
    }

    /// A place for a page that is not here: an empty one, else that of the page unused for longest. The caller fills it at once.
    ///
    /// - Returns: its offset in `pages`; `nil` if all that could make room are kept.
    mutating func insert(block: Int, page: UInt64) -> Int? {
        let set = set(block, page)
        var choice: UInt64?
        var oldest = times.previous
        for way in 0..<ways {
            if load(set, way, 0) == 0 {
                choice = way
                break
            }
            let used = load(set, way, 8)
            guard used <= oldest, used + Self.lifetime * slots <= now else { continue }
            (choice, oldest) = (way, used)
        }
        guard let choice else { return nil }
        store(Self.key(block, page), set, choice, 0)
        store(now, set, choice, 8)
        return place(set, choice)
    }

    /// Never zero.
    private static func key(_ block: Int, _ page: UInt64) -> UInt64 { UInt64(block) << 48 | (page + 1) }

    private func set(_ block: Int, _ page: UInt64) -> UInt64 {
        // Each time the sets are used up the next page goes one further, so that equal distances do not all meet in one set.
        (page &+ page >> setBits &+ UInt64(block) &* 0x9e37) & setMask
    }

    /// Neighbours stand side by side: what is used of the cache is whole huge pages of it.
    private func place(_ set: UInt64, _ way: UInt64) -> Int { Int(way * (setMask + 1) + set) * Self.pageBytes }

    private func load(_ set: UInt64, _ way: UInt64, _ field: Int) -> UInt64 {
        tags.load(at: Int(set * ways + way) * Self.tagBytes + field, as: UInt64.self)
    }

    private func store(_ value: UInt64, _ set: UInt64, _ way: UInt64, _ field: Int) {
        tags.store(value, at: Int(set * ways + way) * Self.tagBytes + field)
    }
}
