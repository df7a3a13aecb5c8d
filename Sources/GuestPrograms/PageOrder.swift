/// The order in which one vCPU walks its share of the working set; `Guests/walk.inc` is the other side.
///
/// A pass counts an index from 0 to 2^bits - 1, where 2^bits is at least the share. A random pass maps the index to a position by
/// a bijection on `bits` bits (xor with a key, odd multipliers, shifts by half the width), which can be undone: so from a page
/// alone follows at which index it is touched. Positions behind the share are passed over.
struct PageOrder: Equatable, Sendable {
    private static let mix1: UInt64 = 0xD134_2543_DE82_EF95
    private static let mix2: UInt64 = 0xAF25_1AF3_B0F0_25B5
    private static let keyFactor: UInt64 = 0x9E37_79B9_7F4A_7C15

    /// Width of an index.
    let bits: UInt64
    let isRandom: Bool
    let mask: UInt64
    private let half: UInt64
    private let key: UInt64
    private let inverse1: UInt64
    private let inverse2: UInt64

    /// The order of one pass; `positions` is the share, at least 1.
    init(positions: UInt64, isRandom: Bool, pass: UInt64, cpu: UInt64, seed: UInt64) {
        bits = Self.bits(positions: positions)
        mask = 1 << bits - 1
        half = max(1, (bits + 1) / 2)
        self.isRandom = isRandom
        key = (pass &+ cpu << 20 &+ seed) &* Self.keyFactor
        inverse1 = Self.inverse(of: Self.mix1)
        inverse2 = Self.inverse(of: Self.mix2)
    }

    static func bits(positions: UInt64) -> UInt64 {
        UInt64(64 - (positions - 1).leadingZeroBitCount)
    }

    /// The inverse of an odd number modulo 2^64, by Newton's iteration: each step doubles the correct bits.
    private static func inverse(of odd: UInt64) -> UInt64 {
        var result = odd
        for _ in 0..<5 {
            result = result &* (2 &- odd &* result)
        }
        return result
    }

    /// The position touched at an index; it may lie behind the share.
    func position(at index: UInt64) -> UInt64 {
        guard isRandom else { return index }
        var word = (index ^ key) &* Self.mix1 & mask
        word ^= word >> half
        word = (word &+ key >> 29) &* Self.mix2 & mask
        return word ^ word >> half
    }

    /// The index at which a position is touched.
    @inline(__always)
    func index(of position: UInt64) -> UInt64 {
        guard isRandom else { return position }
        // The shifts undo themselves, because `half` is at least half the width.
        var word = position ^ position >> half
        word = (word &* inverse2 &- key >> 29) & mask
        word ^= word >> half
        return (word &* inverse1 ^ key) & mask
    }
}
