import Accelerator
import GuestMemory
import Synchronization

/// What to do with a vCPU whose KVM_RUN failed at guest memory.
enum FaultVerdict {
    case retry
    case fail(String)
}

extension KVMSlots {
    /// KVM_RUN returned EFAULT: the processor touched a page of a slot behind which nothing is, or nothing that can be written. The
    /// instruction has not been carried out.
    ///
    /// - Parameters:
    ///   - address: the guest-physical address, where the kernel told it (KVM_EXIT_MEMORY_FAULT).
    ///   - generation: what `generation` was before KVM_RUN.
    func resolveFault(at address: GuestPhysicalAddress?, since generation: UInt64) -> FaultVerdict {
        changing.withLock { _ in
            guard generation == self.generation.load(ordering: .sequentiallyConsistent) else { return retry() }
            do throws(MemoryError) {
                guard try correct(address) else {
                    let place = address.map { " at \($0)" } ?? ""
                    return .fail(
                        "KVM cannot reach the memory behind the guest's access\(place); the host may have none left")
                }
                return retry()
            } catch { return .fail(error.description) }
        }
    }

    /// KVM could not emulate an instruction. If the layout changed meanwhile, it may not have been there to be read.
    func resolveEmulationFailure(since generation: UInt64) -> FaultVerdict? {
        guard strategy != .naive else { return nil }
        return changing.withLock { _ in
            generation == self.generation.load(ordering: .sequentiallyConsistent) ? nil : retry()
        }
    }

    private func retry() -> FaultVerdict {
        counters.withLock { $0.retries += 1 }
        return .retry
    }

    /// Makes slots exact where a guest ran into their excess. - Returns: whether there was any.
    private func correct(_ address: GuestPhysicalAddress?) throws(MemoryError) -> Bool {
        let slots = slots
        let found: (plan: SlotPlan, corrected: [SlotExcess])
        if let address {
            let page = address.value >> GuestPage.shift
            found = try planner.correction(of: slots) { $0.pages.contains(page) }
        } else {
            // Which page it was is not known. Holes first: once cut out they cost nothing, while read-only slots that become RAM again do.
            let holes = try planner.correction(of: slots) { $0.kind == .hole }
            found = holes.corrected.isEmpty ? try planner.correction(of: slots) { $0.kind == .readOnly } : holes
        }
        guard !found.corrected.isEmpty else { return false }
        try carryOut(found.plan)
        counters.withLock {
            for excess in found.corrected {
                if excess.kind == .hole { $0.splits += 1 } else { $0.promotions += 1 }
            }
        }
        return true
    }
}
