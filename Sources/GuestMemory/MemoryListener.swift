/// Makes a change of the guest's memory layout take effect: KVM's slots, later vDPA's mappings.
public protocol MemoryListener: AnyObject, Sendable {
    /// Goes from the old view to the new one. Called by one thread at a time; vCPUs may run.
    ///
    /// No vCPU may observe a moment in which memory that both views show at an address is absent there: no data access, no instruction
    /// fetch, no page-table walk. What a vCPU does to changing addresses meanwhile waits (`GuestMemory.settle`).
    /// - Throws: naming the range and the cause; then the old layout stands as it was.
    func commit(_ change: FlatViewChange) throws(MemoryError)
}

/// The difference between two views.
public struct FlatViewChange: Sendable {
    public let old: FlatView
    public let new: FlatView
    /// Parts of the old view that the new one does not show in the same way (same block, offset and access), in order.
    public let removed: [FlatRange]
    /// Parts of the new view that the old one did not show in the same way, in order.
    public let added: [FlatRange]

    public init(old: FlatView, new: FlatView, removed: [FlatRange], added: [FlatRange]) {
        self.old = old
        self.new = new
        self.removed = removed
        self.added = added
    }

    /// The way back.
    public var reversed: FlatViewChange { FlatViewChange(old: new, new: old, removed: added, added: removed) }
}

/// A layout that is not possible, or that the host refused; one sentence.
public struct MemoryError: Error, Sendable, Equatable, CustomStringConvertible {
    public let description: String
    public init(_ description: String) { self.description = description }
}
