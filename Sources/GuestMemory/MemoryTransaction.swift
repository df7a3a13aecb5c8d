/// Changes of the memory layout that take effect together: `GuestMemory.commit` shows the guest all of them or none.
///
/// A transaction says what shall be different and is carried out on the tree as it is at the commit, so that transactions made at the
/// same time by different parts of a machine follow one another.
public struct MemoryTransaction: Sendable {
    enum Change: Sendable {
        case create(MemoryRegionID, MemoryRegion)
        case add(MemoryRegionID, to: MemoryRegionID, at: UInt64, priority: Int)
        case remove(MemoryRegionID)
        case move(MemoryRegionID, UInt64)
        case resize(MemoryRegionID, UInt64)
        case enable(MemoryRegionID, Bool)
        case setPriority(MemoryRegionID, Int)
        case setReadOnly(MemoryRegionID, Bool)
        case setAlias(MemoryRegionID, target: MemoryRegionID?, offset: UInt64)
    }

    private(set) var changes: [Change] = []

    public init() {}

    public var isEmpty: Bool { changes.isEmpty }

    /// A region that lies nowhere yet: for aliases to show, or to be added later.
    public mutating func create(_ region: MemoryRegion) -> MemoryRegionID {
        let id = MemoryRegionID(name: region.name)
        changes.append(.create(id, region))
        return id
    }

    /// A new region in a container, `address` bytes from its start. Of regions that overlap, the one of higher priority is seen, among
    /// equals the one added later; priorities count among the regions of one container.
    @discardableResult
    public mutating func add(
        _ region: MemoryRegion, to parent: MemoryRegionID = .system, at address: UInt64, priority: Int = 0
    ) -> MemoryRegionID {
        let id = create(region)
        add(id, to: parent, at: address, priority: priority)
        return id
    }

    /// Puts a region that was created, and lies nowhere, into a container.
    public mutating func add(
        _ id: MemoryRegionID, to parent: MemoryRegionID = .system, at address: UInt64, priority: Int = 0
    ) {
        changes.append(.add(id, to: parent, at: address, priority: priority))
    }

    /// A region and all it contains go for good. Refused at the commit while an alias shows a part of it.
    public mutating func remove(_ id: MemoryRegionID) { changes.append(.remove(id)) }

    /// To another place in the same container; it stays as old as it was.
    public mutating func move(_ id: MemoryRegionID, to address: UInt64) { changes.append(.move(id, address)) }

    public mutating func resize(_ id: MemoryRegionID, to byteCount: UInt64) { changes.append(.resize(id, byteCount)) }

    public mutating func enable(_ id: MemoryRegionID, _ isEnabled: Bool = true) {
        changes.append(.enable(id, isEnabled))
    }

    public mutating func setPriority(_ id: MemoryRegionID, _ priority: Int) {
        changes.append(.setPriority(id, priority))
    }

    /// Makes a ROM of RAM, or RAM of a ROM; an alias or a container write-protects what is seen through it.
    public mutating func setReadOnly(_ id: MemoryRegionID, _ isReadOnly: Bool) {
        changes.append(.setReadOnly(id, isReadOnly))
    }

    /// What an alias shows: another part, or a part of another region.
    public mutating func setAlias(_ id: MemoryRegionID, of target: MemoryRegionID? = nil, offset: UInt64) {
        changes.append(.setAlias(id, target: target, offset: offset))
    }

    /// The changes of another transaction, made as a part of this one.
    public mutating func append(_ other: MemoryTransaction) { changes += other.changes }
}
