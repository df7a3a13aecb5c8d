/// Bits of a report, read as if they began where a record's words begin: two source words are shifted and combined for each word of the
/// record. Reads no word that holds none of the bits.
///
/// SAFETY: valid only inside the call that was given the words; `init` has checked that the bits lie inside them.
@unsafe struct ReportedBits {
    private let words: UnsafePointer<UInt64>
    /// The bit of `words` that is the first of `range`.
    private let firstBit: Int
    /// The record's bits that are reported.
    let range: Range<Int>

    /// - Returns: `nil` if nothing of the report lies inside a record of `pageCount` pages.
    init?(
        _ words: UnsafeBufferPointer<UInt64>, fromBit firstBit: UInt64, pageCount reported: UInt64, at page: PageIndex,
        in pageCount: UInt64
    ) {
        let bitCount = UInt64(words.count) * 64
        precondition(firstBit <= bitCount && reported <= bitCount - firstBit, "the bits lie inside the words")
        guard page.value < pageCount, reported > 0, let start = words.baseAddress else { return nil }
        unsafe self.words = unsafe start
        unsafe self.firstBit = Int(firstBit)
        unsafe range = Int(page.value)..<Int(page.value + min(reported, pageCount - page.value))
    }

    /// The record's words that hold reported bits, and those all of whose bits are reported.
    var coveredWords: Range<Int> { unsafe range.lowerBound / 64..<(range.upperBound + 63) / 64 }
    var fullWords: Range<Int> {
        let low = unsafe (range.lowerBound + 63) / 64
        return unsafe low..<max(low, range.upperBound / 64)
    }

    /// Where full word `index` of the record begins: it is `at[0]`, or the upper part of that and the lower part of `at[1]`.
    @inline(__always)
    func source(ofWord index: Int) -> (at: UnsafePointer<UInt64>, shift: UInt64) {
        let position = unsafe firstBit + (index &* 64 - range.lowerBound)
        return unsafe (words + position / 64, UInt64(position % 64))
    }

    /// The reported bits of covered word `index` of the record.
    func partialWord(_ index: Int) -> UInt64 {
        let low = unsafe max(range.lowerBound, index * 64)
        let count = unsafe min(range.upperBound, index * 64 + 64) - low
        let position = unsafe firstBit + (low - range.lowerBound)
        let shift = UInt64(position % 64)
        var bits = unsafe words[position / 64] >> shift
        if Int(shift) + count > 64 { unsafe bits |= words[position / 64 + 1] << (64 - shift) }
        let mask: UInt64 = count >= 64 ? ~0 : (1 << UInt64(count)) - 1
        return (bits & mask) << UInt64(low - index * 64)
    }

    /// Whether none of the record's bits `part`, a part of `range`, is reported. May say no because of bits next to them.
    func looksEmpty(_ part: Range<Int>) -> Bool {
        let from = unsafe (firstBit + (part.lowerBound - range.lowerBound)) / 64
        let to = unsafe (firstBit + (part.upperBound - range.lowerBound) + 63) / 64
        return unsafe WordScan.isZero(words + from, to - from)
    }

    /// Writes the record's words `indices`, all covered, to `target`.
    func copy(words indices: Range<Int>, to target: UnsafeMutablePointer<UInt64>) {
        let full = unsafe fullWords.clamped(to: indices)
        for index in indices.lowerBound..<full.lowerBound {
            unsafe target[index - indices.lowerBound] = partialWord(index)
        }
        if !full.isEmpty {
            let (from, shift) = unsafe source(ofWord: full.lowerBound)
            let to = unsafe target + (full.lowerBound - indices.lowerBound)
            if shift == 0 {
                unsafe to.update(from: from, count: full.count)
            } else {
                let rest = 64 &- shift
                for index in 0..<full.count { unsafe to[index] = from[index] &>> shift | from[index &+ 1] &<< rest }
            }
        }
        for index in full.upperBound..<indices.upperBound {
            unsafe target[index - indices.lowerBound] = partialWord(index)
        }
    }
}

/// Loops over many words at once.
@unsafe enum WordScan {
    /// Whether `count` words are zero, a cache line at a time.
    static func isZero(_ words: UnsafePointer<UInt64>, _ count: Int) -> Bool {
        var index = 0
        while index &+ 8 <= count {
            let p = unsafe words + index
            let any = unsafe p[0] | p[1] | p[2] | p[3] | p[4] | p[5] | p[6] | p[7]
            if any != 0 { return false }
            index &+= 8
        }
        while index < count {
            if unsafe words[index] != 0 { return false }
            index &+= 1
        }
        return true
    }

    static func bitCount(_ words: UnsafePointer<UInt64>, _ count: Int) -> Int {
        var sum: UInt64 = 0
        for index in 0..<count { unsafe sum &+= UInt64(truncatingIfNeeded: words[index].nonzeroBitCount) }
        return Int(truncatingIfNeeded: sum)
    }

    /// The words that hold `bits`, each with a mask of which bits of it: masked head and tail, whole words between.
    @inline(__always)
    static func forEachWord(of bits: Range<Int>, _ body: (Int, UInt64) -> Void) {
        guard !bits.isEmpty else { return }
        let first = bits.lowerBound / 64
        let last = (bits.upperBound - 1) / 64
        let head: UInt64 = ~0 << UInt64(bits.lowerBound % 64)
        let tail: UInt64 = ~0 >> UInt64(63 - (bits.upperBound - 1) % 64)
        guard first < last else { return body(first, head & tail) }
        body(first, head)
        var index = first &+ 1
        while index < last {
            body(index, ~0)
            index &+= 1
        }
        body(last, tail)
    }
}
