import CLinux
import Glibc

/// A range of this process's address space, mapped once and unmapped when the last reference goes.
///
/// All access is by offset and bounds-checked; offsets and counts are in bytes.
@safe public final class Mapping: Sendable {
    public let byteCount: Int
    /// SAFETY: immutable, valid for `byteCount` bytes as long as this object lives.
    nonisolated(unsafe) let base: UnsafeMutableRawPointer

    /// Maps `byteCount` bytes of a file, shared, from `offset` on. Nothing is touched.
    /// - Parameter reserves: memory for all of it is set aside at once, or it fails (hugetlb: else a touch may end the process).
    public init(
        _ file: Descriptor, offset: UInt64 = 0, byteCount: Int, readOnly: Bool = false, reserves: Bool = false
    ) throws(SystemError) {
        let protection = readOnly ? PROT_READ : PROT_READ | PROT_WRITE
        // SAFETY: a fresh range chosen by the kernel; checked for MAP_FAILED before use.
        let address = unsafe mmap(
            nil, byteCount, protection, MAP_SHARED | (reserves ? 0 : MAP_NORESERVE), file.number,
            Int(truncatingIfNeeded: offset))
        guard let address = unsafe address, unsafe address != MAP_FAILED else { throw .last("mmap", file.name) }
        unsafe base = address
        self.byteCount = byteCount
    }

    /// Maps anonymous, zero-filled memory which costs nothing until it is touched.
    public init(anonymousByteCount byteCount: Int) throws(SystemError) {
        // SAFETY: as above.
        let address = unsafe mmap(
            nil, byteCount, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        guard let address = unsafe address, unsafe address != MAP_FAILED else {
            throw .last("mmap", "\(byteCount) bytes of anonymous memory")
        }
        unsafe base = address
        self.byteCount = byteCount
    }

    deinit { _ = unsafe munmap(base, byteCount) }

    @inline(__always)
    func check(_ offset: Int, _ count: Int) {
        precondition(
            offset >= 0 && count >= 0 && offset <= byteCount && count <= byteCount - offset, "inside the mapping")
    }

    /// The address in this process of a byte, for the kernel (memory slots, userfaultfd). Not to be dereferenced.
    public func hostAddress(at offset: Int) -> UInt {
        check(offset, 0)
        return unsafe UInt(bitPattern: base) + UInt(offset)
    }

    // MARK: Single values

    /// A little-endian integer, as x86 stores it.
    @inline(__always)
    public func load<T: FixedWidthInteger & BitwiseCopyable>(at offset: Int, as type: T.Type) -> T {
        check(offset, MemoryLayout<T>.size)
        // SAFETY: checked against the bounds; loadUnaligned has no alignment rule.
        return unsafe T(littleEndian: base.loadUnaligned(fromByteOffset: offset, as: type))
    }

    @inline(__always)
    public func store<T: FixedWidthInteger & BitwiseCopyable>(_ value: T, at offset: Int) {
        check(offset, MemoryLayout<T>.size)
        unsafe base.storeBytes(of: value.littleEndian, toByteOffset: offset, as: T.self)
    }

    /// Words one behind the other, each as the wire has it.
    public func storeBigEndian(_ words: ArraySlice<UInt64>, at offset: Int) {
        check(offset, words.count * 8)
        for (index, word) in words.enumerated() {
            // SAFETY: inside, which was checked for all.
            unsafe base.storeBytes(of: word.bigEndian, toByteOffset: offset &+ index &* 8, as: UInt64.self)
        }
    }

    // MARK: Ranges

    public func read(at offset: Int, count: Int) -> [UInt8] {
        check(offset, count)
        return unsafe Array(UnsafeRawBufferPointer(start: base + offset, count: count))
    }

    public func write(_ bytes: ArraySlice<UInt8>, at offset: Int) {
        check(offset, bytes.count)
        // SAFETY: both ranges are checked and cannot overlap: the slice is Swift's own memory.
        unsafe bytes.withUnsafeBytes { source in
            if let start = source.baseAddress {
                unsafe (base + offset).copyMemory(from: start, byteCount: source.count)
            }
        }
    }

    public func write(_ bytes: [UInt8], at offset: Int) { write(bytes[...], at: offset) }

    /// Copies from another mapping, or another part of this one, which may change meanwhile.
    public func copy(from source: Mapping, at start: Int, count: Int, to offset: Int = 0) {
        source.check(start, count)
        check(offset, count)
        // SAFETY: both ranges are checked; memmove lets them overlap.
        unsafe memmove(base + offset, source.base + start, count)
    }

    public func zero(at offset: Int, count: Int) {
        check(offset, count)
        unsafe memset(base + offset, 0, count)
    }

    /// The bytes of a range, for a loop that must be fast. The pointer must not leave the closure.
    @unsafe @inline(__always)
    public func withBytes<R, E: Error>(
        at offset: Int, count: Int, _ body: (UnsafeRawBufferPointer) throws(E) -> R
    )
        throws(E) -> R
    {
        check(offset, count)
        return unsafe try body(UnsafeRawBufferPointer(start: base + offset, count: count))
    }

    @unsafe @inline(__always)
    public func withMutableBytes<R, E: Error>(
        at offset: Int, count: Int, _ body: (UnsafeMutableRawBufferPointer) throws(E) -> R
    ) throws(E) -> R {
        check(offset, count)
        return unsafe try body(UnsafeMutableRawBufferPointer(start: base + offset, count: count))
    }

    /// Whether the page at `offset` is zero, where page after page is asked about: what a later call looks at first is fetched meanwhile.
    /// - Parameter next: where that call will look; inside the mapping or not.
    public func isZeroPage(at offset: Int, fetching next: Int) -> Bool {
        // SAFETY: inside the mapping, and to fetch fails nowhere.
        if next >= 0, next < byteCount { unsafe gw_fetch(base + next) }
        check(offset, 4096)
        // Most pages tell by their first words, which are one line of the processor's caches.
        var any: UInt64 = 0
        // SAFETY: inside the page.
        for word in 0..<8 { any |= unsafe base.loadUnaligned(fromByteOffset: offset &+ word &* 8, as: UInt64.self) }
        return any == 0 && isZero(at: offset, count: 4096)
    }

    /// Whether every byte is zero. Reads the memory: on a memory file, look for holes before.
    public func isZero(at offset: Int, count: Int) -> Bool {
        check(offset, count)
        var position = offset
        let end = offset + count
        while position < end, position % 8 != 0 {
            if load(at: position, as: UInt8.self) != 0 { return false }
            position += 1
        }
        // SAFETY: bounds checked above; 8-byte steps from an aligned start (the base is page-aligned).
        unsafe withBytes(at: position, count: (end - position) & ~7) { bytes in
            guard let start = bytes.baseAddress else { return }
            let words = unsafe start.assumingMemoryBound(to: UInt64.self)
            let count = bytes.count / 8
            var index = 0
            while index + 32 <= count {
                var any: UInt64 = 0
                for step in 0..<32 { unsafe any |= words[index &+ step] }
                if any != 0 { return }
                index &+= 32
                position &+= 256
            }
            while index < count {
                if unsafe words[index] != 0 { return }
                index &+= 1
                position &+= 8
            }
        }
        if end - position >= 8 { return false }
        while position < end {
            if load(at: position, as: UInt8.self) != 0 { return false }
            position += 1
        }
        return true
    }

    // MARK: What is in memory

    /// How many bytes from `offset` on are resident, in whole pages: the search ends at the first page which is not.
    ///
    /// Source: mincore(2). A page that is not resident is a hole of the file, or swapped out.
    public func residentPrefix(at offset: Int, count: Int) throws(SystemError) -> Int {
        check(offset, count)
        // The kernel looks at all pages it is asked about: ask about few at first, or short prefixes would cost like long ones.
        var marks = [UInt8](repeating: 0, count: 32)
        var done = 0
        while done < count {
            let piece = min(count - done, marks.count * 4096)
            // SAFETY: one byte per page of the piece; the piece lies inside the mapping.
            let status = unsafe marks.withUnsafeMutableBufferPointer {
                unsafe mincore(base + offset + done, piece, $0.baseAddress!)
            }
            guard status == 0 else { throw .last("mincore") }
            let pages = (piece + 4095) / 4096
            if let gap = marks[..<pages].firstIndex(where: { $0 & 1 == 0 }) { return done + gap * 4096 }
            done += piece
            if marks.count < 16384 { marks = [UInt8](repeating: 0, count: marks.count * 8) }
        }
        return count
    }

    // MARK: Advice to the kernel

    public enum Advice: Sendable {
        /// Back with huge pages on first touch where the host allows it.
        case hugePages
        /// Never: neither on first touch nor later.
        case noHugePages
        /// Copy into huge pages now what is there.
        case collapse
        /// Keep out of core dumps.
        case dontDump
        /// Allocate now, for writing.
        case populate
        /// Give back what is behind private memory: it reads as zeroes, or as its file, from then on.
        case forget
        /// The same for shared memory: what is behind it goes for everybody.
        case forgetShared
    }

    /// madvise(2) over whole pages. - Throws: `SystemError`.
    public func advise(_ advice: Advice, at offset: Int = 0, count: Int? = nil) throws(SystemError) {
        let length = count ?? byteCount - offset
        check(offset, length)
        let value: CInt
        switch advice {
        case .hugePages: value = CInt(MADV_HUGEPAGE)
        case .noHugePages: value = CInt(MADV_NOHUGEPAGE)
        case .collapse: value = CInt(GW_MADV_COLLAPSE)
        case .dontDump: value = CInt(MADV_DONTDUMP)
        case .populate: value = CInt(MADV_POPULATE_WRITE)
        case .forget: value = CInt(MADV_DONTNEED)
        case .forgetShared: value = CInt(MADV_REMOVE)
        }
        guard unsafe madvise(base + offset, length, value) == 0 else { throw .last("madvise \(advice)") }
    }
}
