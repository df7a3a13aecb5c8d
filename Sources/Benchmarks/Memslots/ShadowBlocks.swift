import Accelerator
import GuestMemory
import Host
import KVM

/// A copy of all RAM blocks that is kept up by dirty tracking alone, as the destination of a migration is.
final class ShadowBlocks {
    private let blocks: [RAMBlock]
    private let copies: [RAMBlock]
    private let tracker: any DirtyTracker
    private let records: [any DirtyPages]
    /// Pages that were copied, as often as they were.
    private(set) var copiedPages: UInt64 = 0
    /// What is watched afresh at a time, as migration has it.
    private static let chunkPages: UInt64 = 1 << 14

    /// Starts tracking and copies all that is there.
    init(of machine: SpinMachine) throws {
        blocks = machine.memory.blocks
        tracker = machine.accelerator.dirtyTracker(for: .migration)
        records = try tracker.makePages()
        copies = try blocks.map { try RAMBlock(name: "copy-\($0.name)", byteCount: $0.byteCount) }
        try tracker.start()
        try round()
    }

    /// Copies what was written since the last time.
    func round() throws {
        try tracker.collect(into: records)
        for index in blocks.indices { try copy(index) }
    }

    private func copy(_ index: Int) throws {
        let record = records[index]
        var first = PageIndex(0)
        while let run = record.nextRun(from: first, limit: 1) {
            // One chunk is watched afresh and then read.
            let start = PageIndex(run.lowerBound.value / Self.chunkPages * Self.chunkPages)
            let end = PageIndex(min(start.value + Self.chunkPages, record.pageCount))
            try tracker.willSend(start..<end, of: index, marked: record)
            var position = run.lowerBound
            while position < end, let pages = record.nextRun(from: position, limit: 256), pages.lowerBound < end {
                let part = pages.clamped(to: start..<end)
                record.clear(part)
                let offset = Int(part.lowerBound.offset.value)
                let bytes = blocks[index].read(at: offset, count: part.count * Int(GuestPage.byteCount))
                copies[index].mapping.write(bytes, at: offset)
                copiedPages += UInt64(part.count)
                position = part.upperBound
            }
            first = end
        }
    }

    /// The pages that differ from memory. Call when nobody writes any more, after a last round.
    func differences() throws -> [String] {
        var found: [String] = []
        for (block, copy) in zip(blocks, copies) {
            for run in try block.allocatedRuns(in: block.pages) {
                for page in run {
                    let offset = Int(page.offset.value)
                    if block.read(at: offset, count: 4096) != copy.mapping.read(at: offset, count: 4096) {
                        found.append("\(page) of \(block.name)")
                    }
                }
            }
        }
        return found
    }

    func stop() { tracker.stop() }
}
