import GuestMemory
import TestSupport
import Testing

@testable import KVM

/// What a kernel would make of a plan, page by page: slots, and what stands behind the windows.
private struct KernelModel {
    var slots: [UInt32: Slot] = [:]
    var windows: [UInt64: ShownPages.Content] = [:]

    static func windowAddress(_ page: UInt64) -> UInt { 1 << 40 + UInt(page) << 12 }
    static func blockAddress(_ block: Int, _ page: PageIndex) -> UInt { UInt(block + 2) << 44 + UInt(page.value) << 12 }

    /// What the guest finds at a page.
    func seen(_ page: UInt64) -> ShownPages.Content? {
        guard let slot = slots.values.first(where: { $0.guestPages.contains(page) }) else { return nil }
        if slot.isWindow {
            guard slot.hostAddress == Self.windowAddress(slot.guestPages.lowerBound) else { return nil }
            guard let content = windows[page] else { return nil }
            return .init(
                block: content.block, firstPage: content.firstPage, isReadOnly: content.isReadOnly || slot.isReadOnly)
        }
        let piece = slot.pieces[0]
        guard slot.hostAddress == Self.blockAddress(piece.block, piece.firstPage) else { return nil }
        return .init(
            block: piece.block, firstPage: PageIndex(piece.firstPage.value + page - slot.guestPages.lowerBound),
            isReadOnly: slot.isReadOnly)
    }

    /// - Returns: what the kernel would refuse it for.
    mutating func perform(_ operation: SlotPlan.Operation) -> String? {
        switch operation {
        case .window(let pages, let old, let new):
            for page in pages {
                let skipped = page - pages.lowerBound
                guard windows[page] == old?.advanced(by: skipped) else { return "page \(page) was something else" }
                windows[page] = new?.advanced(by: skipped)
            }
        case .create(let slot):
            guard slots[slot.number] == nil else { return "slot \(slot.number) is there" }
            guard !slots.values.contains(where: { $0.guestPages.overlaps(slot.guestPages) }) else {
                return "slot \(slot.number) overlaps"
            }
            slots[slot.number] = slot
        case .delete(let slot):
            guard slots[slot.number]?.isPlaced(like: slot) == true else { return "slot \(slot.number) is not there" }
            slots[slot.number] = nil
        case .announce(let old, let new):
            guard let slot = slots[old.number], slot.isPlaced(like: old) else { return "unknown slot \(old.number)" }
            if let new { slots[old.number] = new }
        case .settle, .settleIfTables: break
        }
        return nil
    }
}

@Suite struct SlotPlanTests {
    private static let pageCount: UInt64 = 64

    private func planner(_ strategy: SlotStrategy, limit: Int = 500, logged: Set<UInt32> = []) -> SlotPlanner {
        SlotPlanner(
            strategy: strategy, hasFile: [true, true, false], granulePages: 16, limit: limit, hasShadowPaging: true,
            logged: logged, windowAddress: KernelModel.windowAddress, blockAddress: KernelModel.blockAddress)
    }

    private typealias Layout = [ShownPages.Content?]

    private func list(_ layout: Layout) -> [ShownPages] {
        layout.enumerated().compactMap { page, content in
            content.map { ShownPages(pages: UInt64(page)..<UInt64(page) + 1, content: $0) }
        }
    }

    /// Up to three ranges change what they show.
    private func change(_ layout: Layout, _ random: inout SeededRandom) -> Layout {
        var layout = layout
        for _ in 0..<Int.random(in: 1...3, using: &random) {
            let first = Int.random(in: 0..<layout.count, using: &random)
            let last = min(layout.count - 1, first + Int.random(in: 0...24, using: &random))
            let block = Int.random(in: 0...2, using: &random)
            let page = UInt64.random(in: 0..<100, using: &random)
            let kind = Int.random(in: 0...4, using: &random)
            for (index, at) in (first...last).enumerated() {
                let content = ShownPages.Content(
                    block: block, firstPage: PageIndex(page + UInt64(index)), isReadOnly: kind == 0)
                switch kind {
                case 0, 1, 2: layout[at] = content
                case 3: layout[at] = nil
                default:
                    layout[at] = layout[at].map {
                        .init(block: $0.block, firstPage: $0.firstPage, isReadOnly: !$0.isReadOnly)
                    }
                }
            }
        }
        return layout
    }

    /// Carries a plan out and looks at the guest's memory after each operation.
    private func check(
        _ plan: SlotPlan, from old: Layout, to new: Layout, _ model: inout KernelModel, logged: Set<UInt32>,
        gaps: Bool
    ) -> String? {
        var isSettled = plan.isPausing
        for operation in plan.operations {
            if case .announce(let slot, let next) = operation, !gaps {
                for page in slot.guestPages where old[Int(page)] != nil && old[Int(page)] != new[Int(page)] {
                    let isOld = model.seen(page) == old[Int(page)] && !plan.isPausing
                    if isOld, slot.isWindow {
                        return "page \(page) can still be written when \(slot.number) is harvested"
                    }
                    let isFlip = next != nil && old[Int(page)]?.firstPage == new[Int(page)]?.firstPage
                    if logged.contains(slot.number), !isSettled, !isFlip {
                        return "slot \(slot.number) is harvested before the last write to page \(page) is reported"
                    }
                }
            }
            if operation == .settle { isSettled = true }
            if let refusal = model.perform(operation) { return "\(operation): \(refusal)" }
            guard !plan.isPausing, !gaps else { continue }
            for page in 0..<old.count {
                let seen = model.seen(UInt64(page))
                if seen != old[page], seen != new[page] {
                    return "\(operation): page \(page) shows what it never showed"
                }
                if seen == nil, old[page] != nil, new[page] != nil { return "\(operation): page \(page) is absent" }
            }
        }
        for page in 0..<new.count where model.seen(UInt64(page)) != new[page] {
            return
                "page \(page) shows \(String(describing: model.seen(UInt64(page)))), not \(String(describing: new[page]))"
        }
        let slots = model.slots.values.sorted { $0.guestAddress < $1.guestAddress }
        return slots == plan.slots ? nil : "the plan says \(plan.slots) but the kernel has \(slots)"
    }

    @Test(
        "any layout follows any other, and where no vCPU is held no page is ever absent",
        arguments: SlotStrategy.allCases)
    func randomLayouts(strategy: SlotStrategy) throws {
        let seed = UInt64.random(in: 0..<1 << 32)
        var random = SeededRandom(seed: seed)
        var model = KernelModel()
        var layout = Layout(repeating: nil, count: Int(Self.pageCount))
        var slots: [Slot] = []
        var pauses = 0
        for round in 0..<1500 {
            // Every tenth time a guest has run into what slots promise too much.
            if round % 10 == 9 {
                let kind: SlotExcess.Kind = Bool.random(using: &random) ? .hole : .readOnly
                let (plan, corrected) = try planner(strategy).correction(of: slots) { $0.kind == kind }
                let failure = check(plan, from: layout, to: layout, &model, logged: [], gaps: !plan.isPausing)
                #expect(failure == nil, "seed \(seed), round \(round), correction: \(failure ?? "")")
                #expect(corrected.isEmpty == plan.isEmpty)
                slots = plan.isEmpty ? slots : plan.slots
                #expect(!slots.contains { $0.excess.contains { $0.kind == kind } })
            }
            let next = change(layout, &random)
            let logged = Set(slots.map(\.number).filter { _ in Bool.random(using: &random) })
            let plan = try planner(strategy, logged: logged).plan(from: slots, to: list(next))
            let failure = check(
                plan, from: layout, to: next, &model, logged: logged, gaps: strategy == .naive)
            #expect(failure == nil, "seed \(seed), round \(round): \(failure ?? "")")
            guard failure == nil else { return }
            if plan.isPausing { pauses += 1 }
            (layout, slots) = (next, plan.slots)
        }
        switch strategy {
        case .naive: #expect(pauses == 0)
        case .pauseAll: #expect(pauses > 1000)
        case .atomic: #expect(pauses > 0 && pauses < 1400)
        }
    }

    private func content(_ block: Int, _ page: UInt64, readOnly: Bool = false) -> ShownPages.Content {
        .init(block: block, firstPage: PageIndex(page), isReadOnly: readOnly)
    }

    @Test("what a firmware does to memory with a file needs neither a new slot nor a pause")
    func firmware() throws {
        let ram = (0..<32).map { content(0, UInt64($0)) as ShownPages.Content? }
        let slots = try planner(.atomic).plan(from: [], to: list(ram)).slots
        #expect(slots.count == 2)
        var shadowed = ram
        for page in 8..<12 { shadowed[page] = content(1, UInt64(page), readOnly: true) }
        let replace = try planner(.atomic).plan(from: slots, to: list(shadowed))
        #expect(
            replace.operations == [
                .window(8..<12, from: content(0, 8), to: content(1, 8, readOnly: true)),
                .settleIfTables([ShownPages(pages: 8..<12, content: content(0, 8))]),
                .announce(slots[0], becomes: replace.slots[0]),
            ])
        #expect(!replace.isPausing)
        for page in 8..<12 { shadowed[page] = content(1, UInt64(page)) }
        let open = try planner(.atomic).plan(from: replace.slots, to: list(shadowed))
        #expect(
            open.operations == [
                .window(8..<12, from: content(1, 8, readOnly: true), to: content(1, 8)),
                .announce(replace.slots[0], becomes: open.slots[0]),
            ])
        #expect(!open.isPausing)
    }

    @Test("memory that moves is shown at its new place before it goes at the old one")
    func makeBeforeBreak() throws {
        var old = Layout(repeating: nil, count: 16)
        for page in 0..<8 { old[page] = content(0, UInt64(page)) }
        let slots = try planner(.atomic).plan(from: [], to: list(old)).slots
        var new = old
        (new[2], new[9]) = (nil, old[2])
        let plan = try planner(.atomic).plan(from: slots, to: list(new))
        guard case .window(9..<10, nil, _) = plan.operations[0], case .create = plan.operations[1],
            case .window(2..<3, _, nil) = plan.operations[2]
        else {
            Issue.record("\(plan.operations)")
            return
        }
        #expect(!plan.isPausing)
    }

    @Test(
        "memory without a file is resized with vCPUs held, and taken away whole without, unless writes could get lost")
    func anonymous() throws {
        let ram = (0..<8).map { content(2, UInt64($0)) as ShownPages.Content? }
        let slots = try planner(.atomic).plan(from: [], to: list(ram)).slots
        #expect(slots.count == 1 && !slots[0].isWindow)
        let shrunk = try planner(.atomic).plan(from: slots, to: list(Array(ram[..<4])))
        #expect(shrunk.isPausing && shrunk.slots.count == 1)
        #expect(try !planner(.atomic).plan(from: slots, to: []).isPausing)
        #expect(try planner(.atomic, logged: [slots[0].number]).plan(from: slots, to: []).isPausing)
        let grown = try planner(.atomic).plan(from: slots, to: list(ram + [content(2, 50)]))
        #expect(!grown.isPausing && grown.slots.count == 2)
    }

    @Test("what goes and comes back finds its slot, unless others need slots more, or a device answers there")
    func emptySlots() throws {
        let ram = (0..<8).map { content(0, UInt64($0)) as ShownPages.Content? }
        let slots = try planner(.atomic).plan(from: [], to: list(ram)).slots
        let empty = try planner(.atomic).plan(from: slots, to: [])
        #expect(empty.slots.count == 1 && empty.slots[0].pieces.isEmpty && !empty.isPausing)
        let back = try planner(.atomic).plan(from: empty.slots, to: list(ram))
        #expect(back.slots == slots)
        let elsewhere = list(Layout(repeating: nil, count: 12) + [content(0, 0)])
        #expect(try planner(.atomic).plan(from: empty.slots, to: elsewhere).slots.count == 2)
        #expect(try planner(.atomic, limit: 3).plan(from: empty.slots, to: elsewhere).slots.count == 2)
        var shadowed = ram
        shadowed[3] = nil
        var planner = planner(.atomic)
        #expect(try planner.plan(from: slots, to: list(shadowed)).slots.count == 1)
        planner.devices = [3..<4]
        let split = try planner.plan(from: slots, to: list(shadowed))
        #expect(split.isPausing && split.slots.map(\.guestPages) == [0..<3, 4..<8])
        #expect(try planner.plan(from: empty.slots, to: []).slots.isEmpty)
    }

    @Test("a correction that needs slot numbers takes those of slots that show nothing")
    func correctionAtLimit() throws {
        let ram = (0..<8).map { content(0, UInt64($0)) as ShownPages.Content? }
        let far = Layout(repeating: nil, count: 32) + [content(0, 32)]
        let slots = try planner(.atomic).plan(from: [], to: list(ram + far[8...])).slots
        var flipped = ram
        flipped[3] = content(0, 3, readOnly: true)
        let now = try planner(.atomic).plan(from: slots, to: list(flipped)).slots
        #expect(now.count == 2 && now[1].pieces.isEmpty)
        let roomy = try planner(.atomic).correction(of: now) { $0.kind == .readOnly }
        #expect(roomy.plan.slots.count == 4)
        let tight = try planner(.atomic, limit: 4).correction(of: now) { $0.kind == .readOnly }
        #expect(tight.plan.slots.map(\.guestPages) == [0..<3, 3..<4, 4..<8])
        #expect(throws: MemoryError.self) {
            try planner(.atomic, limit: 3).correction(of: now) { $0.kind == .readOnly }
        }
    }

    @Test("a layout that needs more slots than there are is refused with both numbers")
    func limit() throws {
        let layout = (0..<8).map { $0 % 2 == 0 ? content(2, UInt64($0)) : nil }
        let error = #expect(throws: MemoryError.self) {
            try planner(.atomic, limit: 3).plan(from: [], to: list(layout))
        }
        #expect(error?.description.contains("needs 5 memory slots, but this kernel's KVM has 3") == true)
    }
}
