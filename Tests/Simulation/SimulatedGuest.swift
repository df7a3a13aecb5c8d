import Migration
import MigrationStream
import TestSupport

/// A guest of a few pages, each with one number as its content (zero: a zero page), and the dirty log over them. While it
/// runs it writes random pages; what it wrote is worked out when somebody looks.
struct SimulatedGuest {
    private(set) var pages: [UInt64]
    private(set) var runs = false
    /// The device state: counts the starts, so a stale one shows.
    var deviceState: UInt64 = 0
    private var dirtyLog: [Bool]
    private var generator: SeededRandom
    private let writeInterval: UInt64
    private var lastWrite: UInt64 = 0
    private var written: UInt64 = 1
    /// Its work is done then: from there on it writes rarely, so every migration can converge.
    private static let workEnds = 300 * millisecond

    init(pages count: Int, writeInterval: UInt64, seed: UInt64) {
        pages = (0..<UInt64(count)).map { $0 % 3 == 0 ? 0 : $0 << 32 }
        dirtyLog = [Bool](repeating: false, count: count)
        generator = SeededRandom(seed: seed)
        self.writeInterval = writeInterval
    }

    /// An empty guest at a destination.
    init(emptyPages count: Int) {
        pages = [UInt64](repeating: 0, count: count)
        dirtyLog = [Bool](repeating: false, count: count)
        generator = SeededRandom(seed: 0)
        writeInterval = millisecond
    }

    mutating func advance(to now: UInt64) {
        guard runs else { return }
        while true {
            let interval = lastWrite > Self.workEnds ? 100 * millisecond : writeInterval
            guard lastWrite + interval <= now else { return }
            lastWrite += interval
            let page = Int.random(in: 0..<pages.count, using: &generator)
            written += 1
            pages[page] = written % 7 == 0 ? 0 : written
            dirtyLog[page] = true
        }
    }

    mutating func run(at now: UInt64) {
        runs = true
        lastWrite = now
    }

    mutating func stop(at now: UInt64) {
        advance(to: now)
        runs = false
    }

    /// Moves the dirty log into `pending`.
    mutating func collect(into pending: inout [Bool], at now: UInt64) {
        advance(to: now)
        for page in pages.indices where dirtyLog[page] {
            pending[page] = true
            dirtyLog[page] = false
        }
    }

    mutating func forgetDirty(_ page: Int) { dirtyLog[page] = false }

    mutating func place(_ value: UInt64, at page: Int) { pages[page] = value }
}

/// Where a page lies: blocks are filled one after the other.
struct SimulatedMemoryMap {
    let blocks: [RAMBlockDescription]
    let firstPages: [Int]
    let pageCount: Int

    init(pages: Int, blocks count: Int) {
        var blocks: [RAMBlockDescription] = []
        var firstPages: [Int] = []
        var first = 0
        for index in 0..<count {
            let size = index == count - 1 ? pages - first : pages / count
            blocks.append(RAMBlockDescription(name: index == 0 ? "ram" : "ram\(index)", length: UInt64(size) * 4096))
            firstPages.append(first)
            first += size
        }
        self.blocks = blocks
        self.firstPages = firstPages
        pageCount = pages
    }

    func location(of page: Int) -> (block: Int, offset: UInt64) {
        let block = firstPages.lastIndex { $0 <= page } ?? 0
        return (block, UInt64(page - firstPages[block]) * 4096)
    }

    func page(block: Int, offset: UInt64) -> Int { firstPages[block] + Int(offset / 4096) }

    /// A page's bytes: its number at both ends.
    static func contents(_ value: UInt64) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: 4096)
        for index in 0..<8 {
            let byte = UInt8(truncatingIfNeeded: value >> (8 * UInt64(index)))
            bytes[index] = byte
            bytes[4088 + index] = byte
        }
        return bytes
    }

    /// The number in a page's bytes, or nil when both ends differ.
    static func value(_ bytes: ArraySlice<UInt8>) -> UInt64? {
        var values: [UInt64] = [0, 0]
        for (end, start) in [bytes.startIndex, bytes.startIndex + 4088].enumerated() {
            for index in (0..<8).reversed() { values[end] = values[end] << 8 | UInt64(bytes[start + index]) }
        }
        return values[0] == values[1] ? values[0] : nil
    }
}
