/// What a guest writes into a page, as functions of the page's number; `Guests/ring3.inc` is the other side.
///
/// Word 0 is the stamp: its high half names the page, its low half counts the passes that touched it. Words 1 to
/// `words - 1` are noise, the others zero.
enum PageContents {
    private static let stampFactor: UInt32 = 0x9E37_79B1
    private static let noiseFactor: UInt64 = 0x9E37_79B9_7F4A_7C15

    /// The high half of the page's stamp; unique up to 16 TiB of RAM.
    @inline(__always)
    static func tag(page: UInt64) -> UInt32 {
        UInt32(truncatingIfNeeded: page) &* stampFactor
    }

    @inline(__always)
    static func stamp(page: UInt64, count: UInt32) -> UInt64 {
        UInt64(tag(page: page)) << 32 | UInt64(count)
    }

    /// What noise of the page starts from: never zero.
    @inline(__always)
    static func noiseSeed(page: UInt64, seed: UInt64) -> UInt64 {
        page &* noiseFactor &+ seed | 1
    }

    /// xorshift64: the noise word behind `word`.
    @inline(__always)
    static func nextNoise(_ word: UInt64) -> UInt64 {
        var word = word
        word ^= word << 13
        word ^= word >> 7
        word ^= word << 17
        return word
    }
}
