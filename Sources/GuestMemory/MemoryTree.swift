/// All regions of a machine and where they lie in each other, as a value: a changed copy leaves the old tree as it was.
public struct MemoryTree: Sendable {
    struct Node: Sendable {
        var region: MemoryRegion
        /// `nil` for the root, and for regions that are seen through aliases alone.
        var parent: MemoryRegionID?
        /// From the parent's start.
        var address: UInt64 = 0
        var priority = 0
        /// In the order in which they were added.
        var children: [MemoryRegionID] = []
    }

    private(set) var nodes: [MemoryRegionID: Node]

    /// An address space that shows nothing.
    public init() {
        nodes = [.system: Node(region: .container(MemoryRegionID.system.name, byteCount: MemoryRegion.addressLimit))]
    }

    /// A region; `nil` if it is not in the tree.
    public func region(_ id: MemoryRegionID) -> MemoryRegion? { nodes[id]?.region }

    /// A part of a tree under construction.
    init(nodes: [MemoryRegionID: Node]) { self.nodes = nodes }

    /// A region of its own for a part of a view that was made without a tree.
    mutating func show(_ section: FlatSection) {
        let content: MemoryRegion.Content =
            switch section.content {
            case .memory(let block, let offset): .memory(block, offset)
            case .device(let device, _): .device(device)
            }
        var region = MemoryRegion(name: section.region.name, byteCount: section.byteCount, content: content)
        region.isReadOnly = section.isReadOnly
        nodes[section.region] = Node(region: region, parent: .system, address: section.guestAddress.value)
        nodes[.system]?.children.append(section.region)
    }

    // MARK: Changes

    /// Carries out a transaction. - Throws: naming the region; then the tree is half changed, and only fit to be thrown away.
    mutating func apply(_ transaction: MemoryTransaction) throws(MemoryError) {
        for change in transaction.changes { try apply(change) }
        try refuseCycles()
    }

    private mutating func apply(_ change: MemoryTransaction.Change) throws(MemoryError) {
        switch change {
        case .create(let id, let region):
            guard nodes[id] == nil else {
                throw MemoryError("\(id): it is in this machine's memory already; a transaction is committed once")
            }
            nodes[id] = Node(region: region)
            try checkSize(id)
        case .add(let id, let parent, let address, let priority): try add(id, to: parent, at: address, priority)
        case .remove(let id): try remove(id)
        case .move(let id, let address):
            try update(id) { $0.address = address }
            try checkSize(id)
        case .resize(let id, let byteCount):
            try update(id) { $0.region.byteCount = byteCount }
            try checkSize(id)
        case .enable(let id, let isEnabled): try update(id) { $0.region.isEnabled = isEnabled }
        case .setPriority(let id, let priority): try update(id) { $0.priority = priority }
        case .setReadOnly(let id, let isReadOnly): try update(id) { $0.region.isReadOnly = isReadOnly }
        case .setAlias(let id, let target, let offset):
            guard case .alias(let old, _) = try node(id).region.content else {
                throw MemoryError("\(id): it is no alias, so it cannot show another part")
            }
            _ = try node(target ?? old)
            try update(id) { $0.region.content = .alias(of: target ?? old, offset: offset) }
            try checkSize(id)
        }
    }

    private func node(_ id: MemoryRegionID) throws(MemoryError) -> Node {
        guard let node = nodes[id] else { throw MemoryError("\(id): it is not in this machine's memory") }
        return node
    }

    private mutating func update(_ id: MemoryRegionID, _ body: (inout Node) -> Void) throws(MemoryError) {
        guard id != .system else { throw MemoryError("\(id): it is the whole address space and stays as it is") }
        var node = try node(id)
        body(&node)
        nodes[id] = node
    }

    private mutating func add(
        _ id: MemoryRegionID, to parent: MemoryRegionID, at address: UInt64, _ priority: Int
    ) throws(MemoryError) {
        if let other = try node(id).parent { throw MemoryError("\(id): it lies in '\(other.name)' already") }
        guard case .container = try node(parent).region.content else {
            throw MemoryError("\(id): '\(parent.name)', where it was to be added, is no container")
        }
        try update(id) { node in
            node.parent = parent
            node.address = address
            node.priority = priority
        }
        nodes[parent]?.children.append(id)
        try checkSize(id)
    }

    private mutating func remove(_ id: MemoryRegionID) throws(MemoryError) {
        guard id != .system else { throw MemoryError("\(id): it is the whole address space and cannot be removed") }
        if let parent = try node(id).parent { nodes[parent]?.children.removeAll { $0 == id } }
        var gone: Set<MemoryRegionID> = []
        var waiting = [id]
        while let next = waiting.popLast() {
            gone.insert(next)
            waiting += nodes.removeValue(forKey: next)?.children ?? []
        }
        for (other, node) in nodes {
            if case .alias(let target, _) = node.region.content, gone.contains(target) {
                throw MemoryError("\(target): it cannot be removed while the alias '\(other.name)' shows a part of it")
            }
        }
    }

    /// Sums of addresses stay far from overflowing because of this.
    private func checkSize(_ id: MemoryRegionID) throws(MemoryError) {
        let node = try node(id)
        let (size, limit) = (node.region.byteCount, MemoryRegion.addressLimit)
        guard size > 0 else { throw MemoryError("\(id): its size is 0 bytes; a region has at least one") }
        guard size <= limit, node.address <= limit - size else {
            throw MemoryError(
                "\(id): \(size) bytes at \(GuestPhysicalAddress(node.address)) end beyond the 46 bits of an address")
        }
        switch node.region.content {
        case .container, .device: return
        case .alias(let target, let offset):
            _ = try self.node(target)
            guard offset <= limit else {
                throw MemoryError(
                    "\(id): offset \(RAMOffset(offset)) in '\(target.name)' is beyond the 46 bits of an address")
            }
        case .memory(let block, let offset):
            guard offset.value % GuestPage.byteCount == 0, size % GuestPage.byteCount == 0 else {
                throw MemoryError(
                    "\(id): \(size) bytes from \(offset) of block '\(block.name)' are not whole pages of "
                        + "\(GuestPage.byteCount) bytes")
            }
            guard size <= block.byteCount, offset.value <= block.byteCount - size else {
                throw MemoryError(
                    "\(id): \(size) bytes from \(offset) are not inside block '\(block.name)' of "
                        + "\(block.byteCount) bytes")
            }
        }
    }

    /// A region that holds or shows itself, at whatever distance, would have no end.
    private func refuseCycles() throws(MemoryError) {
        /// How many regions lie below each, in the longest line, itself counted; known once all below it were visited.
        var heights: [MemoryRegionID: Int] = [:]
        var path: [MemoryRegionID] = []
        func visit(_ id: MemoryRegionID) throws(MemoryError) {
            guard heights[id] == nil, let node = nodes[id] else { return }
            if path.contains(id) {
                let way = path.last.map { $0 == id ? "" : " by way of '\($0.name)'" } ?? ""
                throw MemoryError("\(id): it would show itself\(way)")
            }
            guard path.count < Self.depthLimit else { throw Self.tooDeep(id) }
            path.append(id)
            var below = node.children
            if case .alias(let target, _) = node.region.content { below.append(target) }
            for next in below { try visit(next) }
            path.removeLast()
            let height = 1 + (below.compactMap { heights[$0] }.max() ?? 0)
            guard height <= Self.depthLimit else { throw Self.tooDeep(id) }
            heights[id] = height
        }
        for id in nodes.keys { try visit(id) }
    }

    private static func tooDeep(_ id: MemoryRegionID) -> MemoryError {
        MemoryError("\(id): it is part of a line of more than \(depthLimit) regions, one inside the other")
    }

    /// Regions inside regions, aliases counted.
    static let depthLimit = 64
}
