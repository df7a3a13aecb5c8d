import GuestMemory
import Host

/// Where reports of written pages go: one record per block for each client that is to hear of them.
struct DirtyReport {
    private let records: [[any DirtyPages]]

    init(_ records: [[any DirtyPages]]) { self.records = records }

    var isEmpty: Bool { records.isEmpty }

    func and(_ others: DirtyReport) -> DirtyReport { DirtyReport(records + others.records) }

    func set(_ pages: Range<PageIndex>, of block: Int) {
        for record in records { record[block].set(pages) }
    }

    /// Pages of a slot, through the pieces that show them.
    func set(_ slotPages: Range<UInt64>, of slot: Slot) {
        for piece in slot.pieces {
            if let pages = piece.blockPages(of: slotPages) { set(pages, of: piece.block) }
        }
    }

    /// Bit i of `words` is page i of the slot.
    @unsafe func merge(_ words: UnsafeBufferPointer<UInt64>, of slot: Slot) {
        for piece in slot.pieces {
            for record in records {
                unsafe record[piece.block].merge(
                    words, fromBit: piece.slotPages.lowerBound, pageCount: UInt64(piece.slotPages.count),
                    at: piece.firstPage)
            }
        }
    }

    /// What `staged` marks, one record per block.
    func add(_ staged: [any DirtyPages]) {
        for (block, pages) in staged.enumerated() where !pages.isEmpty {
            for record in records { record[block].formUnion(pages) }
        }
    }
}

extension Slot.Piece {
    /// The pages of the block behind a part of the slot; `nil` where the piece shows none of it.
    func blockPages(of slotPages: Range<UInt64>) -> Range<PageIndex>? {
        let part = slotPages.clamped(to: self.slotPages)
        guard !part.isEmpty else { return nil }
        let first = firstPage.advanced(by: Int(part.lowerBound - self.slotPages.lowerBound))
        return first..<first.advanced(by: part.count)
    }

    /// The pages of the slot that show a part of the block.
    func slotPages(of pages: Range<PageIndex>) -> Range<UInt64>? {
        let part = pages.clamped(to: blockPages)
        guard !part.isEmpty else { return nil }
        let first = slotPages.lowerBound + UInt64(firstPage.distance(to: part.lowerBound))
        return first..<first + UInt64(part.count)
    }
}

extension Slot {
    /// The slot's pages, counted from its first.
    var allPages: Range<UInt64> { 0..<pageCount }

    /// The runs of allocated pages inside a part of the slot, in slot pages, in order.
    func allocatedRuns(in slotPages: Range<UInt64>, of memory: GuestMemory) throws(SystemError) -> [Range<UInt64>] {
        var runs: [Range<UInt64>] = []
        for piece in pieces {
            guard let pages = piece.blockPages(of: slotPages) else { continue }
            for run in try memory.blocks[piece.block].allocatedRuns(in: pages) {
                if let range = piece.slotPages(of: run) { runs.append(range) }
            }
        }
        return runs
    }

    func isTouched(in memory: GuestMemory) throws(SystemError) -> Bool {
        for piece in pieces where try memory.blocks[piece.block].isAllocated(in: piece.blockPages) { return true }
        return false
    }
}
