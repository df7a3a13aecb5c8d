/// Sorts page numbers as rings deliver them: in no order, many of them more than once.
@unsafe public enum PageSort {
    /// As many at a time as the second-level cache holds twice.
    private static let batch = 1 << 14
    private static let digitBits: UInt64 = 9

    /// Calls `body` with pages in ascending order without duplicates, a batch at a time. Pages from `limit` on are left out.
    static func forEachBatch(
        of pages: UnsafeBufferPointer<UInt64>, below limit: UInt64, _ body: (UnsafeBufferPointer<UInt64>) -> Void
    ) {
        let room = unsafe min(pages.count, batch)
        unsafe withUnsafeTemporaryAllocation(of: UInt64.self, capacity: room * 2) { buffer in
            let one = buffer.baseAddress!
            for start in stride(from: 0, to: pages.count, by: room) {
                var count = 0
                var ascends = true
                var last: UInt64 = 0
                for index in start..<min(start + room, pages.count) {
                    let page = unsafe pages[index]
                    // A page that is written again and again comes as many times in a row.
                    if page >= limit || page == last && count > 0 { continue }
                    if page < last { ascends = false }
                    last = page
                    unsafe one[count] = page
                    count &+= 1
                }
                if ascends {
                    unsafe body(UnsafeBufferPointer(start: one, count: count))
                } else {
                    let sorted = unsafe sort(one, spare: one + room, count)
                    unsafe body(UnsafeBufferPointer(start: sorted, count: dropDuplicates(sorted, count)))
                }
            }
        }
    }

    /// Sorts numbers in place, ascending, duplicates and all.
    public static func sort(_ numbers: UnsafeMutableBufferPointer<UInt64>) {
        guard let start = numbers.baseAddress, numbers.count > 1 else { return }
        unsafe withUnsafeTemporaryAllocation(of: UInt64.self, capacity: numbers.count) { spare in
            let sorted = unsafe sort(start, spare: spare.baseAddress!, numbers.count)
            if unsafe sorted != start { unsafe start.update(from: sorted, count: numbers.count) }
        }
    }

    /// By digits from the lowest, over the bits in which the pages differ. - Returns: which of the two buffers holds the result.
    private static func sort(
        _ pages: UnsafeMutablePointer<UInt64>, spare: UnsafeMutablePointer<UInt64>, _ count: Int
    ) -> UnsafeMutablePointer<UInt64> {
        var (all, common): (UInt64, UInt64) = (0, ~0)
        for index in 0..<count {
            unsafe all |= pages[index]
            unsafe common &= pages[index]
        }
        let bitCount = UInt64(64 - (all & ~common).leadingZeroBitCount)
        var (from, to) = unsafe (pages, spare)
        unsafe withUnsafeTemporaryAllocation(of: Int32.self, capacity: 1 << Int(digitBits)) { places in
            let place = places.baseAddress!
            for shift in unsafe stride(from: 0, to: bitCount, by: Int(digitBits)) {
                let mask: UInt64 = unsafe 1 << digitBits - 1
                unsafe place.update(repeating: 0, count: 1 << Int(digitBits))
                for index in 0..<count { unsafe place[Int(from[index] &>> shift & mask)] &+= 1 }
                var sum: Int32 = 0
                for digit in unsafe 0..<1 << Int(digitBits) {
                    let these = unsafe place[digit]
                    unsafe place[digit] = sum
                    sum &+= these
                }
                for index in 0..<count {
                    let page = unsafe from[index]
                    let digit = Int(page &>> shift & mask)
                    unsafe to[Int(place[digit])] = page
                    unsafe place[digit] &+= 1
                }
                unsafe (from, to) = unsafe (to, from)
            }
        }
        return unsafe from
    }

    private static func dropDuplicates(_ pages: UnsafeMutablePointer<UInt64>, _ count: Int) -> Int {
        guard count > 0 else { return 0 }
        var kept = 1
        for index in 1..<count {
            let page = unsafe pages[index]
            unsafe pages[kept] = page
            kept &+= unsafe page == pages[kept &- 1] ? 0 : 1
        }
        return kept
    }
}
