import GuestMemory
import Host

/// One cell of the bitmap benchmark: a log, the records it is merged into, and what was measured.
struct BitmapTrial {
    /// Where log and block begin in the unaligned merge.
    private static let firstBit: UInt64 = 13
    private static let firstPage: UInt64 = 50
    private static let passes = 3

    private let pageCount: UInt64
    private let wordCount: Int
    /// One word more than the guest's pages fill: the unaligned merge begins late in the first.
    private let log: Mapping
    private let plain: Mapping
    private let bitwise: Mapping
    private let aligned: DirtyBitmap
    private let unaligned: DirtyBitmap
    /// By alignment: aligned first.
    private var samples: [[(name: String, samples: [Double])]] = [[], []]

    /// A cell for the aligned and one for the unaligned merge.
    func cells(size: String, density: String) -> [BenchmarkCell] {
        zip(Self.alignments, samples).map {
            BenchmarkCell([("size", size), ("dirty", density), ("alignment", $0)], $1)
        }
    }

    static let alignments = ["aligned", "unaligned"]

    init(gibibytes: UInt64, density: BitmapBenchmark.Density) throws {
        pageCount = gibibytes << 18
        wordCount = Int(pageCount / 64)
        log = try Mapping(anonymousByteCount: (wordCount + 1) * 8)
        plain = try Mapping(anonymousByteCount: wordCount * 8)
        bitwise = try Mapping(anonymousByteCount: (wordCount + 2) * 8)
        aligned = try DirtyBitmap(pageCount: pageCount)
        unaligned = try DirtyBitmap(pageCount: pageCount + Self.firstPage)
        // The log of a clean guest stands in memory, too: KVM writes it.
        try log.advise(.populate)
        unsafe log.withMutableBytes(at: 0, count: log.byteCount) {
            unsafe BitmapLoops.fill($0.assumingMemoryBound(to: UInt64.self), density)
        }
        // The loops that promises are about run on memory that is there.
        try plain.advise(.populate)
        try bitwise.advise(.populate)
        note(0, "fresh-ms", time(1) { merge(into: aligned) })
        note(1, "fresh-ms", time(1) { mergeUnaligned(into: unaligned) })
    }

    /// Measures all loops, in turn, a few times each. The best time of each counts: what others do on this machine is not measured.
    mutating func run() {
        let repeats = max(1, (1 << 20) / wordCount)
        let sample = min(pageCount, 16 << 18)
        let scale = Double(pageCount) / Double(sample)
        var best = [Double](repeating: .infinity, count: 7)
        for _ in 0..<Self.passes {
            let times = [
                time(repeats) { merge(into: aligned) },
                time(repeats) { plainOr() },
                time(repeats) { mergeUnaligned(into: unaligned) },
                scale * time(1) { byBits(sample, from: 0, at: 0) },
                scale * time(1) { byBits(sample, from: Self.firstBit, at: Self.firstPage) },
                scale * time(1) { scan(sample, from: 0, at: 0) },
                scale * time(1) { scan(sample, from: Self.firstBit, at: Self.firstPage) },
            ]
            for index in best.indices { best[index] = min(best[index], times[index]) }
        }
        note(0, merge: best[0], bits: best[3], scan: best[5], bandwidth: best[1], of: aligned)
        note(1, merge: best[2], bits: best[4], scan: best[6], bandwidth: best[1], of: unaligned)
    }

    private mutating func note(
        _ alignment: Int, merge: Double, bits: Double, scan: Double, bandwidth: Double, of record: DirtyBitmap
    ) {
        note(alignment, "ms", merge)
        note(alignment, "gib-per-s", Double(pageCount >> 18) / merge * 1000)
        note(alignment, "bitwise-ms", bits)
        note(alignment, "scan-ms", scan)
        note(alignment, "bandwidth-ms", bandwidth)
        note(alignment, "vs-bitwise", bits / merge)
        note(alignment, "vs-scan", scan / merge)
        note(alignment, "vs-bandwidth", bandwidth / merge)
        note(alignment, "count-ms", time(1) { _ = record.count })
    }

    /// Holds both records against what a plain loop makes of the log.
    /// - Throws: `BitmapBenchmark.WrongResult`.
    func verify() throws {
        try compare(aligned, with: plain, wordCount, "aligned")
        bitwise.zero(at: 0, count: bitwise.byteCount)
        scan(pageCount, from: Self.firstBit, at: Self.firstPage)
        try compare(unaligned, with: bitwise, wordCount + 1, "unaligned")
    }

    private func compare(_ record: DirtyBitmap, with expected: Mapping, _ count: Int, _ kind: String) throws {
        let (differs, bits) = unsafe record.withWords(of: record.allPages) { words in
            unsafe withWords(of: expected, count) { expected in
                unsafe BitmapLoops.compare(words, UnsafeBufferPointer(start: expected, count: count))
            }
        }
        if let differs {
            throw BitmapBenchmark.WrongResult(
                description: "bitmap: the \(kind) merge of \(pageCount) pages is wrong from page \(differs * 64) on")
        }
        guard record.count == bits else {
            throw BitmapBenchmark.WrongResult(
                description: "bitmap: the record of the \(kind) merge counts \(record.count) pages and has \(bits)")
        }
    }

    // MARK: What is measured

    private func merge(into record: DirtyBitmap) {
        unsafe withLog { unsafe record.merge(UnsafeBufferPointer(start: $0, count: wordCount), at: PageIndex(0)) }
    }

    private func plainOr() {
        unsafe withWords(of: plain, wordCount) { to in unsafe withLog { unsafe BitmapLoops.or($0, into: to, wordCount) }
        }
    }

    private func mergeUnaligned(into record: DirtyBitmap) {
        unsafe withLog {
            unsafe record.merge(
                UnsafeBufferPointer(start: $0, count: wordCount + 1), fromBit: Self.firstBit, pageCount: pageCount,
                at: PageIndex(Self.firstPage))
        }
    }

    private func byBits(_ count: UInt64, from bit: UInt64, at page: UInt64) {
        unsafe withWords(of: bitwise, wordCount + 2) { to in
            unsafe withLog { unsafe BitmapLoops.byBits($0, from: bit, into: to, at: page, count) }
        }
    }

    private func scan(_ count: UInt64, from bit: UInt64, at page: UInt64) {
        unsafe withWords(of: bitwise, wordCount + 2) { to in
            unsafe withLog { unsafe BitmapLoops.scan($0, from: bit, into: to, at: page, count) }
        }
    }

    private func withLog<R>(_ body: (UnsafePointer<UInt64>) -> R) -> R {
        unsafe log.withBytes(at: 0, count: log.byteCount) {
            unsafe body($0.baseAddress!.assumingMemoryBound(to: UInt64.self))
        }
    }

    private func withWords<R>(of mapping: Mapping, _ count: Int, _ body: (UnsafeMutablePointer<UInt64>) -> R) -> R {
        unsafe mapping.withMutableBytes(at: 0, count: count * 8) {
            unsafe body($0.baseAddress!.assumingMemoryBound(to: UInt64.self))
        }
    }

    /// Milliseconds of one call.
    private func time(_ repeats: Int, _ body: () -> Void) -> Double {
        let start = Clock.monotonicNanoseconds
        for _ in 0..<repeats { body() }
        return Double(Clock.monotonicNanoseconds - start) / 1e6 / Double(repeats)
    }

    private mutating func note(_ alignment: Int, _ name: String, _ value: Double) {
        if let index = samples[alignment].firstIndex(where: { $0.name == name }) {
            samples[alignment][index].samples.append(value)
        } else {
            samples[alignment].append((name, [value]))
        }
    }
}
