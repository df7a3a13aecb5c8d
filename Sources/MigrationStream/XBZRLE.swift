/// A page as its difference to what the destination has of it: QEMU's encoding XBZRLE.
///
/// The encoding is a sequence of pairs: how many bytes stay, how many bytes are new, and those bytes. Both numbers are ULEB128 of one or
/// two bytes. What stays at the end of the page is left out. A number of new bytes is never zero, a number of bytes that stay only in the
/// first pair.
public enum XBZRLE {
    /// The byte before the length of an encoding on the wire: the only one that is known.
    public static let recordKind: UInt8 = 1
    /// The longest encoding, in bytes: as long as the page.
    public static let longestEncoding = Wire.pageSize

    public enum Encoding: Hashable, Sendable {
        /// Both versions are equal: nothing is to be sent.
        case unchanged
        /// So many bytes were written.
        case bytes(Int)
        /// There was not enough room: the page is better sent whole.
        case tooLong
    }

    /// Encodes what must change in `old` to make it `new`, into the start of `room`.
    ///
    /// Both must hold a page, and `new` must not change meanwhile.
    @unsafe public static func encode(
        from old: UnsafeRawBufferPointer, to new: UnsafeRawBufferPointer, into room: UnsafeMutableRawBufferPointer
    ) -> Encoding {
        precondition(old.count == Wire.pageSize && new.count == Wire.pageSize, "XBZRLE: pages")
        var marks = Marks()
        // SAFETY: both buffers hold a page.
        guard unsafe marks.fill(old.baseAddress!, new.baseAddress!) else { return .unchanged }
        let limit = min(room.count, longestEncoding)
        var used = 0
        var position = 0
        var start = marks.nextSet(from: 0)
        while start < Wire.pageSize {
            // One or two equal bytes cost less as part of a run of new ones than as a pair of numbers.
            var end = marks.nextClear(from: start)
            var next = marks.nextSet(from: end)
            while next < Wire.pageSize, next - end <= 2 {
                end = marks.nextClear(from: next)
                next = marks.nextSet(from: end)
            }
            let count = end - start
            guard used + 4 + count <= limit || used + size(start - position) + size(count) + count <= limit else {
                return .tooLong
            }
            unsafe put(start - position, into: room, &used)
            unsafe put(count, into: room, &used)
            // SAFETY: `used + count` was compared with the room; the run lies inside the page.
            unsafe copy(new.baseAddress! + start, to: room.baseAddress! + used, count)
            used += count
            position = end
            start = next
        }
        return .bytes(used)
    }

    /// Most runs are a few bytes: calling memcpy for each would cost more than the walk.
    @unsafe @inline(__always)
    private static func copy(_ source: UnsafeRawPointer, to target: UnsafeMutableRawPointer, _ count: Int) {
        guard count <= 16 else { return unsafe target.copyMemory(from: source, byteCount: count) }
        for index in 0..<count {
            unsafe target.storeBytes(
                of: source.load(fromByteOffset: index, as: UInt8.self), toByteOffset: index, as: UInt8.self)
        }
    }

    private static func size(_ number: Int) -> Int { number < 0x80 ? 1 : 2 }

    @unsafe private static func put(_ number: Int, into room: UnsafeMutableRawBufferPointer, _ used: inout Int) {
        guard number >= 0x80 else {
            unsafe room[used] = UInt8(number)
            used += 1
            return
        }
        unsafe room[used] = UInt8(number & 0x7f | 0x80)
        unsafe room[used + 1] = UInt8(number >> 7)
        used += 2
    }
}

/// One bit for each byte of a page that differs.
private struct Marks {
    private var words = InlineArray<64, UInt64>(repeating: 0)

    /// - Returns: whether any byte differs.
    @unsafe mutating func fill(_ old: UnsafeRawPointer, _ new: UnsafeRawPointer) -> Bool {
        var differs = false
        for line in 0..<64 {
            let start = line &* 64
            var any: UInt64 = 0
            for word in 0..<8 { unsafe any |= Self.difference(old, new, start &+ word &* 8) }
            guard any != 0 else { continue }
            differs = true
            var mask: UInt64 = 0
            for word in 0..<8 {
                let difference = unsafe Self.difference(old, new, start &+ word &* 8)
                // The high bit of each byte that is not zero, then the eight of them side by side.
                let low = (difference & 0x7f7f_7f7f_7f7f_7f7f) &+ 0x7f7f_7f7f_7f7f_7f7f
                let high = (low | difference) & 0x8080_8080_8080_8080
                mask |= (((high >> 7) &* 0x0102_0408_1020_4080) >> 56) &<< UInt64(word &* 8)
            }
            words[line] = mask
        }
        return differs
    }

    @unsafe @inline(__always)
    private static func difference(_ old: UnsafeRawPointer, _ new: UnsafeRawPointer, _ offset: Int) -> UInt64 {
        // SAFETY: the caller's offsets lie inside a page. Byte 0 of memory is bit 0: the hosts are little-endian.
        unsafe old.loadUnaligned(fromByteOffset: offset, as: UInt64.self)
            ^ new.loadUnaligned(fromByteOffset: offset, as: UInt64.self)
    }

    /// The first differing byte from `position` on; the page's size if there is none.
    func nextSet(from position: Int) -> Int { next(from: position, inverted: 0) }

    func nextClear(from position: Int) -> Int { next(from: position, inverted: .max) }

    @inline(__always)
    private func next(from position: Int, inverted: UInt64) -> Int {
        guard position < Wire.pageSize else { return Wire.pageSize }
        var index = position >> 6
        var word = (words[index] ^ inverted) & (.max &<< UInt64(position))
        while word == 0 {
            index += 1
            guard index < 64 else { return Wire.pageSize }
            word = words[index] ^ inverted
        }
        return index << 6 + word.trailingZeroBitCount
    }
}
