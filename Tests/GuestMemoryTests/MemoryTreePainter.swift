import TestSupport

@testable import GuestMemory

/// A naive reading of the tree: asks, for one address after the other, which region answers. Slow, and nothing like the painter.
struct PointwiseReader {
    let tree: MemoryTree

    /// The leaf that answers at an offset of a region: its id, the offset in it, and whether writes are discarded.
    struct Answer: Equatable {
        let region: MemoryRegionID
        let offset: UInt64
        let isReadOnly: Bool
    }

    func answer(at address: UInt64) -> Answer? { look(.system, address, false) }

    private func look(_ id: MemoryRegionID, _ offset: UInt64, _ isReadOnly: Bool) -> Answer? {
        guard let node = tree.nodes[id], node.region.isEnabled, offset < node.region.byteCount else { return nil }
        let isReadOnly = isReadOnly || node.region.isReadOnly
        switch node.region.content {
        case .memory, .device: return Answer(region: id, offset: offset, isReadOnly: isReadOnly)
        case .alias(let target, let start): return look(target, start + offset, isReadOnly)
        case .container:
            var best: (priority: Int, answer: Answer)?
            for child in node.children {
                let other = tree.nodes[child]!
                // Not below: the later one wins a tie.
                guard offset >= other.address, best.map({ other.priority >= $0.priority }) ?? true,
                    let answer = look(child, offset - other.address, isReadOnly)
                else { continue }
                best = (other.priority, answer)
            }
            return best?.answer
        }
    }
}

/// What a flat view says of one address, in the same words.
extension FlatView {
    func answer(at address: UInt64) -> (content: FlatSection.Content, region: MemoryRegionID, isReadOnly: Bool)? {
        guard let section = section(at: GuestPhysicalAddress(address)) else { return nil }
        let part = section.part(from: GuestPhysicalAddress(address), to: GuestPhysicalAddress(address) + 1)
        return (part.content, part.region, part.isReadOnly)
    }
}

/// Random transactions over a small address space, from a seed.
struct RandomLayouts {
    var random: SeededRandom
    let blocks: [RAMBlock]
    let device: any MemoryMappedDevice
    private(set) var regions: [MemoryRegionID] = []
    private var containers: [MemoryRegionID] = [.system]
    /// The part of the address space in use, in pages.
    static let pages: UInt64 = 48
    /// Devices begin and end at multiples of this.
    static let grain: UInt64 = 64

    init(seed: UInt64, blocks: [RAMBlock], device: any MemoryMappedDevice) {
        random = SeededRandom(seed: seed)
        self.blocks = blocks
        self.device = device
    }

    mutating func below(_ limit: UInt64) -> UInt64 { random.next() % limit }
    private mutating func pick<T>(_ list: [T]) -> T { list[Int(below(UInt64(list.count)))] }

    private mutating func region() -> (MemoryRegion, isContainer: Bool) {
        let size = (1 + below(16)) * 4096
        switch below(6) {
        case 0: return (.container("container", byteCount: size * 2), true)
        case 1:
            let block = pick(blocks)
            return (.rom("rom", block, offset: RAMOffset(below(16) * 4096), byteCount: size), false)
        case 2: return (.io("io", byteCount: below(3) == 0 ? size : Self.grain * (1 + below(10)), device), false)
        case 3 where !regions.isEmpty:
            let target = pick(regions)
            return (
                .alias(
                    "alias", of: target, offset: below(4) * 4096, byteCount: size, isReadOnly: below(4) == 0), false
            )
        default:
            let block = pick(blocks)
            return (.ram("ram", block, offset: RAMOffset(below(16) * 4096), byteCount: size), false)
        }
    }

    /// One to four changes; some are refused when they are committed.
    mutating func next() -> (MemoryTransaction, added: [(MemoryRegionID, isContainer: Bool)]) {
        var transaction = MemoryTransaction()
        var added: [(MemoryRegionID, isContainer: Bool)] = []
        for _ in 0...below(4) {
            let address = below(4) == 0 ? below(Self.pages * 64) * Self.grain : below(Self.pages) * 4096
            switch regions.isEmpty ? 0 : below(12) {
            case 0...3:
                let (region, isContainer) = region()
                let id = transaction.add(
                    region, to: pick(containers), at: address, priority: Int(below(3)))
                added.append((id, isContainer))
            case 4: transaction.remove(pick(regions))
            case 5, 6: transaction.move(pick(regions), to: address)
            case 7: transaction.resize(pick(regions), to: (1 + below(16)) * 4096)
            case 8: transaction.enable(pick(regions), below(3) > 0)
            case 9: transaction.setPriority(pick(regions), Int(below(4)))
            case 10: transaction.setReadOnly(pick(regions), below(2) == 0)
            default:
                let (alias, target) = (pick(regions), pick(regions))
                transaction.setAlias(alias, of: below(2) == 0 ? target : nil, offset: below(8) * 4096)
            }
        }
        return (transaction, added)
    }

    /// A transaction took effect: what it made can be changed by later ones, and what is gone cannot.
    mutating func accept(_ added: [(MemoryRegionID, isContainer: Bool)], _ tree: MemoryTree) {
        regions = (regions + added.map(\.0)).filter { tree.region($0) != nil }
        containers = (containers + added.filter(\.isContainer).map(\.0)).filter { tree.region($0) != nil }
    }
}
