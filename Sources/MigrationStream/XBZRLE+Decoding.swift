extension XBZRLE {
    /// What is wrong with an encoding that came from outside.
    public enum Damage: Error, Hashable, Sendable {
        /// It ends inside a pair.
        case truncated
        /// A number has more than 14 bits.
        case number
        /// A run is empty where it may not be.
        case emptyRun
        /// It reaches beyond the page.
        case outside

        var sentence: String {
            switch self {
            case .truncated: "it ends inside a run"
            case .number: "a run's length has more than 14 bits"
            case .emptyRun: "it has an empty run"
            case .outside: "it reaches beyond the page's end"
            }
        }
    }

    /// Changes the bytes of `page` that an encoding names. Nothing is changed by one that is refused.
    ///
    /// - Throws: ``Damage``.
    @unsafe public static func apply(
        _ encoding: RawSpan, to page: UnsafeMutableRawBufferPointer
    )
        throws(Damage)
    {
        try walk(encoding, pageBytes: page.count) { _, _, _ in }
        try walk(encoding, pageBytes: page.count) { source, target, count in
            // SAFETY: the walk compares each run with the sizes of both.
            unsafe encoding.withUnsafeBytes { bytes in
                unsafe (page.baseAddress! + target).copyMemory(from: bytes.baseAddress! + source, byteCount: count)
            }
        }
    }

    /// Tells `run` of every run of new bytes: where it is in the encoding, where in the page, and how long.
    private static func walk(
        _ encoding: RawSpan, pageBytes: Int, _ run: (Int, Int, Int) -> Void
    )
        throws(Damage)
    {
        var index = 0
        var position = 0
        while index < encoding.byteCount {
            let isFirst = index == 0
            let kept = try number(encoding, &index)
            guard isFirst || kept > 0 else { throw .emptyRun }
            position += kept
            guard position <= pageBytes else { throw .outside }
            let count = try number(encoding, &index)
            guard count > 0 else { throw .emptyRun }
            guard count <= pageBytes - position else { throw .outside }
            guard count <= encoding.byteCount - index else { throw .truncated }
            run(index, position, count)
            index += count
            position += count
        }
    }

    private static func number(_ encoding: RawSpan, _ index: inout Int) throws(Damage) -> Int {
        guard index < encoding.byteCount else { throw .truncated }
        let low = Int(byte(encoding, index))
        index += 1
        guard low >= 0x80 else { return low }
        guard index < encoding.byteCount else { throw .truncated }
        let high = Int(byte(encoding, index))
        index += 1
        guard high < 0x80 else { throw .number }
        return low & 0x7f | high << 7
    }

    private static func byte(_ encoding: RawSpan, _ index: Int) -> UInt8 {
        // SAFETY: every byte is a valid UInt8, and the span checks the bounds.
        unsafe encoding.unsafeLoad(fromByteOffset: index, as: UInt8.self)
    }
}
