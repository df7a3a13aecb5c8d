import GuestMemory

/// Bits in words: bit i is bit i % 64 of word i / 64.
enum DirtyWords {
    /// Visits the words that hold a range of bits, with a mask of the bits that are in it.
    static func forEach(_ bits: Range<UInt64>, _ body: (Int, UInt64) -> Void) {
        var bit = bits.lowerBound
        while bit < bits.upperBound {
            let stop = min(bits.upperBound, (bit / 64 + 1) * 64)
            let length = stop - bit
            body(Int(bit / 64), length == 64 ? ~0 : ((1 << length) - 1) << (bit % 64))
            bit = stop
        }
    }

    static func clear(_ bits: Range<UInt64>, in words: inout [UInt64]) { forEach(bits) { words[$0] &= ~$1 } }

    static func set(_ bits: Range<UInt64>, in words: inout [UInt64]) { forEach(bits) { words[$0] |= $1 } }

    /// Visits the runs of set bits; a run may be cut at a word's end.
    static func forEachRun(_ words: [UInt64], _ body: (Range<UInt64>) -> Void) {
        for index in words.indices {
            var bits = words[index]
            while bits != 0 {
                let start = UInt64(bits.trailingZeroBitCount)
                let length = UInt64((~(bits >> start)).trailingZeroBitCount)
                let count = min(length, 64 - start)
                body(UInt64(index) * 64 + start..<UInt64(index) * 64 + start + count)
                bits &= start + count == 64 ? 0 : ~0 << (start + count)
            }
        }
    }
}

extension DirtyPages {
    /// The words of `pages`, which starts at a multiple of 64; bits past the range are zero.
    func words(of pages: Range<PageIndex>) -> [UInt64] {
        var words = unsafe withWords(of: pages) { unsafe Array($0) }
        let count = UInt64(pages.count)
        if count % 64 != 0, !words.isEmpty { words[words.count - 1] &= (1 << (count % 64)) - 1 }
        return words
    }

    /// The pages of a range that this record and `other` mark both, as words.
    /// - Precondition: the range starts at a multiple of 64.
    func words(inCommonWith other: any DirtyPages, in pages: Range<PageIndex>) -> [UInt64] {
        guard !isEmpty, !other.isEmpty,
            nextRun(from: pages.lowerBound, limit: 1).map({ $0.lowerBound < pages.upperBound }) == true
        else { return [] }
        var both = words(of: pages)
        let theirs = other.words(of: pages)
        for index in both.indices { both[index] &= theirs[index] }
        return both
    }

    /// Unmarks the pages whose bits are set; bit 0 is page `first`.
    func clear(_ words: [UInt64], from first: PageIndex) {
        DirtyWords.forEachRun(words) {
            clear(first.advanced(by: Int($0.lowerBound))..<first.advanced(by: Int($0.upperBound)))
        }
    }
}
