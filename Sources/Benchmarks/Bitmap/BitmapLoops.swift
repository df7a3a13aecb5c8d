/// The loops that merges are held against, each as an honest programmer writes it, and what prepares and checks them.
///
/// SAFETY: callers pass pointers to as many words as the counts say.
@unsafe enum BitmapLoops {
    /// Test each bit of the log, set it in the record: bit `bit` + i of `log` is bit `page` + i of `record`.
    @inline(never)
    static func byBits(
        _ log: UnsafePointer<UInt64>, from bit: UInt64, into record: UnsafeMutablePointer<UInt64>, at page: UInt64,
        _ count: UInt64
    ) {
        var index: UInt64 = 0
        while index < count {
            let source = bit &+ index
            if unsafe log[Int(source / 64)] &>> (source % 64) & 1 != 0 {
                let target = page &+ index
                unsafe record[Int(target / 64)] |= 1 &<< (target % 64)
            }
            index &+= 1
        }
    }

    /// The same by set bits: words of zeros are skipped.
    @inline(never)
    static func scan(
        _ log: UnsafePointer<UInt64>, from bit: UInt64, into record: UnsafeMutablePointer<UInt64>, at page: UInt64,
        _ count: UInt64
    ) {
        let end = bit &+ count
        var index = bit / 64
        while index &* 64 < end {
            var bits = unsafe log[Int(index)]
            if index == bit / 64 { bits &= ~0 &<< (bit % 64) }
            if end &- index &* 64 < 64 { bits &= (1 &<< (end % 64)) &- 1 }
            while bits != 0 {
                let source = index &* 64 &+ UInt64(truncatingIfNeeded: bits.trailingZeroBitCount)
                let target = source &- bit &+ page
                unsafe record[Int(target / 64)] |= 1 &<< (target % 64)
                bits &= bits &- 1
            }
            index &+= 1
        }
    }

    /// Reads two words, writes one: the floor.
    @inline(never)
    static func or(_ log: UnsafePointer<UInt64>, into record: UnsafeMutablePointer<UInt64>, _ count: Int) {
        for index in 0..<count { unsafe record[index] |= log[index] }
    }

    /// Makes the log of a guest; the same each time.
    static func fill(_ log: UnsafeMutableBufferPointer<UInt64>, _ density: BitmapBenchmark.Density) {
        var random = Generator(state: 2026)
        switch density {
        case .half:
            for index in log.indices { unsafe log[index] = random.next() }
        case .hundredth:
            let bits = UInt64(log.count) * 64
            for _ in 0..<bits / 100 {
                let bit = random.next() % bits
                unsafe log[Int(bit / 64)] |= 1 << (bit % 64)
            }
        case .empty: break
        }
    }

    /// - Returns: the first word that differs, and the bits that are set.
    static func compare(
        _ one: UnsafeBufferPointer<UInt64>, _ other: UnsafeBufferPointer<UInt64>
    ) -> (differs: Int?, bits: UInt64) {
        var bits: UInt64 = 0
        for index in 0..<min(one.count, other.count) {
            let word = unsafe one[index]
            if unsafe word != other[index] { return (index, bits) }
            bits &+= UInt64(truncatingIfNeeded: word.nonzeroBitCount)
        }
        return (one.count == other.count ? nil : min(one.count, other.count), bits)
    }

    /// SplitMix64.
    private struct Generator {
        var state: UInt64
        mutating func next() -> UInt64 {
            state &+= 0x9e37_79b9_7f4a_7c15
            var word = state
            word = (word ^ (word &>> 30)) &* 0xbf58_476d_1ce4_e5b9
            word = (word ^ (word &>> 27)) &* 0x94d0_49bb_1331_11eb
            return word ^ (word &>> 31)
        }
    }
}
