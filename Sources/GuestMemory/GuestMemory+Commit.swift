import Host
import Synchronization

// The memory transaction: a changed copy of the tree, its flat view, the difference, the listeners one after the other, the swap.

extension GuestMemory {
    /// Shows the guest all changes of a transaction at once. Commits follow one another; readers go on and see the old view or the new.
    ///
    /// - Throws: `MemoryError`: a layout that is not possible, or what a listener was refused. Then everything is as it was.
    /// - Precondition: not called by a listener.
    public func commit(_ transaction: MemoryTransaction) throws(MemoryError) {
        try listeners.withLock { (listeners) throws(MemoryError) in
            let old = layout.withLock { $0 }
            var tree = old.tree
            try tree.apply(transaction)
            let new = Layout(tree: tree, view: try tree.flatView())
            try checkBlocks(new.view)
            let change = FlatViewChange(from: old.view, to: new.view)
            guard !change.isEmpty else { return layout.withLock { $0 = new } }
            commit.begin(change)
            defer { commit.end() }
            try Self.tell(change, listeners)
            layout.withLock { $0 = new }
        }
    }

    /// Changes go to `listener` from now on, after those that were added before. It is held weakly.
    ///
    /// - Parameter known: what it shows already; the difference to the present view is its first change, if there is one.
    /// - Throws: what it said to that; then it was not added.
    public func addListener(
        _ listener: any MemoryListener, showing known: FlatView = FlatView([])
    ) throws(MemoryError) {
        try listeners.withLock { (listeners) throws(MemoryError) in
            let change = FlatViewChange(from: known, to: view)
            if !change.isEmpty { try listener.commit(change) }
            listeners.removeAll { $0.listener == nil }
            listeners.append(WeakListener(listener: listener))
        }
    }

    /// Returns when a commit that is under way is done; the listener hears of none after that.
    public func removeListener(_ listener: any MemoryListener) {
        listeners.withLock { $0.removeAll { $0.listener == nil || $0.listener === listener } }
    }

    /// The view by which to answer a vCPU that came out of the guest with an access to `address`: if what lies there is just being
    /// changed, the one after that commit. Costs one look at a flag while no commit is under way.
    ///
    /// The vCPU that waits here is outside the guest: who holds vCPUs for a commit must not wait for it.
    public func settle(_ address: GuestPhysicalAddress) -> FlatView {
        commit.wait(for: address)
        return view
    }

    private func checkBlocks(_ view: FlatView) throws(MemoryError) {
        for section in view.sections {
            guard case .memory(let block, _) = section.content, !blocks.contains(where: { $0 === block }) else {
                continue
            }
            throw MemoryError("\(section.region): block '\(block.name)' is none of this machine's")
        }
    }

    private static func tell(_ change: FlatViewChange, _ listeners: [WeakListener]) throws(MemoryError) {
        var told: [any MemoryListener] = []
        for entry in listeners {
            guard let listener = entry.listener else { continue }
            do throws(MemoryError) {
                try listener.commit(change)
                told.append(listener)
            } catch {
                var failure = error
                // Last told, first undone.
                while let earlier = told.popLast() {
                    do throws(MemoryError) { try earlier.commit(change.reversed) } catch {
                        failure = MemoryError("\(failure); and the way back failed: \(error)")
                    }
                }
                throw failure
            }
        }
    }
}

/// Says which addresses are being changed right now.
final class CommitInProgress: Sendable {
    private let isUnderWay = Atomic<Bool>(false)
    /// Empty while no commit is under way.
    private let ranges = Monitor<[Range<UInt64>]>([])

    func begin(_ change: FlatViewChange) {
        let changing = (change.removed + change.added).map { $0.guestAddress.value..<$0.end.value }
        ranges.withLock { $0 = changing }
        isUnderWay.store(true, ordering: .sequentiallyConsistent)
    }

    /// Call when the new view is the view, or nothing has come of it.
    func end() {
        isUnderWay.store(false, ordering: .sequentiallyConsistent)
        ranges.withLock { $0 = [] }
    }

    func wait(for address: GuestPhysicalAddress) {
        guard isUnderWay.load(ordering: .sequentiallyConsistent) else { return }
        ranges.wait { $0.contains { $0.contains(address.value) } ? nil : () }
    }
}
