/// What moves many words at once: reports of the kernel, other records.
extension DirtyBitmap {
    @unsafe public func merge(
        _ reported: UnsafeBufferPointer<UInt64>, fromBit firstBit: UInt64, pageCount reportedPages: UInt64,
        at first: PageIndex
    ) {
        guard
            let bits = unsafe ReportedBits(
                reported, fromBit: firstBit, pageCount: reportedPages, at: first, in: pageCount)
        else { return }
        let (covered, full) = unsafe (bits.coveredWords, bits.fullWords)
        if unsafe bits.range.count <= 64 || full.isEmpty {
            for index in covered { unsafe orWord(bits.partialWord(index), index) }
        } else {
            if covered.lowerBound < full.lowerBound {
                unsafe orWord(bits.partialWord(covered.lowerBound), covered.lowerBound)
            }
            let (source, shift) = unsafe bits.source(ofWord: full.lowerBound)
            unsafe orWords(source, shift: shift, full)
            if full.upperBound < covered.upperBound {
                unsafe orWord(bits.partialWord(full.upperBound), full.upperBound)
            }
        }
        knownCount = nil
    }

    public func formUnion(_ other: any DirtyPages) {
        guard other !== self else { return }
        if let other = other as? DirtyBitmap {
            unsafe other.forEachGroup(in: other.allPages) { first, words in unsafe merge(words, at: first) }
        } else {
            addRuns(of: other)
        }
    }

    public func take(_ pages: Range<PageIndex>, into other: any DirtyPages) {
        precondition(pages.upperBound.value <= min(pageCount, other.pageCount), "pages of both blocks")
        guard other !== self, !pages.isEmpty else { return }
        let word = unsafe word
        var moved = false
        forEachMarkedGroup(in: Int(pages.lowerBound.value)..<Int(pages.upperBound.value)) { part in
            let first = part.lowerBound / 64
            let count = (part.upperBound + 63) / 64 - first
            guard unsafe !WordScan.isZero(word + first, count) else { return }
            let piece = unsafe UnsafeBufferPointer(start: word + first, count: count)
            unsafe other.merge(
                piece, fromBit: UInt64(part.lowerBound % 64), pageCount: UInt64(part.count),
                at: PageIndex(UInt64(part.lowerBound)))
            unsafe WordScan.forEachWord(of: part) { index, mask in unsafe word[index] &= ~mask }
            moved = true
        }
        if pages == allPages { knownCount = 0 } else if moved { knownCount = nil }
    }

    private func orWord(_ bits: UInt64, _ index: Int) {
        guard bits != 0 else { return }
        unsafe word[index] |= bits
        unsafe mark[index / 4096] |= 1 << UInt64(index / 64 % 64)
    }

    /// Words `full` of the record, from `source` on: by groups of the summary, and in them by cache lines, of which those with nothing to
    /// report are left untouched.
    private func orWords(_ source: UnsafePointer<UInt64>, shift: UInt64, _ full: Range<Int>) {
        let (word, mark) = unsafe (word, mark)
        var index = full.lowerBound
        var from = unsafe source
        while index < full.upperBound {
            let end = min(full.upperBound, (index / Self.groupWords + 1) * Self.groupWords)
            let isMarked =
                shift == 0
                ? unsafe WordMerge.aligned(from, into: word + index, end &- index)
                : unsafe WordMerge.shifted(from, by: shift, into: word + index, end &- index)
            if isMarked { unsafe mark[index / 4096] |= 1 << UInt64(index / 64 % 64) }
            unsafe from += end &- index
            index = end
        }
    }
}

/// The two inner loops of a merge. Each returns whether anything was reported.
@unsafe enum WordMerge {
    @inline(__always)
    static func aligned(
        _ from: UnsafePointer<UInt64>, into to: UnsafeMutablePointer<UInt64>, _ count: Int
    ) -> Bool {
        var any: UInt64 = 0
        var index = 0
        while index &+ 8 <= count {
            let p = unsafe from + index
            let (a, b, c, d) = unsafe (p[0], p[1], p[2], p[3])
            let (e, f, g, h) = unsafe (p[4], p[5], p[6], p[7])
            let line = a | b | c | d | e | f | g | h
            if line != 0 {
                any |= line
                let q = unsafe to + index
                let (i, j, k, l) = unsafe (q[0] | a, q[1] | b, q[2] | c, q[3] | d)
                let (m, n, o, r) = unsafe (q[4] | e, q[5] | f, q[6] | g, q[7] | h)
                unsafe (q[0], q[1], q[2], q[3]) = (i, j, k, l)
                unsafe (q[4], q[5], q[6], q[7]) = (m, n, o, r)
            }
            index &+= 8
        }
        while index < count {
            let bits = unsafe from[index]
            if bits != 0 { unsafe to[index] |= bits }
            any |= bits
            index &+= 1
        }
        return any != 0
    }

    /// As above for words that begin at bit `shift`, 1 to 63, of the source's. A cache line's look at nine words would cost as much as the
    /// merge itself: here it is all words or none.
    @inline(__always)
    static func shifted(
        _ from: UnsafePointer<UInt64>, by shift: UInt64, into to: UnsafeMutablePointer<UInt64>, _ count: Int
    ) -> Bool {
        if unsafe WordScan.isZero(from, count + 1) { return false }
        let rest = 64 &- shift
        // Written with vectors, because the compiler does not make any of the shifts of single words.
        let (down, up) = (SIMD4<UInt64>(repeating: shift), SIMD4<UInt64>(repeating: rest))
        let (source, target) = unsafe (UnsafeRawPointer(from), UnsafeMutableRawPointer(to))
        var index = 0
        while index &+ 4 <= count {
            let place = index &* 8
            let low = unsafe source.loadUnaligned(fromByteOffset: place, as: SIMD4<UInt64>.self)
            let high = unsafe source.loadUnaligned(fromByteOffset: place &+ 8, as: SIMD4<UInt64>.self)
            let old = unsafe target.loadUnaligned(fromByteOffset: place, as: SIMD4<UInt64>.self)
            unsafe target.storeBytes(of: old | low &>> down | high &<< up, toByteOffset: place, as: SIMD4<UInt64>.self)
            index &+= 4
        }
        while index < count {
            unsafe to[index] |= from[index] &>> shift | from[index &+ 1] &<< rest
            index &+= 1
        }
        return true
    }
}
