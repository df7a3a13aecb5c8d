import Glibc

/// A list of memory ranges for one gathering write or scattering read, at most 1,024 as the kernel allows (IOV_MAX).
///
/// It keeps its mappings alive, and checks every range when it is appended.
@safe public struct IOVector {
    /// SAFETY: every entry points into a mapping held by `owners`, inside its bounds.
    private var entries: [iovec] = unsafe []
    private var owners: [Mapping] = []
    private var first = 0
    /// What is still to be transferred, in bytes.
    public private(set) var byteCount = 0

    public static let maximumEntries = 1024

    public init() { self.init(entries: Self.maximumEntries) }

    private init(entries count: Int) { unsafe entries.reserveCapacity(count) }

    public var entryCount: Int { unsafe entries.count - first }
    public var isFull: Bool { entryCount >= Self.maximumEntries }

    /// Adds a range, joined with the last one where they touch.
    public mutating func append(_ mapping: Mapping, offset: Int, count: Int) {
        guard count > 0 else { return }
        mapping.check(offset, count)
        let start = unsafe mapping.base + offset
        byteCount += count
        if let last = unsafe entries.last, unsafe entries.count > first, unsafe last.iov_base + last.iov_len == start,
            owners.last === mapping
        {
            unsafe entries[entries.count - 1].iov_len += count
            return
        }
        precondition(!isFull, "at most \(Self.maximumEntries) entries")
        unsafe entries.append(iovec(iov_base: start, iov_len: count))
        if owners.last !== mapping { owners.append(mapping) }
    }

    public mutating func removeAll() {
        unsafe entries.removeAll(keepingCapacity: true)
        owners.removeAll(keepingCapacity: true)
        first = 0
        byteCount = 0
    }

    /// Takes the first bytes out, to be transferred by themselves. - Returns: a vector of `count` bytes, or of all that is left.
    public mutating func removePrefix(_ count: Int) -> IOVector {
        var prefix = IOVector(entries: 0)
        prefix.owners = owners
        var left = min(count, byteCount)
        while left > 0 {
            let entry = unsafe entries[first]
            let length = unsafe min(entry.iov_len, left)
            unsafe prefix.entries.append(iovec(iov_base: entry.iov_base, iov_len: length))
            prefix.byteCount += length
            advance(by: length)
            left -= length
        }
        return prefix
    }

    /// Drops what a system call has transferred.
    mutating func advance(by count: Int) {
        byteCount -= count
        var left = count
        while left > 0 {
            let length = unsafe entries[first].iov_len
            if left < length {
                unsafe entries[first].iov_base += left
                unsafe entries[first].iov_len -= left
                return
            }
            left -= length
            first += 1
        }
    }

    /// The size of the first range in bytes; 0 if there is none.
    public var firstRangeByteCount: Int { unsafe byteCount > 0 ? entries[first].iov_len : 0 }

    /// Moves bytes from the front into `buffer`, as many as fit. - Returns: how many.
    @unsafe public mutating func gather(into buffer: UnsafeMutableRawBufferPointer) -> Int {
        var filled = 0
        while byteCount > 0, filled < buffer.count {
            // SAFETY: the entry is inside its mapping (see `entries`), and the copy ends where entry or buffer end.
            let entry = unsafe entries[first]
            let count = unsafe min(entry.iov_len, buffer.count - filled)
            unsafe memcpy(buffer.baseAddress! + filled, entry.iov_base, count)
            advance(by: count)
            filled += count
        }
        return filled
    }

    /// Hands the first range to `body` and drops from it as many bytes as that returns. - Returns: that number.
    ///
    /// SAFETY for the callers: the buffer is used during the call only, and no more is returned than it has.
    @unsafe public mutating func withFirstRange<E: Error>(
        _ body: (UnsafeMutableRawBufferPointer) throws(E) -> Int
    ) throws(E) -> Int {
        guard byteCount > 0 else { return 0 }
        let entry = unsafe entries[first]
        let count = try unsafe body(UnsafeMutableRawBufferPointer(start: entry.iov_base, count: entry.iov_len))
        unsafe precondition(count >= 0 && count <= entry.iov_len, "inside the range")
        advance(by: count)
        return count
    }

    /// SAFETY for the callers: the pointer is used for one system call.
    @unsafe mutating func withEntries<R>(_ body: (UnsafeMutablePointer<iovec>, CInt) -> R) -> R {
        unsafe entries.withUnsafeMutableBufferPointer { buffer in
            unsafe body(buffer.baseAddress! + first, CInt(min(buffer.count - first, Self.maximumEntries)))
        }
    }
}

extension Descriptor {
    /// One writev(2). - Returns: the bytes written; `nil` if it would block or a socket's send timeout passed.
    public func write(_ vector: inout IOVector) throws(SystemError) -> Int? {
        unsafe try transfer(&vector, operation: "write") { unsafe writev($0, $1, $2) }
    }

    /// One readv(2). - Returns: the bytes read; 0 at the end; `nil` if it would block or a receive timeout passed.
    public func read(_ vector: inout IOVector) throws(SystemError) -> Int? {
        unsafe try transfer(&vector, operation: "read") { unsafe readv($0, $1, $2) }
    }

    private func transfer(
        _ vector: inout IOVector, operation: String, _ call: (CInt, UnsafePointer<iovec>, CInt) -> Int
    ) throws(SystemError) -> Int? {
        guard vector.byteCount > 0 else { return 0 }
        while true {
            let count = unsafe vector.withEntries { unsafe call(number, $0, $1) }
            if count >= 0 {
                vector.advance(by: count)
                return count
            }
            if errno == EINTR { continue }
            if errno == EAGAIN { return nil }
            throw .last(operation, name)
        }
    }
}
