public import Host
import MigrationStream

/// The digest of a page: 64 bits over its 4 KiB, its block and its place, under the key of one migration.
///
/// It finds what broke on the way (memory, network cards, software), not what an attacker forged: that is what TLS is for.
///
/// Eight lanes of 64 bits. Each word is mixed with a word of the key that belongs to its place in the page, its halves are multiplied, and
/// the product and the word itself are added to the lane: a word that changes always changes its lane's sum of words, and words that change
/// places meet other words of the key. Lanes are folded by a bijection that scatters every bit, and so is the place mixed in: of a digest
/// and a place the hash of the contents can be found again, which tells pages that changed places from pages that were damaged.
public struct PageHasher: Sendable {
    public static let pageBytes = 4096
    private static let words = pageBytes / 8
    private static let laneKeys = words
    private static let placeKey = words + 8

    /// A word for each of a page's, eight for the lanes, two for the place.
    private let key: Mapping
    private let zeroHash: UInt64

    /// - Parameters: the key: 128 bits that no other migration has.
    public init(high: UInt64, low: UInt64) throws(SystemError) {
        key = try Mapping(anonymousByteCount: 2 * Self.pageBytes)
        var state = high
        for index in 0..<Self.placeKey + 2 {
            state &+= 0x9E37_79B9_7F4A_7C15
            if index == Self.words / 2 { state ^= Self.scatter(low) }
            key.store(Self.scatter(state ^ low), at: index * 8)
        }
        let zeroes = try Mapping(anonymousByteCount: Self.pageBytes)
        zeroHash = Self.hash(zeroes, at: 0, key)
    }

    init(_ migration: MigrationIdentifier) throws(SystemError) {
        try self.init(high: migration.high, low: migration.low)
    }

    /// The hash of 4096 bytes, wherever they belong.
    public func hash(_ memory: Mapping, at offset: Int) -> UInt64 { Self.hash(memory, at: offset, key) }

    /// The digest of contents with that hash as a page of a block. Never 0, which stands for a page that was not sent.
    public func digest(hash: UInt64, block: Int, page: UInt64) -> UInt64 {
        let digest = Self.scatter(hash ^ place(block, page))
        return digest == 0 ? 1 : digest
    }

    /// The digest of a page that is as `memory` has it.
    public func digest(_ memory: Mapping, at offset: Int, block: Int, page: UInt64) -> UInt64 {
        digest(hash: hash(memory, at: offset), block: block, page: page)
    }

    /// The digest of a page of zeros.
    public func zeroDigest(block: Int, page: UInt64) -> UInt64 { digest(hash: zeroHash, block: block, page: page) }

    /// The hash of the contents from which a digest was made.
    public func hash(behind digest: UInt64, block: Int, page: UInt64) -> UInt64 {
        Self.gather(digest) ^ place(block, page)
    }

    func isZero(hash: UInt64) -> Bool { hash == zeroHash }

    private func place(_ block: Int, _ page: UInt64) -> UInt64 {
        let (first, second) = (
            key.load(at: Self.placeKey * 8, as: UInt64.self), key.load(at: Self.placeKey * 8 + 8, as: UInt64.self)
        )
        return Self.scatter(page &+ first) &+ Self.scatter(UInt64(block) ^ second)
    }

    // MARK: The loop

    private static func hash(_ memory: Mapping, at offset: Int, _ key: Mapping) -> UInt64 {
        unsafe memory.withBytes(at: offset, count: pageBytes) { page in
            unsafe key.withBytes(at: 0, count: 2 * pageBytes) { key in
                // SAFETY: `withBytes` checked that a page of bytes is there, and two of the key.
                unsafe sum(page.baseAddress!, key.baseAddress!)
            }
        }
    }

    @inline(__always)
    private static func sum(_ page: UnsafeRawPointer, _ key: UnsafeRawPointer) -> UInt64 {
        let low = SIMD8<UInt64>(repeating: 0xffff_ffff)
        let half = SIMD8<UInt64>(repeating: 32)
        var lanes = SIMD8<UInt64>(repeating: 0)
        var sums = SIMD8<UInt64>(repeating: 0)
        var offset = 0
        while offset < pageBytes {
            // SAFETY: inside both; guest memory may be written meanwhile, and any value is a value.
            let words = unsafe page.loadUnaligned(fromByteOffset: offset, as: SIMD8<UInt64>.self)
            let mixed = words ^ (unsafe key.loadUnaligned(fromByteOffset: offset, as: SIMD8<UInt64>.self))
            let lower = mixed & low
            let upper = mixed &>> half
            let product = lower &* upper
            lanes = lanes &+ product
            sums = sums &+ words
            offset &+= 64
        }
        // SAFETY: the lanes' words stand behind those of the page.
        let laneKey = unsafe key.loadUnaligned(fromByteOffset: laneKeys * 8, as: SIMD8<UInt64>.self)
        var result: UInt64 = 0
        for lane in 0..<8 {
            let products = scatter(lanes[lane] ^ laneKey[lane])
            result = scatter(((result &* 0x9FB2_1C65_1E98_DF25) ^ products) &+ sums[lane])
        }
        return result
    }

    /// A bijection after which every bit depends on every bit (the finaliser of splitmix64, Stafford's variant 13).
    private static func scatter(_ value: UInt64) -> UInt64 {
        var value = value
        value = (value ^ (value &>> 30)) &* 0xBF58_476D_1CE4_E5B9
        value = (value ^ (value &>> 27)) &* 0x94D0_49BB_1331_11EB
        return value ^ (value &>> 31)
    }

    /// The way back from `scatter`.
    private static func gather(_ value: UInt64) -> UInt64 {
        var value = value ^ (value &>> 31) ^ (value &>> 62)
        value = value &* 0x3196_42B2_D24D_8EC3
        value = value ^ (value &>> 27) ^ (value &>> 54)
        value = value &* 0x96DE_1B17_3F11_9089
        return value ^ (value &>> 30) ^ (value &>> 60)
    }
}
