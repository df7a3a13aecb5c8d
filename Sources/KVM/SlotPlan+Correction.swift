import GuestMemory

// Slots over windows promise more than the layout shows: a page that shows nothing, or only for reading, may lie in a slot of RAM. KVM_RUN
// fails where a guest runs into such a page on the processor itself. Then the slots are made as exact as the layout.

/// Where a slot says more than the layout.
struct SlotExcess: Equatable {
    enum Kind { case hole, readOnly }
    let kind: Kind
    /// Guest page numbers.
    let pages: Range<UInt64>
}

extension Slot {
    /// What of the slot is not RAM, though its flags say so, in order.
    var excess: [SlotExcess] {
        guard isWindow else { return [] }
        var found: [SlotExcess] = []
        var position = guestPages.lowerBound
        for item in shown {
            if position < item.pages.lowerBound {
                found.append(SlotExcess(kind: .hole, pages: position..<item.pages.lowerBound))
            }
            position = item.pages.upperBound
            guard item.content.isReadOnly, !isReadOnly else { continue }
            if let last = found.last, last.kind == .readOnly, last.pages.upperBound == item.pages.lowerBound {
                found[found.count - 1] = SlotExcess(
                    kind: .readOnly, pages: last.pages.lowerBound..<item.pages.upperBound)
            } else {
                found.append(SlotExcess(kind: .readOnly, pages: item.pages))
            }
        }
        if position < guestPages.upperBound {
            found.append(SlotExcess(kind: .hole, pages: position..<guestPages.upperBound))
        }
        return found
    }
}

extension SlotPlanner {
    /// The plan that takes the parts for which `isChosen` out of slots of RAM: read-only memory gets slots of its own, holes none.
    func correction(
        of slots: [Slot], where isChosen: (SlotExcess) -> Bool
    ) throws(MemoryError) -> (plan: SlotPlan, corrected: [SlotExcess]) {
        var (kept, gone, corrected): ([Slot], [Slot], [SlotExcess]) = ([], [], [])
        var parts: [(slot: Slot, pages: Range<UInt64>, isReadOnly: Bool)] = []
        for slot in slots {
            let chosen = slot.excess.filter(isChosen)
            guard !chosen.isEmpty else {
                kept.append(slot)
                continue
            }
            gone.append(slot)
            corrected += chosen
            var position = slot.guestPages.lowerBound
            for excess in chosen {
                parts.append((slot, position..<excess.pages.lowerBound, slot.isReadOnly))
                if excess.kind == .readOnly { parts.append((slot, excess.pages, true)) }
                position = excess.pages.upperBound
            }
            parts.append((slot, position..<slot.guestPages.upperBound, slot.isReadOnly))
        }
        if kept.count + parts.count >= limit {
            // Slots that show nothing stay for what may come back, until others need their numbers.
            gone += kept.filter(\.shown.isEmpty)
            kept.removeAll(where: \.shown.isEmpty)
        }
        var numbers = FreeNumbers(taken: kept)
        let fresh = parts.compactMap { part -> Slot? in
            guard !part.pages.isEmpty, part.slot.shown.contains(where: { $0.pages.overlaps(part.pages) }) else {
                return nil
            }
            return part.slot.part(part.pages, number: numbers.next(), readOnly: part.isReadOnly)
        }
        guard kept.count + fresh.count < limit else {
            throw MemoryError(Self.limitReached(kept.count + fresh.count, limit))
        }
        var plan = SlotPlan()
        plan.slots = (kept + fresh).sorted { $0.guestAddress < $1.guestAddress }
        plan.isPausing = !fresh.isEmpty
        plan.operations =
            gone.map { .announce($0, becomes: nil) } + gone.map(SlotPlan.Operation.delete)
            + fresh.map(SlotPlan.Operation.create)
        return (plan, corrected)
    }
}
