import Accelerator
import GuestMemory

/// A memory slot: a guest-physical range, and the pages of RAM blocks that stand behind it piece by piece.
struct Slot: Sendable, Equatable {
    /// Consecutive pages of a slot that are consecutive pages of a block.
    struct Piece: Sendable, Equatable {
        /// Pages of the slot, counted from its first.
        let slotPages: Range<UInt64>
        /// Index of the block in `GuestMemory.blocks`.
        let block: Int
        /// The page of the block that stands behind `slotPages.lowerBound`.
        let firstPage: PageIndex
        /// Guest writes are discarded, whatever the slot's flag says.
        var isReadOnly = false

        var blockPages: Range<PageIndex> { firstPage..<firstPage.advanced(by: slotPages.count) }
    }

    /// KVM's slot number.
    let number: UInt32
    let guestAddress: GuestPhysicalAddress
    let pageCount: UInt64
    let hostAddress: UInt
    /// Guest writes leave the guest instead (KVM_MEM_READONLY).
    var isReadOnly = false
    /// In order, without overlap. What no piece covers shows no memory.
    var pieces: [Piece]
    /// It shows a part of the `SlotWindows`, so that its pieces can change; otherwise it shows one piece of a block, for good.
    var isWindow = false

    var byteCount: UInt64 { pageCount << GuestPage.shift }

    /// Guest page numbers.
    var guestPages: Range<UInt64> {
        let first = guestAddress.value >> GuestPage.shift
        return first..<first + pageCount
    }

    /// Whether the kernel sees the same in both: a range of guest addresses and what is behind it in this process.
    func isPlaced(like other: Slot) -> Bool {
        number == other.number && guestAddress == other.guestAddress && pageCount == other.pageCount
            && hostAddress == other.hostAddress
    }
}

/// Is told of changes to slots, so that no dirty page is lost over them. Calls come one at a time, on the thread that commits.
protocol SlotObserver: AnyObject, Sendable {
    /// A slot is about to be made. - Returns: whether its log is on from the start.
    func willAdd(_ slot: Slot) -> Bool
    /// The kernel refused a slot that was to be made: it is not there, and nothing was written through it.
    func wasRefused(_ slot: Slot)
    /// Somebody is to hear of every written page, also where no log is on because nothing had been written.
    var isTracking: Bool { get }
    /// No vCPU can write through the pieces of `old` any more that `new` (the slot from now on; `nil`: it goes) does not have: the last
    /// chance to ask the kernel what was written through them. What is reported for a page that has a new piece counts for both.
    /// The table still holds `old`.
    func willChange(_ old: Slot, to new: Slot?) throws(AcceleratorError)
}

/// Consecutive guest pages that show consecutive pages of a block.
struct ShownPages: Sendable, Equatable {
    struct Content: Sendable, Equatable {
        let block: Int
        let firstPage: PageIndex
        let isReadOnly: Bool

        func advanced(by pages: UInt64) -> Content {
            Content(block: block, firstPage: PageIndex(firstPage.value + pages), isReadOnly: isReadOnly)
        }
    }

    /// Guest page numbers.
    let pages: Range<UInt64>
    let content: Content

    func clamped(to range: Range<UInt64>) -> ShownPages? {
        let part = pages.clamped(to: range)
        guard !part.isEmpty else { return nil }
        return ShownPages(pages: part, content: content.advanced(by: part.lowerBound - pages.lowerBound))
    }

    /// As the slots see it: neighbours that continue each other are one.
    static func joined(_ list: [ShownPages]) -> [ShownPages] {
        var result: [ShownPages] = []
        for item in list {
            if let last = result.last, last.pages.upperBound == item.pages.lowerBound,
                last.content.advanced(by: UInt64(last.pages.count)) == item.content
            {
                result[result.count - 1] = ShownPages(
                    pages: last.pages.lowerBound..<item.pages.upperBound, content: last.content)
            } else {
                result.append(item)
            }
        }
        return result
    }
}

extension Slot {
    /// What the slot shows, by guest page numbers.
    var shown: [ShownPages] {
        let first = guestPages.lowerBound
        return pieces.map {
            ShownPages(
                pages: first + $0.slotPages.lowerBound..<first + $0.slotPages.upperBound,
                content: .init(block: $0.block, firstPage: $0.firstPage, isReadOnly: $0.isReadOnly))
        }
    }

    /// The pieces by which a slot from guest page `first` on shows `shown`.
    static func pieces(_ shown: [ShownPages], from first: UInt64) -> [Piece] {
        shown.map {
            Piece(
                slotPages: $0.pages.lowerBound - first..<$0.pages.upperBound - first, block: $0.content.block,
                firstPage: $0.content.firstPage, isReadOnly: $0.content.isReadOnly)
        }
    }

    func with(pieces: [Piece]) -> Slot {
        var changed = self
        changed.pieces = pieces
        return changed
    }

    /// A part of a slot as a slot of its own.
    func part(_ pages: Range<UInt64>, number: UInt32, readOnly: Bool) -> Slot {
        let skipped = (pages.lowerBound - guestPages.lowerBound) << GuestPage.shift
        return Slot(
            number: number, guestAddress: guestAddress + skipped, pageCount: UInt64(pages.count),
            hostAddress: hostAddress + UInt(skipped), isReadOnly: readOnly,
            pieces: Self.pieces(shown.compactMap { $0.clamped(to: pages) }, from: pages.lowerBound), isWindow: isWindow)
    }
}
