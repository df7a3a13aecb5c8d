extension GuestExpectation {
    /// What the count in a page's stamp may be: `count`, or one more if a write is in flight.
    struct Count {
        let count: UInt32
        let mayBeOneMore: Bool
        /// Whether the page has been touched for certain.
        let isTouched: Bool
    }

    @inline(__always)
    func expectedCount(page: UInt64) -> Count {
        guard let walk else { return Count(count: 0, mayBeOneMore: false, isTouched: false) }
        let distance = page - walk.workFirst
        // The common stride spares a division.
        let (position, rest) = walk.stride == 1 ? (distance, 0) : distance.quotientAndRemainder(dividingBy: walk.stride)
        guard rest == 0 else { return Count(count: 0, mayBeOneMore: false, isTouched: false) }
        let index = walk.order.index(of: position - walk.firstPosition)
        let count = walk.passes &+ (index < walk.index ? 1 : 0)
        return Count(
            count: UInt32(truncatingIfNeeded: count), mayBeOneMore: index == walk.index && walk.hasBegun,
            isTouched: count > 0)
    }

    /// Compare `pages` pages whose words are given.
    ///
    /// `words` must hold all of them; that is the caller's promise, the loop does not check it.
    @unsafe
    func compare(
        _ words: UnsafeBufferPointer<UInt64>, firstPage: UInt64, pages: Int, map: MemoryMap,
        into result: inout GuestCheck
    ) {
        guard let base = words.baseAddress else { return }
        for offset in 0..<pages {
            let page = firstPage + UInt64(offset)
            // SAFETY: the caller promises `pages` pages of words.
            let content = unsafe base + offset * GuestLayout.wordsPerPage
            let stamp = unsafe content[0]
            let expected = expectedCount(page: page)
            guard isFilled || expected.isTouched else {
                result.pagesUnwritten += 1
                continue
            }
            result.pagesChecked += 1
            let wanted = PageContents.stamp(page: page, count: expected.count)
            let difference = Int32(truncatingIfNeeded: stamp &- wanted)
            let isRight = stamp == wanted || (expected.mayBeOneMore && difference == 1 && stamp >> 32 == wanted >> 32)
            var fault: GuestCheck.Example?
            let address = map.physicalAddress(page * GuestLayout.pageBytes)
            if stamp >> 32 != wanted >> 32 {
                fault = .init(fault: .mismatchedTag, physicalAddress: address, found: stamp, expected: wanted)
            } else if isFilled, let wrong = unsafe wrongNoise(content, page: page) {
                fault = .init(
                    fault: .damagedContent, physicalAddress: address, found: wrong.found, expected: wrong.expected)
            } else if !isRight {
                fault = .init(
                    fault: difference < 0 ? .stale : .premature, physicalAddress: address, found: stamp,
                    expected: wanted)
            }
            if let fault { result.record(fault) }
        }
    }

    /// The first word behind the stamp that is not what the fill wrote.
    @unsafe @inline(__always)
    private func wrongNoise(
        _ content: UnsafePointer<UInt64>, page: UInt64
    ) -> (found: UInt64, expected: UInt64)? {
        var differences: UInt64 = 0
        var noise = PageContents.noiseSeed(page: page, seed: seed)
        for index in 1..<max(words, 1) {
            noise = PageContents.nextNoise(noise)
            // SAFETY: `content` is a whole page, and `words` at most its 512 words.
            differences |= unsafe content[index] ^ noise
        }
        for index in words..<GuestLayout.wordsPerPage {
            differences |= unsafe content[index]
        }
        return differences == 0 ? nil : unsafe firstWrong(content, page: page)
    }

    @unsafe @inline(never)
    private func firstWrong(_ content: UnsafePointer<UInt64>, page: UInt64) -> (found: UInt64, expected: UInt64)? {
        var noise = PageContents.noiseSeed(page: page, seed: seed)
        for index in 1..<GuestLayout.wordsPerPage {
            noise = PageContents.nextNoise(noise)
            let expected = index < words ? noise : 0
            // SAFETY: `content` is a whole page.
            let found = unsafe content[index]
            if found != expected { return (found, expected) }
        }
        return nil
    }
}
