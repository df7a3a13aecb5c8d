/// Bytes that arrived and are not decoded yet, in one piece: filled at the end, consumed at the front.
///
/// It grows only by what is put into it, so its owner bounds it by how much it reads ahead.
public struct ReceiveBuffer: Sendable {
    private var storage: [UInt8] = []
    private var head = 0
    private var tail = 0

    /// - Parameter capacity: bytes that fit before the storage has to grow.
    public init(capacity: Int = 0) {
        storage = [UInt8](repeating: 0, count: capacity)
    }

    /// Bytes waiting.
    public var count: Int { tail - head }
    public var isEmpty: Bool { head == tail }

    /// The bytes waiting.
    public var bytes: RawSpan {
        @_lifetime(borrow self)
        get {
            // SAFETY: `UInt8` has no padding, so every byte of the span is initialised.
            unsafe storage.span.bytes.extracting(head..<tail)
        }
    }

    /// Forgets the first `count` bytes. `count` must not exceed ``count``.
    @inlinable
    public mutating func consume(_ count: Int) {
        consumeChecked(count)
    }

    @usableFromInline
    mutating func consumeChecked(_ count: Int) {
        precondition(count >= 0 && count <= tail - head, "ReceiveBuffer: consumed more than there is")
        head += count
        if head == tail {
            head = 0
            tail = 0
        }
    }

    /// Copies the first bytes to `destination` and consumes them.
    ///
    /// - Returns: how many: the smaller of both sizes.
    public mutating func move(to destination: UnsafeMutableRawBufferPointer) -> Int {
        let moved = min(destination.count, count)
        // SAFETY: `moved` bytes exist at both ends, and the pointers are used inside the closure only.
        unsafe storage.withUnsafeBytes { source in
            unsafe destination.copyMemory(from: UnsafeRawBufferPointer(rebasing: source[head..<(head + moved)]))
        }
        consumeChecked(moved)
        return moved
    }

    /// Makes room for at least `minimum` bytes and lets `body` (a read from a socket) fill it.
    ///
    /// - Parameter body: gets the free room and returns how many bytes it put at its start.
    /// - Returns: what `body` returned.
    public mutating func fill<Failure: Error>(
        atLeast minimum: Int, _ body: (UnsafeMutableRawBufferPointer) throws(Failure) -> Int
    ) throws(Failure) -> Int {
        makeRoom(minimum)
        let (start, end) = (tail, storage.count)
        var result: Result<Int, Failure> = .success(0)
        // SAFETY: the slice lies inside the storage, and `body` is told not to keep it.
        unsafe storage.withUnsafeMutableBytes { all in
            let room = unsafe UnsafeMutableRawBufferPointer(rebasing: all[start..<end])
            do throws(Failure) { result = .success(try unsafe body(room)) } catch { result = .failure(error) }
        }
        let filled = try result.get()
        precondition(filled >= 0 && filled <= end - start, "ReceiveBuffer: filled more than the room")
        tail += filled
        return filled
    }

    public mutating func append(_ bytes: some Collection<UInt8>) {
        makeRoom(bytes.count)
        storage.replaceSubrange(tail..<(tail + bytes.count), with: bytes)
        tail += bytes.count
    }

    private mutating func makeRoom(_ minimum: Int) {
        guard storage.count - tail < minimum else { return }
        if head > 0 {
            storage.replaceSubrange(0..<count, with: Array(storage[head..<tail]))
            tail -= head
            head = 0
        }
        let missing = minimum - (storage.count - tail)
        if missing > 0 {
            storage.append(contentsOf: repeatElement(0, count: max(missing, storage.count)))
        }
    }

    subscript(index: Int) -> UInt8 { storage[head + index] }
    func be16(_ index: Int) -> UInt16 { storage.be16(head + index) }
    func be32(_ index: Int) -> UInt32 { storage.be32(head + index) }
    func be64(_ index: Int) -> UInt64 { storage.be64(head + index) }

    func copy(_ range: Range<Int>) -> [UInt8] { Array(storage[(head + range.lowerBound)..<(head + range.upperBound)]) }

    /// The text of that range, or nil when it is not UTF-8. A peer's words end up before an operator: what would steer a terminal is
    /// replaced.
    func text(_ range: Range<Int>) -> String? {
        let bytes = storage[(head + range.lowerBound)..<(head + range.upperBound)]
        guard let text = String(validating: bytes, as: UTF8.self) else { return nil }
        func steers(_ scalar: Unicode.Scalar) -> Bool { scalar.properties.generalCategory == .control }
        guard text.unicodeScalars.contains(where: steers) else { return text }
        var clean = String.UnicodeScalarView()
        clean.append(contentsOf: text.unicodeScalars.map { steers($0) ? "\u{fffd}" : $0 })
        return String(clean)
    }

    func holds(_ name: [UInt8], at index: Int) -> Bool {
        for offset in name.indices where storage[head + index + offset] != name[offset] { return false }
        return true
    }
}

extension Array<UInt8> {
    func be16(_ index: Int) -> UInt16 { load(index) }
    func be32(_ index: Int) -> UInt32 { load(index) }
    func be64(_ index: Int) -> UInt64 { load(index) }

    @inline(__always)
    private func load<Value: FixedWidthInteger & BitwiseCopyable>(_ index: Int) -> Value {
        // SAFETY: every bit pattern is a valid integer, and the span checks the bounds.
        unsafe Value(bigEndian: span.bytes.unsafeLoadUnaligned(fromByteOffset: index, as: Value.self))
    }
}
