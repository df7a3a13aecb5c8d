import CLinux

/// The hash of a page's contents under a key, the same by every loop. Migration's `PageHasher` says what it is good for.
///
/// Two sums over the words in eight lanes, word i in lane i mod 8: of the words, and of the products of the halves of each word xor the
/// key's word of the same place. Then each lane becomes one number, and these are added. Arithmetic is modulo 2^64. Memory may be
/// written meanwhile: then it is the hash of some mixture.
public enum PageHash: Int, Sendable, CaseIterable, Comparable {
    /// The loop that every processor has, and those with wider vectors, in bits.
    case portable = 128
    case avx2 = 256
    case avx512 = 512

    public static let pageBytes = 4096
    /// A word for each of the page's, and eight for the lanes.
    public static let keyBytes = pageBytes + 64

    /// The best loop that this machine has; it has those below it, too.
    public static let best = PageHash(rawValue: Int(gw_vector_bits())) ?? .portable

    public static func < (left: PageHash, right: PageHash) -> Bool { left.rawValue < right.rawValue }

    /// Of the page at `offset`. - Precondition: this machine has the loop.
    @inline(__always)
    public func callAsFunction(_ memory: Mapping, at offset: Int, key: Mapping) -> UInt64 {
        memory.check(offset, Self.pageBytes)
        key.check(0, Self.keyBytes)
        // SAFETY: a page of bytes and a key are there, which was checked.
        return switch self {
        case .portable: unsafe Self.portably(memory.base + offset, key.base)
        case .avx2: unsafe gw_page_hash_256(memory.base + offset, key.base, 0)
        case .avx512: unsafe gw_page_hash_512(memory.base + offset, key.base, 0)
        }
    }

    /// Of pages that stand one behind the other from `offset` on, as many as `hashes` has places. - Precondition: this machine has the loop.
    /// - Parameter ahead: of these pages, what stands so many bytes further is brought near to the processor.
    public func callAsFunction(
        _ memory: Mapping, at offset: Int, key: Mapping, ahead: Int, into hashes: inout [UInt64]
    ) {
        let count = hashes.count
        memory.check(offset, count * Self.pageBytes)
        key.check(0, Self.keyBytes)
        unsafe hashes.withUnsafeMutableBufferPointer { hashes in
            guard let hashes = hashes.baseAddress else { return }
            // SAFETY: so many pages, a key and so many places are there.
            switch self {
            case .portable:
                for index in 0..<count {
                    unsafe hashes[index] = unsafe Self.portably(memory.base + offset + index * Self.pageBytes, key.base)
                }
            case .avx2: unsafe gw_page_hashes_256(memory.base + offset, key.base, hashes, count, ahead)
            case .avx512: unsafe gw_page_hashes_512(memory.base + offset, key.base, hashes, count, ahead)
            }
        }
    }

    private static func portably(_ page: UnsafeRawPointer, _ key: UnsafeRawPointer) -> UInt64 {
        let low = SIMD8<UInt64>(repeating: 0xffff_ffff)
        let half = SIMD8<UInt64>(repeating: 32)
        var products = SIMD8<UInt64>(repeating: 0)
        var sums = SIMD8<UInt64>(repeating: 0)
        var offset = 0
        while offset < pageBytes {
            // SAFETY: inside both; any value is a value.
            let words = unsafe page.loadUnaligned(fromByteOffset: offset, as: SIMD8<UInt64>.self)
            let mixed = words ^ (unsafe key.loadUnaligned(fromByteOffset: offset, as: SIMD8<UInt64>.self))
            products = products &+ (mixed & low) &* (mixed &>> half)
            sums = sums &+ words
            offset &+= 64
        }
        // SAFETY: the words of the lanes stand behind those of the page.
        products ^= unsafe key.loadUnaligned(fromByteOffset: pageBytes, as: SIMD8<UInt64>.self)
        var hash: UInt64 = 0
        for lane in 0..<8 { hash &+= scatter(products[lane] &* 0x9FB2_1C65_1E98_DF25 &+ sums[lane]) }
        return hash
    }

    /// A bijection after which every bit depends on every bit (the finaliser of splitmix64, Stafford's variant 13).
    @inline(__always)
    public static func scatter(_ value: UInt64) -> UInt64 {
        var value = value
        value = (value ^ (value &>> 30)) &* 0xBF58_476D_1CE4_E5B9
        value = (value ^ (value &>> 27)) &* 0x94D0_49BB_1331_11EB
        return value ^ (value &>> 31)
    }

    /// The way back from `scatter`.
    public static func gather(_ value: UInt64) -> UInt64 {
        var value = value ^ (value &>> 31) ^ (value &>> 62)
        value = value &* 0x3196_42B2_D24D_8EC3
        value = value ^ (value &>> 27) ^ (value &>> 54)
        value = value &* 0x96DE_1B17_3F11_9089
        return value ^ (value &>> 30) ^ (value &>> 60)
    }
}
