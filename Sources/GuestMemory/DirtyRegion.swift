/// The dirty pages among 32,768 (128 MiB of guest memory): sorted 16-bit offsets while they are few, a bit per page when they are many,
/// nothing at all when there are none. Turns from one into the other by itself.
///
/// The struct is a handle: copies share the storage, which whoever holds it frees by `removeAll`.
///
/// SAFETY: `storage` is `capacity` offsets or, where that is `dense`, 512 words, and is reached through indices below `count` or
/// offsets below 32,768 only.
@safe struct DirtyRegion {
    static let shift: UInt64 = 15
    static let pageCount = 1 << 15
    static let wordCount = pageCount / 64
    /// More offsets than this become bits; measured: from here on the array costs more to insert into than the bits to walk.
    static let sparseLimit = 256
    private static let dense: Int32 = -1

    private(set) var count = 0
    private var capacity: Int32 = 0
    private var storage: UnsafeMutableRawPointer? = nil

    var isEmpty: Bool { count == 0 }
    var isDense: Bool { capacity == Self.dense }
    /// What it occupies, besides its entry.
    var byteCount: Int { isDense ? Self.wordCount * 8 : Int(capacity) * 2 }

    private var offsets: UnsafeMutablePointer<UInt16> { unsafe storage!.assumingMemoryBound(to: UInt16.self) }
    private var words: UnsafeMutablePointer<UInt64> { unsafe storage!.assumingMemoryBound(to: UInt64.self) }

    // MARK: Single pages

    func contains(_ offset: Int) -> Bool {
        guard count > 0 else { return false }
        if isDense { return unsafe words[offset / 64] >> UInt64(offset % 64) & 1 != 0 }
        let place = lowerBound(offset)
        return unsafe place < count && offsets[place] == offset
    }

    /// - Returns: whether it was clean.
    mutating func insert(_ offset: Int) -> Bool {
        if !isDense {
            var place = count
            if count > 0, unsafe Int(offsets[count - 1]) >= offset {
                place = lowerBound(offset)
                if unsafe offsets[place] == offset { return false }
            }
            if count < Self.sparseLimit {
                makeRoom(count + 1)
                let start = unsafe offsets
                unsafe (start + place + 1).update(from: start + place, count: count - place)
                unsafe start[place] = UInt16(truncatingIfNeeded: offset)
                count += 1
                return true
            }
            makeDense()
        }
        let bit: UInt64 = 1 << UInt64(offset % 64)
        let word = unsafe words + offset / 64
        guard unsafe word.pointee & bit == 0 else { return false }
        unsafe word.pointee |= bit
        count += 1
        return true
    }

    // MARK: Many at once; each returns by how much `count` changed

    /// Marks offsets that ascend, none twice.
    mutating func insert(ascending new: UnsafePointer<UInt16>, _ newCount: Int) -> Int {
        let before = count
        if !isDense {
            if count + newCount <= Self.sparseLimit {
                unsafe mergeSparse(new, newCount)
                return count - before
            }
            makeDense()
        }
        let words = unsafe words
        var fresh = 0
        for index in 0..<newCount {
            let offset = unsafe Int(new[index])
            let old = unsafe words[offset / 64]
            let bits = old | 1 << UInt64(offset % 64)
            unsafe words[offset / 64] = bits
            fresh += bits == old ? 0 : 1
        }
        count += fresh
        settle()
        return fresh
    }

    mutating func set(_ part: Range<Int>) -> Int {
        let before = count
        if !isDense {
            if count + part.count <= Self.sparseLimit {
                makeRoom(count + part.count)
                let from = lowerBound(part.lowerBound)
                let to = lowerBound(part.upperBound)
                let start = unsafe offsets
                unsafe (start + from + part.count).update(from: start + to, count: count - to)
                for index in 0..<part.count {
                    unsafe start[from + index] = UInt16(truncatingIfNeeded: part.lowerBound + index)
                }
                count += part.count - (to - from)
                return count - before
            }
            makeDense()
        }
        let words = unsafe words
        var fresh = 0
        unsafe WordScan.forEachWord(of: part) { index, mask in
            let old = unsafe words[index]
            fresh &+= (mask & ~old).nonzeroBitCount
            unsafe words[index] = old | mask
        }
        count += fresh
        return fresh
    }

    mutating func clear(_ part: Range<Int>) -> Int {
        guard count > 0 else { return 0 }
        let before = count
        if part.count == Self.pageCount {
            removeAll()
        } else if isDense {
            let words = unsafe words
            var gone = 0
            unsafe WordScan.forEachWord(of: part) { index, mask in
                let old = unsafe words[index]
                gone &+= (mask & old).nonzeroBitCount
                unsafe words[index] = old & ~mask
            }
            count -= gone
            settle()
        } else {
            let from = lowerBound(part.lowerBound)
            let to = lowerBound(part.upperBound)
            unsafe (offsets + from).update(from: offsets + to, count: count - to)
            count -= to - from
            if count == 0 { removeAll() }
        }
        return before - count
    }

    /// Marks what `new` words report, of which the first is the region's word `first`.
    mutating func merge(_ new: UnsafePointer<UInt64>, at first: Int, _ newCount: Int) -> Int {
        let before = count
        if !isDense {
            let bits = unsafe WordScan.bitCount(new, newCount)
            if bits == 0 { return 0 }
            if count + bits <= Self.sparseLimit {
                unsafe withUnsafeTemporaryAllocation(of: UInt16.self, capacity: bits) { list in
                    let start = list.baseAddress!
                    unsafe Self.list(new, at: first, newCount, into: start)
                    unsafe mergeSparse(start, bits)
                }
                return count - before
            }
            makeDense()
        }
        let old = unsafe words + first
        var fresh: UInt64 = 0
        for index in 0..<newCount {
            let bits = unsafe new[index]
            unsafe fresh &+= UInt64(truncatingIfNeeded: (bits & ~old[index]).nonzeroBitCount)
            unsafe old[index] |= bits
        }
        count += Int(fresh)
        settle()
        return Int(fresh)
    }

    mutating func formUnion(_ other: DirtyRegion) -> Int {
        guard other.count > 0 else { return 0 }
        return other.isDense
            ? unsafe merge(other.words, at: 0, Self.wordCount) : unsafe insert(ascending: other.offsets, other.count)
    }

    mutating func removeAll() {
        unsafe storage?.deallocate()
        unsafe storage = nil
        capacity = 0
        count = 0
    }

    // MARK: Walks

    /// The first dirty page at or after `offset`.
    func next(from offset: Int) -> Int? {
        guard count > 0, offset < Self.pageCount else { return nil }
        guard isDense else {
            let place = unsafe Int(offsets[0]) >= offset ? 0 : lowerBound(offset)
            return unsafe place < count ? Int(offsets[place]) : nil
        }
        var index = offset / 64
        var bits = unsafe words[index] & (~0 << UInt64(offset % 64))
        while bits == 0 {
            index += 1
            guard index < Self.wordCount else { return nil }
            bits = unsafe words[index]
        }
        return index * 64 + bits.trailingZeroBitCount
    }

    /// Where the run of dirty pages that begins at `offset` ends, at most at `limit`.
    func runEnd(from offset: Int, limit: Int) -> Int {
        let limit = min(limit, Self.pageCount)
        var end = offset
        guard count > 0 else { return end }
        guard isDense else {
            var place = lowerBound(offset)
            while end < limit, unsafe place < count && offsets[place] == end {
                place += 1
                end += 1
            }
            return end
        }
        while end < limit {
            let ones = unsafe (~(words[end / 64] >> UInt64(end % 64))).trailingZeroBitCount
            let step = min(ones, 64 - end % 64)
            end += step
            if end % 64 != 0 || step == 0 { break }
        }
        return min(end, limit)
    }

    /// The words `indices`: its own while the body runs, or written to `scratch`.
    func withWords<R>(
        _ indices: Range<Int>, scratch: UnsafeMutablePointer<UInt64>, _ body: (UnsafePointer<UInt64>) -> R
    ) -> R {
        if isDense { return unsafe body(words + indices.lowerBound) }
        unsafe scratch.update(repeating: 0, count: indices.count)
        let end = lowerBound(indices.upperBound * 64)
        for place in lowerBound(indices.lowerBound * 64)..<end {
            let offset = unsafe Int(offsets[place]) - indices.lowerBound * 64
            unsafe scratch[offset / 64] |= 1 << UInt64(offset % 64)
        }
        return unsafe body(scratch)
    }

    /// The sorted offsets of a region that has few pages; `nil` of one that has many.
    func withOffsets<R>(_ body: (UnsafeBufferPointer<UInt16>) -> R) -> R? {
        guard !isDense else { return nil }
        guard count > 0 else { return unsafe body(UnsafeBufferPointer(start: nil, count: 0)) }
        return unsafe body(UnsafeBufferPointer(start: offsets, count: count))
    }

    // MARK: Storage

    /// The first place whose offset is at least `offset`.
    private func lowerBound(_ offset: Int) -> Int {
        guard count > 0 else { return 0 }
        let offsets = unsafe offsets
        var low = 0
        var length = count
        while length > 0 {
            let half = length &>> 1
            let isBelow = unsafe Int(offsets[low &+ half]) < offset
            low = isBelow ? low &+ half &+ 1 : low
            length = isBelow ? length &- half &- 1 : half
        }
        return low
    }

    private mutating func makeRoom(_ needed: Int) {
        guard needed > capacity else { return }
        var room = max(8, Int(capacity))
        while room < needed { room *= 2 }
        let grown = UnsafeMutableRawPointer.allocate(byteCount: room * 2, alignment: 8)
        let list = unsafe grown.bindMemory(to: UInt16.self, capacity: room)
        if count > 0 { unsafe list.update(from: offsets, count: count) }
        unsafe storage?.deallocate()
        unsafe storage = grown
        capacity = Int32(room)
    }

    private mutating func makeDense() {
        let bits = UnsafeMutableRawPointer.allocate(byteCount: Self.wordCount * 8, alignment: 8)
        let words = unsafe bits.bindMemory(to: UInt64.self, capacity: Self.wordCount)
        unsafe words.update(repeating: 0, count: Self.wordCount)
        for place in 0..<count {
            let offset = unsafe Int(offsets[place])
            unsafe words[offset / 64] |= 1 << UInt64(offset % 64)
        }
        unsafe storage?.deallocate()
        unsafe storage = bits
        capacity = Self.dense
    }

    /// Bits become offsets again when half as many are left as made them bits, so that a page more or less does not cost a change.
    private mutating func settle() {
        guard isDense, count <= Self.sparseLimit / 2 else { return }
        guard count > 0 else { return removeAll() }
        let room = UnsafeMutableRawPointer.allocate(byteCount: Self.sparseLimit, alignment: 8)
        let list = unsafe room.bindMemory(to: UInt16.self, capacity: Self.sparseLimit / 2)
        unsafe Self.list(words, at: 0, Self.wordCount, into: list)
        unsafe storage?.deallocate()
        unsafe storage = room
        capacity = Int32(Self.sparseLimit / 2)
    }

    /// Writes the offsets of the bits of `words`, of which the first is the region's word `first`, to `list`.
    private static func list(
        _ words: UnsafePointer<UInt64>, at first: Int, _ wordCount: Int, into list: UnsafeMutablePointer<UInt16>
    ) {
        var place = 0
        for index in 0..<wordCount {
            var bits = unsafe words[index]
            while bits != 0 {
                unsafe list[place] = UInt16(truncatingIfNeeded: (first &+ index) &* 64 &+ bits.trailingZeroBitCount)
                place &+= 1
                bits &= bits &- 1
            }
        }
    }

    /// Merges two ascending lists; both together have room in a sparse region.
    private mutating func mergeSparse(_ new: UnsafePointer<UInt16>, _ newCount: Int) {
        makeRoom(count + newCount)
        let list = unsafe offsets
        if unsafe count == 0 || newCount == 0 || list[count - 1] < new[0] {
            unsafe (list + count).update(from: new, count: newCount)
            count += newCount
            return
        }
        let oldCount = count
        count = unsafe withUnsafeTemporaryAllocation(of: UInt16.self, capacity: oldCount) { old in
            unsafe old.baseAddress!.update(from: list, count: oldCount)
            var (from, other, to) = (0, 0, 0)
            while from < oldCount, other < newCount {
                let (a, b) = unsafe (old[from], new[other])
                unsafe list[to] = min(a, b)
                to &+= 1
                from &+= a <= b ? 1 : 0
                other &+= b <= a ? 1 : 0
            }
            while from < oldCount {
                unsafe list[to] = old[from]
                (from, to) = (from &+ 1, to &+ 1)
            }
            while other < newCount {
                unsafe list[to] = new[other]
                (other, to) = (other &+ 1, to &+ 1)
            }
            return to
        }
    }
}
