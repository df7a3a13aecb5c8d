import GuestMemory

/// How slots go from one layout to another: what is done, in order, and what is there afterwards. A value; `KVMSlots` carries it out.
struct SlotPlan: Equatable {
    enum Operation: Equatable {
        /// Exchanges what stands behind pages of the window; `nil` is nothing.
        case window(Range<UInt64>, from: ShownPages.Content?, to: ShownPages.Content?)
        case create(Slot)
        case delete(Slot)
        /// Waits until every write that was under way has been reported, and has the kernel forget all translations.
        case settle
        /// The same, if page tables may have lain in what is not shown any more.
        case settleIfTables([ShownPages])
        /// Tells the observer.
        case announce(Slot, becomes: Slot?)
    }

    var operations: [Operation] = []
    /// No vCPU may run meanwhile: a moment lies in it in which memory is absent, or in which writes would get lost.
    var isPausing = false
    /// The slots there are afterwards, by ascending guest address.
    var slots: [Slot] = []

    var isEmpty: Bool { operations.isEmpty }

    var changesWindows: Bool {
        operations.contains { if case .window = $0 { true } else { false } }
    }
}

/// How slots follow the memory layout.
public enum SlotStrategy: String, Sendable, CaseIterable {
    /// Slots go and come as the layout changes, while vCPUs run: what the guest does in between fails.
    case naive
    /// The same with all vCPUs stopped, at every change.
    case pauseAll = "pause-all"
    /// Memory is exchanged behind slots that stay; vCPUs are stopped only where that is not possible.
    case atomic
}

/// Makes plans: a pure function of slots and layout.
struct SlotPlanner {
    let strategy: SlotStrategy
    /// Which blocks can be mapped a second time, by index.
    let hasFile: [Bool]
    /// Slots do not cross multiples of this many pages.
    let granulePages: UInt64
    /// Slots there may be at once; one of them is kept for settling.
    let limit: Int
    /// Translations made from guest page tables outlive an exchange of the pages they lay in.
    let hasShadowPaging: Bool
    /// Guest pages where a device answers: no slot covers them, not even with nothing behind it.
    var devices: [Range<UInt64>] = []
    /// Numbers of slots whose writes are to be reported.
    let logged: Set<UInt32>
    /// Where a guest page has its place in the windows.
    let windowAddress: (UInt64) -> UInt
    let blockAddress: (Int, PageIndex) -> UInt

    private var usesWindows: Bool { strategy == .atomic }

    /// The plan from `slots` to a layout. - Throws: `MemoryError` if that needs more slots than there are.
    func plan(from slots: [Slot], to layout: [ShownPages]) throws(MemoryError) -> SlotPlan {
        // Slots that show nothing any more stay, because what comes back finds its slot: until others need their numbers.
        do throws(MemoryError) { return try plan(from: slots, to: layout, keepsEmpty: true) } catch {
            return try plan(from: slots, to: layout, keepsEmpty: false)
        }
    }

    private func plan(
        from slots: [Slot], to layout: [ShownPages], keepsEmpty: Bool
    ) throws(MemoryError) -> SlotPlan {
        let layout = ShownPages.joined(layout)
        var kept: [Slot] = []
        var changed: [(old: Slot, new: Slot)] = []
        var gone: [Slot] = []
        var cursor = ListCursor(layout)
        for slot in slots {
            let wanted = cursor.parts(in: slot.guestPages)
            if wanted == slot.shown, keepsEmpty || !wanted.isEmpty, !isDevice(in: slot) {
                kept.append(slot)
            } else if canShow(wanted, in: slot), keepsEmpty || !wanted.isEmpty {
                let new = slot.with(pieces: Slot.pieces(wanted, from: slot.guestPages.lowerBound))
                changed.append((slot, new))
                kept.append(new)
            } else {
                gone.append(slot)
            }
        }
        let (fresh, isPausing) = try freshSlots(layout, kept: kept, gone: gone, count: slots.count)
        var plan = SlotPlan()
        plan.isPausing = isPausing
        plan.slots = (kept + fresh).sorted { $0.guestAddress < $1.guestAddress }
        let exchanges = usesWindows ? exchanges(from: slots, to: layout) : []
        order(&plan, exchanges, changed: changed, gone: gone, fresh: fresh)
        return plan
    }

    private func isDevice(in slot: Slot) -> Bool { devices.contains { $0.overlaps(slot.guestPages) } }

    private func canShow(_ wanted: [ShownPages], in slot: Slot) -> Bool {
        slot.isWindow && !isDevice(in: slot)
            && wanted.allSatisfy { hasFile[$0.content.block] && ($0.content.isReadOnly || !slot.isReadOnly) }
    }

    private func order(
        _ plan: inout SlotPlan, _ exchanges: [SlotPlan.Operation], changed: [(old: Slot, new: Slot)], gone: [Slot],
        fresh: [Slot]
    ) {
        var (added, replaced, hidden): ([SlotPlan.Operation], [SlotPlan.Operation], [SlotPlan.Operation]) = ([], [], [])
        var lost: [ShownPages] = []
        for operation in exchanges {
            guard case .window(let pages, let old, let new) = operation else { continue }
            if old == nil {
                added.append(operation)
            } else if new == nil {
                hidden.append(operation)
            } else {
                replaced.append(operation)
            }
            // Where only the access changes, what page tables say stays the same.
            if let old, new.map({ $0.block == old.block && $0.firstPage == old.firstPage }) != true {
                lost.append(ShownPages(pages: pages, content: old))
            }
        }
        let news =
            changed.map { SlotPlan.Operation.announce($0.old, becomes: $0.new) }
            + gone.map { .announce($0, becomes: nil) }
        let deletions = gone.map(SlotPlan.Operation.delete)
        let creations = fresh.map(SlotPlan.Operation.create)
        guard strategy == .atomic, !plan.isPausing else {
            // What goes may lie where something comes.
            plan.operations = added + replaced + hidden + news + deletions + creations
            return
        }
        let isLogged = !lost.isEmpty && (changed.map(\.old) + gone).contains { logged.contains($0.number) }
        var settling: [SlotPlan.Operation] = []
        if isLogged {
            settling = [.settle]
        } else if hasShadowPaging, !lost.isEmpty, deletions.isEmpty {
            // A deletion would make the kernel forget as well.
            settling = [.settleIfTables(lost)]
        }
        plan.operations = added + creations + replaced + hidden + settling + news + deletions
    }

    // MARK: Windows

    /// What changes in the windows; where nothing of a file is shown, a window shows nothing.
    private func exchanges(from slots: [Slot], to layout: [ShownPages]) -> [SlotPlan.Operation] {
        let old = slots.filter(\.isWindow).flatMap(\.shown)
        let new = layout.filter { hasFile[$0.content.block] }.flatMap(cut)
        let borders = Set((old + new).flatMap { [$0.pages.lowerBound, $0.pages.upperBound] })
        let sorted = borders.sorted()
        var (before, after) = (ListCursor(old), ListCursor(new))
        return zip(sorted, sorted.dropFirst()).compactMap { first, last in
            let was = before.parts(in: first..<last).first?.content
            let becomes = after.parts(in: first..<last).first?.content
            return was == becomes ? nil : .window(first..<last, from: was, to: becomes)
        }
    }

    /// Each granule has a window of its own.
    private func cut(_ item: ShownPages) -> [ShownPages] {
        let granules = item.pages.lowerBound / granulePages...(item.pages.upperBound - 1) / granulePages
        return granules.compactMap { item.clamped(to: $0 * granulePages..<($0 + 1) * granulePages) }
    }

    // MARK: New slots

    private func freshSlots(
        _ layout: [ShownPages], kept: [Slot], gone: [Slot], count: Int
    ) throws(MemoryError) -> ([Slot], isPausing: Bool) {
        let runs = newRuns(layout, kept: kept)
        let collides = runs.contains { run in
            let pages = run[0].pages.lowerBound..<run[run.count - 1].pages.upperBound
            return gone.contains { $0.guestPages.overlaps(pages) }
        }
        let losesWrites = gone.contains { !$0.isWindow && logged.contains($0.number) }
        let isPausing: Bool
        switch strategy {
        case .naive: isPausing = false
        case .pauseAll: isPausing = !(runs.isEmpty && gone.isEmpty)
        case .atomic: isPausing = collides || losesWrites
        }
        let deletesFirst = isPausing || strategy == .naive
        let most = deletesFirst ? max(count, kept.count + runs.count) : count + runs.count
        guard most < limit else { throw MemoryError(Self.limitReached(most, limit)) }
        var numbers = FreeNumbers(taken: kept + (deletesFirst ? [] : gone))
        let slots = runs.map { run in
            let pages = run[0].pages.lowerBound..<run[run.count - 1].pages.upperBound
            let isWindow = usesWindows && hasFile[run[0].content.block]
            return Slot(
                number: numbers.next(), guestAddress: GuestPhysicalAddress(pages.lowerBound << GuestPage.shift),
                pageCount: UInt64(pages.count),
                hostAddress: isWindow
                    ? windowAddress(pages.lowerBound) : blockAddress(run[0].content.block, run[0].content.firstPage),
                isReadOnly: isWindow ? false : run[0].content.isReadOnly,
                pieces: Slot.pieces(run, from: pages.lowerBound), isWindow: isWindow)
        }
        return (slots, isPausing)
    }

    static func limitReached(_ count: Int, _ limit: Int) -> String {
        "guest memory needs \(count + 1) memory slots, but this kernel's KVM has \(limit); use less memory or fewer regions"
    }

    /// What no kept slot shows, in runs of which each becomes a slot.
    private func newRuns(_ layout: [ShownPages], kept: [Slot]) -> [[ShownPages]] {
        var runs: [[ShownPages]] = []
        var next = kept.makeIterator()
        var slot = next.next()
        for item in layout {
            var position = item.pages.lowerBound
            while position < item.pages.upperBound {
                while let covering = slot, covering.guestPages.upperBound <= position { slot = next.next() }
                if let covering = slot, covering.guestPages.contains(position) {
                    position = covering.guestPages.upperBound
                    continue
                }
                let border = (position / granulePages + 1) * granulePages
                let end = min(item.pages.upperBound, border, slot?.guestPages.lowerBound ?? .max)
                if let part = item.clamped(to: position..<end) { append(part, to: &runs) }
                position = end
            }
        }
        return runs
    }

    /// Neighbours in a window share a slot.
    private func append(_ part: ShownPages, to runs: inout [[ShownPages]]) {
        if usesWindows, hasFile[part.content.block], let last = runs.last?.last, hasFile[last.content.block],
            last.pages.upperBound == part.pages.lowerBound, part.pages.lowerBound % granulePages != 0
        {
            runs[runs.count - 1].append(part)
        } else {
            runs.append([part])
        }
    }
}

/// Slot numbers nobody has.
struct FreeNumbers {
    private var taken: Set<UInt32>
    private var candidate: UInt32 = 0

    init(taken: [Slot]) { self.taken = Set(taken.map(\.number)) }

    mutating func next() -> UInt32 {
        while taken.contains(candidate) { candidate += 1 }
        defer { candidate += 1 }
        return candidate
    }
}

/// Walks once over a list in order, asked for ascending ranges.
struct ListCursor {
    private let list: [ShownPages]
    private var index = 0

    init(_ list: [ShownPages]) { self.list = list }

    /// What of the list lies in a range.
    mutating func parts(in range: Range<UInt64>) -> [ShownPages] {
        while index < list.count, list[index].pages.upperBound <= range.lowerBound { index += 1 }
        var parts: [ShownPages] = []
        var at = index
        while at < list.count, list[at].pages.lowerBound < range.upperBound {
            if let part = list[at].clamped(to: range) { parts.append(part) }
            at += 1
        }
        return parts
    }
}
