import Accelerator
public import GuestMemory
import Host
import Synchronization

/// What changes of the memory layout cost a machine so far.
public struct MemorySlotStatistics: Sendable, Equatable {
    /// Changes carried out.
    public internal(set) var commits: UInt64 = 0
    /// How often all vCPUs were held, for whatever reason.
    public internal(set) var pauses: UInt64 = 0
    /// Read-only ranges that got slots of their own, because a guest wrote to them.
    public internal(set) var promotions: UInt64 = 0
    /// Holes that were cut out of slots, because a guest touched them.
    public internal(set) var splits: UInt64 = 0
    /// Grace periods waited for, with every translation forgotten.
    public internal(set) var zaps: UInt64 = 0
    /// vCPUs that failed because of a change under way, and went on after it.
    public internal(set) var retries: UInt64 = 0
    /// Time the last commit took.
    public internal(set) var lastCommitNanoseconds: UInt64 = 0
    /// Slots there are, and may be.
    public internal(set) var slots = 0
    public internal(set) var slotLimit = 0
}

extension KVMSlots: MemoryListener {
    func commit(_ change: FlatViewChange) throws(MemoryError) {
        try changing.withLock { (_) throws(MemoryError) in
            let start = Clock.monotonicNanoseconds
            do throws(MemoryError) {
                try carryOut(try plan(to: change.new))
            } catch {
                guard let first = change.added.first ?? change.removed.first else { throw error }
                throw MemoryError("change of \(first.place): \(error)")
            }
            counters.withLock {
                $0.commits += 1
                $0.lastCommitNanoseconds = Clock.monotonicNanoseconds - start
            }
        }
    }

    var statistics: MemorySlotStatistics {
        var statistics = counters.withLock { $0 }
        (statistics.slots, statistics.slotLimit) = (slots.count, limit)
        return statistics
    }

    /// Carries out a plan, whole or not at all. Call with `changing` held.
    func carryOut(_ plan: SlotPlan) throws(MemoryError) {
        guard !plan.isEmpty else { return }
        // Who failed meanwhile sees that something changed, whether it came to something or not.
        defer { generation.add(1, ordering: .sequentiallyConsistent) }
        if plan.isPausing || plan.changesWindows && windows.isWatched {
            counters.withLock { $0.pauses += 1 }
            try hold.hold { () throws(MemoryError) in try perform(plan) }
        } else {
            do throws(MemoryError) { try perform(plan) } catch {
                // Who is inside the guest must hear of it.
                if damage != nil { hold.hold {} }
                throw error
            }
        }
    }

    /// As `carryOut`, where no vCPU needs to be held.
    func perform(_ plan: SlotPlan) throws(MemoryError) {
        var done: [SlotPlan.Operation] = []
        for operation in plan.operations {
            do throws(AcceleratorError) {
                try perform(operation)
                done.append(operation)
            } catch {
                throw MemoryError(takeBack(done, after: error.description))
            }
        }
        publish(plan.slots)
    }

    private func perform(_ operation: SlotPlan.Operation) throws(AcceleratorError) {
        switch operation {
        case .window(let pages, let old, let new): try exchange(pages, from: old, to: new)
        case .create(let slot):
            let logging = observer?.willAdd(slot) ?? false
            do throws(AcceleratorError) { try make(slot, logging: logging) } catch {
                observer?.wasRefused(slot)
                throw error
            }
        case .delete(let slot): try remove(slot)
        case .settle: try settle()
        case .settleIfTables(let lost): if mayHoldTables(lost) { try settle() }
        case .announce(let old, let new): try observer?.willChange(old, to: new)
        }
    }

    private func exchange(
        _ pages: Range<UInt64>, from old: ShownPages.Content?, to new: ShownPages.Content?
    ) throws(AcceleratorError) {
        do throws(SlotWindows.Failure) {
            try windows.exchange(pages, from: old, to: new, blocks: memory.blocks)
        } catch {
            guard let wayBack = error.wayBack else { throw AcceleratorError(error.cause.description) }
            throw AcceleratorError(damaged(error.cause.description, wayBack.description))
        }
    }

    /// The slots are neither as they were nor as they should be: no vCPU runs on. - Returns: the sentence for whoever wanted the change.
    private func damaged(_ failure: String, _ wayBack: String) -> String {
        let sentence = "\(failure); and the way back failed: \(wayBack)"
        isDamaged(sentence)
        return sentence
    }

    /// Undoes operations, the last first. - Returns: what to say, which is more than `failure` if the way back was barred too.
    private func takeBack(_ done: [SlotPlan.Operation], after failure: String) -> String {
        var sentence = failure
        for operation in done.reversed() {
            do throws(AcceleratorError) { try undo(operation) } catch {
                sentence = damaged(sentence, error.description)
            }
        }
        return sentence
    }

    private func undo(_ operation: SlotPlan.Operation) throws(AcceleratorError) {
        switch operation {
        case .window(let pages, let old, let new): try exchange(pages, from: new, to: old)
        case .create(let slot):
            try observer?.willChange(slot, to: nil)
            try remove(slot)
        // Its observer is told when the announcement is undone.
        case .delete(let slot): try make(slot, logging: false)
        // What lay behind the window for a moment may have left translations as well.
        case .settle, .settleIfTables: try settle()
        case .announce(let old, let new?): try observer?.willChange(new, to: old)
        case .announce(let old, nil):
            if let observer { try set(old, logging: observer.willAdd(old)) }
        }
    }
}

extension KVMAccelerator {
    /// Has the machine's slots follow changes of its memory layout.
    public var memoryListener: any MemoryListener { slots }

    public var memorySlotStatistics: MemorySlotStatistics { slots.statistics }
}
