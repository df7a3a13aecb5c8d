import GuestMemory
import Host
import MigrationStream

/// What a destination says it has, as it comes: a bit for each page. A block's bits count once its bitmap came whole.
///
/// It takes a bit of memory for each page of RAM, and no more whatever is said: each block once, in the size that it has.
final class ReceivedBitmaps: Sendable {
    struct Refusal: Error, CustomStringConvertible {
        let description: String
    }

    private struct State {
        var pages: [AtomicPages?]
        /// Of the block that is coming: the next word, and the bytes of it that are here.
        var word = 0
        var bits: UInt64 = 0
        var bitCount: UInt64 = 0
        var block: Int?
    }
    private let blocks: [RAMBlockDescription]
    private let state: Monitor<State>

    init(_ blocks: [RAMBlockDescription]) {
        self.blocks = blocks
        state = Monitor(State(pages: blocks.map { _ in nil }))
    }

    /// The bitmap of that block follows. - Throws: `Refusal` if it came before, `SystemError` without memory for it.
    func begin(_ name: String) throws {
        guard let block = blocks.firstIndex(where: { $0.name == name }) else {
            throw Refusal(description: "the destination says what it has of an unknown RAM block '\(name)'")
        }
        try state.withLock { state in
            guard state.pages[block] == nil else {
                throw Refusal(description: "the destination says twice what it has of RAM block '\(name)'")
            }
            state.pages[block] = try AtomicPages(pageCount: blocks[block].length / UInt64(Wire.pageSize))
            (state.block, state.word, state.bits, state.bitCount) = (block, 0, 0, 0)
        }
    }

    /// The next bytes of it: the pages of a byte begin with the lowest bit.
    func take(_ bytes: RawSpan) {
        state.withLock { state in
            guard let block = state.block, let pages = state.pages[block] else { return }
            for index in bytes.byteOffsets {
                // SAFETY: every byte of a span is initialised, and the index is one of it.
                let byte = unsafe bytes.unsafeLoad(fromByteOffset: index, as: UInt8.self)
                state.bits |= UInt64(byte) << state.bitCount
                state.bitCount += 8
                guard state.bitCount == 64 else { continue }
                if state.word < pages.wordCount { pages.insert(bits: state.bits, intoWord: state.word) }
                (state.word, state.bits, state.bitCount) = (state.word + 1, 0, 0)
            }
        }
    }

    /// What the destination has, block by block; `nil`: not all has come.
    var received: [AtomicPages]? {
        state.withLock { state in
            let pages = state.pages.compactMap(\.self)
            return pages.count == blocks.count ? pages : nil
        }
    }
}
