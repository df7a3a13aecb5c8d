//! The GuestMemory room: what guest memory is, and what is known about who wrote to it.
//!
//! A `RAMBlock` is host memory with a name. A `MemoryTree` of regions says what lies where, and a `FlatView`, made of it, where the guest
//! sees which part of which block. `GuestMemory` holds all of them, changes the layout by a `MemoryTransaction` (`+Commit`) and reads and
//! writes by guest-physical address, for the monitor here, for a vCPU in `+Access`. A `DirtyBitmap` is one client's record of written
//! pages of one block.

import Host
import Synchronization

/// The memory of one virtual machine.
public final class GuestMemory: Sendable {
    /// All RAM there is; which parts of it the guest sees, and where, may change.
    public let blocks: [RAMBlock]
    /// Pages which this process wrote, not the guest: the accelerator does not see them.
    public let hostWrites = HostWriteLog()
    /// The regions and what the guest sees of them, always of the same commit.
    let layout: Mutex<Layout>
    /// Held over a commit: the next one waits.
    let listeners = Mutex<[WeakListener]>([])
    let commit = CommitInProgress()

    struct Layout: Sendable {
        var tree: MemoryTree
        var view: FlatView
    }

    struct WeakListener {
        weak var listener: (any MemoryListener)?
    }

    /// What the guest sees now: a value that does not change under its reader.
    public var view: FlatView { layout.withLock { $0.view } }

    /// The regions that make up the view.
    public var tree: MemoryTree { layout.withLock { $0.tree } }

    /// Tree and view, both of the same commit, for people.
    public var mapLines: [String] { layout.withLock { $0.tree.lines + [""] + $0.view.lines } }

    /// Memory of which the guest sees nothing yet.
    public init(blocks: [RAMBlock]) {
        self.blocks = blocks
        layout = Mutex(Layout(tree: MemoryTree(), view: FlatView([])))
    }

    /// Memory with one region for every range of a view.
    public init(blocks: [RAMBlock], view: FlatView) {
        self.blocks = blocks
        var tree = MemoryTree()
        for section in view.sections { tree.show(section) }
        layout = Mutex(Layout(tree: tree, view: view))
    }

    /// All RAM, in bytes.
    public var byteCount: UInt64 { blocks.reduce(0) { $0 + $1.byteCount } }

    /// An access outside RAM.
    public struct AccessError: Error, Equatable, Sendable, CustomStringConvertible {
        public let address: GuestPhysicalAddress
        public let byteCount: UInt64

        public init(address: GuestPhysicalAddress, byteCount: UInt64) {
            self.address = address
            self.byteCount = byteCount
        }

        public var description: String {
            "guest memory: no RAM at \(address) (\(byteCount) bytes from there asked for)"
        }
    }

    /// Visits the pieces of a guest-physical range in order, as (block, offset in it, bytes); all of them as one view shows them.
    public func forEachPiece<E: Error>(
        at address: GuestPhysicalAddress, byteCount: UInt64, _ body: (RAMBlock, Int, Int) throws(E) -> Void,
        orThrow failure: (AccessError) -> E
    ) throws(E) {
        let view = view
        var position = address
        var left = byteCount
        while left > 0 {
            guard let section = view.section(at: position), case .memory(let block, let offset) = section.content else {
                throw failure(AccessError(address: position, byteCount: left))
            }
            let skip = position.value - section.guestAddress.value
            let count = min(left, section.byteCount - skip)
            try body(block, Int(offset.value + skip), Int(count))
            left -= count
            guard left > 0 else { return }
            position = GuestPhysicalAddress(position.value &+ count)
        }
    }

    /// Whether what was read so far is what is there: no awaited page was given up (``RAMBlock/forsake()``).
    public var isKept: Bool { blocks.allSatisfy { (try? $0.checkIsKept()) != nil } }

    /// Bytes of guest memory; never-touched pages read as zeroes and stay untouched. - Throws: `AccessError` if a part of the range is not RAM.
    public func read(at address: GuestPhysicalAddress, count: Int) throws(AccessError) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.reserveCapacity(count)
        try forEachPiece(
            at: address, byteCount: UInt64(count),
            { (block, offset, count) throws(AccessError) in bytes += block.read(at: offset, count: count) },
            orThrow: { $0 })
        return bytes
    }

    /// Writes bytes to guest memory, that which is read-only for the guest too; nothing is written if a part of the range is not RAM.
    /// - Throws: `AccessError`.
    public func write(_ bytes: [UInt8], at address: GuestPhysicalAddress) throws(AccessError) {
        var pieces: [(block: RAMBlock, offset: Int, count: Int)] = []
        try forEachPiece(
            at: address, byteCount: UInt64(bytes.count),
            { (block, offset, count) throws(AccessError) in pieces.append((block, offset, count)) }, orThrow: { $0 })
        var rest = bytes[...]
        for piece in pieces {
            piece.block.mapping.write(rest.prefix(piece.count), at: piece.offset)
            hostWrites.record(piece.block, offset: piece.offset, count: piece.count)
            rest = rest.dropFirst(piece.count)
        }
    }

    /// Makes a range zero. Holes stay holes. - Throws: `AccessError` if a part of the range is not RAM.
    public func zero(at address: GuestPhysicalAddress, byteCount: UInt64) throws(AccessError) {
        try forEachPiece(
            at: address, byteCount: byteCount,
            { (block, offset, count) throws(AccessError) in
                let end = offset + count
                let pages = RAMOffset(UInt64(offset)).page..<RAMOffset(UInt64(end) + GuestPage.byteCount - 1).page
                // Where holes cannot be told apart, all is zeroed: that only costs memory.
                for run in (try? block.allocatedRuns(in: pages)) ?? [pages] {
                    let start = max(offset, Int(run.lowerBound.offset.value))
                    block.mapping.zero(at: start, count: min(end, Int(run.upperBound.offset.value)) - start)
                }
                hostWrites.record(block, offset: offset, count: count)
            }, orThrow: { $0 })
    }
}
