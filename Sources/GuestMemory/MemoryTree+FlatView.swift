// What the guest sees of a tree. Regions are painted from the one in front to the one behind; each fills what is still free.

extension MemoryTree {
    /// The address space as the guest sees it. - Throws: `MemoryError` where memory would be shown in parts of pages.
    public func flatView() throws(MemoryError) -> FlatView {
        var painter = Painter(nodes: nodes)
        let limit = Int64(MemoryRegion.addressLimit)
        try painter.show(.system, from: 0, inside: 0..<limit, isReadOnly: false)
        return FlatView(sections: painter.sections)
    }

    /// Parts of the address space; a few hundred are usual. Aliases of aliases can multiply them without end.
    static let sectionLimit = 1 << 16

    /// Subregions from front to back.
    func childrenByRank(of node: Node) -> [MemoryRegionID] {
        node.children.enumerated().sorted { a, b in
            let (first, second) = (nodes[a.element]?.priority ?? 0, nodes[b.element]?.priority ?? 0)
            return first != second ? first > second : a.offset > b.offset
        }.map(\.element)
    }

    private struct Painter {
        let tree: MemoryTree
        /// In order, without overlap.
        private(set) var sections: [FlatSection] = []
        private var visits = 0

        init(nodes: [MemoryRegionID: Node]) { tree = MemoryTree(nodes: nodes) }

        /// Shows a region whose first byte would be at `base` (which may lie before the address space), clipped to `window`.
        mutating func show(
            _ id: MemoryRegionID, from base: Int64, inside window: Range<Int64>, isReadOnly: Bool
        ) throws(MemoryError) {
            guard let node = tree.nodes[id], node.region.isEnabled else { return }
            let visible = (base..<base + Int64(node.region.byteCount)).clamped(to: window)
            guard !visible.isEmpty else { return }
            visits += 1
            guard visits <= MemoryTree.sectionLimit else {
                throw MemoryError("\(id): the layout has more than \(MemoryTree.sectionLimit) parts")
            }
            let isReadOnly = isReadOnly || node.region.isReadOnly
            let skipped = UInt64(visible.lowerBound - base)
            switch node.region.content {
            case .container:
                for child in tree.childrenByRank(of: node) {
                    let start = base + Int64(tree.nodes[child]?.address ?? 0)
                    try show(child, from: start, inside: visible, isReadOnly: isReadOnly)
                }
            case .alias(let target, let offset):
                try show(target, from: base - Int64(offset), inside: visible, isReadOnly: isReadOnly)
            case .memory(let block, let offset):
                let page = Int64(GuestPage.byteCount)
                guard visible.lowerBound % page == 0, visible.upperBound % page == 0, skipped % GuestPage.byteCount == 0
                else {
                    throw MemoryError(
                        "\(id): it would be seen at \(GuestPhysicalAddress(UInt64(visible.lowerBound))), "
                            + "\(visible.count) bytes; memory is seen in whole pages of \(page) bytes")
                }
                fill(visible, FlatSection.Content.memory(block, RAMOffset(offset.value + skipped)), isReadOnly, id)
            case .device(let device):
                fill(visible, FlatSection.Content.device(device, offset: skipped), isReadOnly, id)
            }
        }

        private mutating func fill(
            _ visible: Range<Int64>, _ content: FlatSection.Content, _ isReadOnly: Bool, _ id: MemoryRegionID
        ) {
            let whole = FlatSection(
                guestAddress: GuestPhysicalAddress(UInt64(visible.lowerBound)), byteCount: UInt64(visible.count),
                content: content, isReadOnly: isReadOnly, region: id)
            var index = sections.firstIndex(endingAfter: whole.guestAddress)
            var position = whole.guestAddress
            while position < whole.end {
                let next = index < sections.count ? min(sections[index].guestAddress, whole.end) : whole.end
                if position < next {
                    sections.insert(whole.part(from: position, to: next), at: index)
                    index += 1
                }
                guard index < sections.count else { return }
                position = sections[index].end
                index += 1
            }
        }
    }
}
