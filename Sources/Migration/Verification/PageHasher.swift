public import Host
import MigrationStream

/// The digest of a page: 64 bits over its 4 KiB, its block and its place, under the key of one migration.
///
/// It finds what broke on the way (memory, network cards, software), not what an attacker forged: that is what TLS is for.
///
/// Eight lanes of 64 bits. Each word is mixed with a word of the key that belongs to its place in the page, its halves are multiplied, and
/// the product and the word itself are added to the lane: a word that changes always changes its lane's sum of words, and words that change
/// places meet other words of the key. Each lane goes through a bijection that scatters every bit, none waiting for another, and so is the place
/// mixed in: of a digest and a place the hash of the contents can be found again, which tells pages that changed places from pages that
/// were damaged.
public struct PageHasher: Sendable {
    public static let pageBytes = PageHash.pageBytes
    private static let words = pageBytes / 8
    private static let placeKey = words + 8
    /// Guest memory that is read in order is fetched so far ahead: a third faster than the processor does by itself.
    private static let aheadBytes = 2 * pageBytes

    /// A word for each of a page's, eight for the lanes, two for the place.
    private let key: Mapping
    private let placeKeys: (page: UInt64, block: UInt64)
    private let zeroHash: UInt64

    /// - Parameters: the key: 128 bits that no other migration has.
    public init(high: UInt64, low: UInt64) throws(SystemError) {
        key = try Mapping(anonymousByteCount: 2 * Self.pageBytes)
        var state = high
        for index in 0..<Self.placeKey + 2 {
            state &+= 0x9E37_79B9_7F4A_7C15
            if index == Self.words / 2 { state ^= PageHash.scatter(low) }
            key.store(PageHash.scatter(state ^ low), at: index * 8)
        }
        placeKeys = (
            key.load(at: Self.placeKey * 8, as: UInt64.self), key.load(at: Self.placeKey * 8 + 8, as: UInt64.self)
        )
        let zeroes = try Mapping(anonymousByteCount: Self.pageBytes)
        zeroHash = PageHash.best(zeroes, at: 0, key: key)
    }

    init(_ migration: MigrationIdentifier) throws(SystemError) {
        try self.init(high: migration.high, low: migration.low)
    }

    /// The hash of 4096 bytes, wherever they belong.
    public func hash(_ memory: Mapping, at offset: Int) -> UInt64 { PageHash.best(memory, at: offset, key: key) }

    /// The digest of contents with that hash as a page of a block. Never 0, which stands for a page that was not sent.
    public func digest(hash: UInt64, block: Int, page: UInt64) -> UInt64 {
        Self.digest(hash: hash, place: place(block, page))
    }

    @inline(__always)
    private static func digest(hash: UInt64, place: UInt64) -> UInt64 {
        let digest = PageHash.scatter(hash ^ place)
        return digest == 0 ? 1 : digest
    }

    /// The digest of a page that is as `memory` has it.
    public func digest(_ memory: Mapping, at offset: Int, block: Int, page: UInt64) -> UInt64 {
        digest(hash: hash(memory, at: offset), block: block, page: page)
    }

    /// The digests of pages that stand one behind the other in `memory`, from `offset` on.
    /// - Parameter findsZeroes: a page of zeros has 0 instead of a digest.
    func digests(
        _ pages: Range<UInt64>, of block: Int, _ memory: Mapping, at offset: Int, findsZeroes: Bool = false
    ) -> [UInt64] {
        var digests = [UInt64](repeating: 0, count: pages.count)
        PageHash.best(memory, at: offset, key: key, ahead: Self.aheadBytes, into: &digests)
        let blockPlace = place(of: block)
        for index in digests.indices {
            if findsZeroes, digests[index] == zeroHash,
                memory.isZero(at: offset + index * Self.pageBytes, count: Self.pageBytes)
            {
                digests[index] = 0
            } else {
                let place = place(of: pages.lowerBound + UInt64(index)) &+ blockPlace
                digests[index] = Self.digest(hash: digests[index], place: place)
            }
        }
        return digests
    }

    /// The digest of a page of zeros.
    public func zeroDigest(block: Int, page: UInt64) -> UInt64 { digest(hash: zeroHash, block: block, page: page) }

    /// The hash of the contents from which a digest was made.
    public func hash(behind digest: UInt64, block: Int, page: UInt64) -> UInt64 {
        PageHash.gather(digest) ^ place(block, page)
    }

    func isZero(hash: UInt64) -> Bool { hash == zeroHash }

    private func place(_ block: Int, _ page: UInt64) -> UInt64 {
        place(of: page) &+ place(of: block)
    }

    @inline(__always)
    private func place(of page: UInt64) -> UInt64 { PageHash.scatter(page &+ placeKeys.page) }

    private func place(of block: Int) -> UInt64 { PageHash.scatter(UInt64(block) ^ placeKeys.block) }
}
