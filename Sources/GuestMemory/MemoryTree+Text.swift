// The tree and the flat view as text, in the shape in which QEMU's `info mtree` prints them.

extension MemoryTree {
    /// The regions: the address space, then what is only seen through aliases. Deeper regions are further in.
    public var lines: [String] {
        let alone = nodes.filter { $0.key != .system && $0.value.parent == nil }.keys.sorted { $0.isOlder(than: $1) }
        var lines = ["address-space: memory"] + lines(of: .system, from: 0, depth: 1)
        for id in alone { lines += ["", "memory-region: \(id.name)"] + self.lines(of: id, from: 0, depth: 1) }
        return lines
    }

    private func lines(of id: MemoryRegionID, from base: UInt64, depth: Int) -> [String] {
        guard let node = nodes[id] else { return [] }
        let start = base + node.address
        let place = FlatView.text(start, node.region.byteCount)
        let state = node.region.isEnabled ? "" : " [disabled]"
        let line = "\(place) (prio \(node.priority), \(kind(of: node.region))): \(title(of: node.region))\(state)"
        return [String(repeating: "  ", count: depth) + line]
            + childrenByRank(of: node).flatMap { lines(of: $0, from: start, depth: depth + 1) }
    }

    /// An alias is called what it shows.
    private func kind(of region: MemoryRegion) -> String {
        switch region.content {
        case .container: return region.isReadOnly ? "container, read-only" : "container"
        case .memory: return region.isReadOnly ? "rom" : "ram"
        case .device: return "i/o"
        case .alias(let target, _):
            var shown = nodes[target]?.region
            var steps = 0
            while case .alias(let next, _)? = shown?.content, steps < Self.depthLimit {
                shown = nodes[next]?.region
                steps += 1
            }
            guard let shown, !Self.isAlias(shown) else { return "alias" }
            let kind = kind(of: shown)
            return region.isReadOnly && kind == "ram" ? "rom" : kind
        }
    }

    private static func isAlias(_ region: MemoryRegion) -> Bool {
        if case .alias = region.content { true } else { false }
    }

    private func title(of region: MemoryRegion) -> String {
        switch region.content {
        case .alias(let target, let offset):
            "alias \(region.name) @\(target.name) \(FlatView.text(offset, region.byteCount))"
        case .memory(let block, let offset) where offset.value > 0:
            "\(region.name) @\(block.name) \(FlatView.text(offset.value, region.byteCount))"
        default: region.name
        }
    }
}

extension FlatView {
    /// What the guest sees, section by section.
    public var lines: [String] {
        let head = ["FlatView #0", " AS \"memory\", root: \(MemoryRegionID.system.name)"]
        return head
            + sections.map { section in
                let place = "  " + Self.text(section.guestAddress.value, section.byteCount)
                switch section.content {
                case .memory(let block, let offset):
                    let kind = section.isReadOnly ? "rom" : "ram"
                    return
                        "\(place) (prio 0, \(kind)): \(section.region.name) @\(block.name) \(Self.digits(offset.value))"
                case .device(_, let offset):
                    let rest = offset > 0 ? " @" + Self.digits(offset) : ""
                    return "\(place) (prio 0, i/o): \(section.region.name)\(rest)"
                }
            }
    }

    /// The first and the last address.
    static func text(_ start: UInt64, _ byteCount: UInt64) -> String {
        digits(start) + "-" + digits(start &+ byteCount &- 1)
    }

    private static func digits(_ number: UInt64) -> String {
        let text = String(number, radix: 16)
        return String(repeating: "0", count: 16 - text.count) + text
    }
}
