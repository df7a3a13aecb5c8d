import Host
import Synchronization
import Testing

@testable import GuestMemory

/// Remembers what it was asked, and answers with the low bytes of the offset.
final class RecordingDevice: MemoryMappedDevice {
    let accesses = Mutex<[String]>([])

    func memoryRead(offset: UInt64, size: Int) -> UInt64 {
        accesses.withLock { $0.append("read \(offset) \(size)") }
        return 0xd0d1_d2d3_d4d5_d6d7 &+ offset
    }

    func memoryWrite(offset: UInt64, size: Int, value: UInt64) {
        accesses.withLock { $0.append("write \(offset) \(size) \(String(value & 0xffff, radix: 16))") }
    }
}

/// Keeps a map of pages by what it is told, and refuses when it is told to.
final class RecordingListener: MemoryListener {
    struct State {
        var pages: [UInt64: String] = [:]
        var changes: [FlatViewChange] = []
        var refuses = false
        var faults: [String] = []
    }
    let state = Mutex(State())
    let during: @Sendable () -> Void

    init(during: @escaping @Sendable () -> Void = {}) { self.during = during }

    static func text(_ range: FlatRange, _ page: UInt64) -> String {
        "\(range.block.name) \(range.offset.value / 4096 + page - range.guestAddress.value / 4096) \(range.isReadOnly)"
    }

    private static func pages(_ range: FlatRange) -> Range<UInt64> {
        range.guestAddress.value / 4096..<range.end.value / 4096
    }

    func commit(_ change: FlatViewChange) throws(MemoryError) {
        during()
        let refuses = state.withLock { state in
            if state.refuses { return true }
            state.changes.append(change)
            for range in change.removed {
                for page in Self.pages(range) {
                    let gone = state.pages.removeValue(forKey: page)
                    if gone != Self.text(range, page) { state.faults.append("page \(page) was \(gone ?? "nothing")") }
                }
            }
            for range in change.added {
                for page in Self.pages(range) {
                    let old = state.pages.updateValue(Self.text(range, page), forKey: page)
                    if let old { state.faults.append("page \(page) is \(old) already") }
                }
            }
            return false
        }
        if refuses { throw MemoryError("this listener refuses") }
    }

    static func pages(of view: FlatView) -> [UInt64: String] {
        var pages: [UInt64: String] = [:]
        for range in view.ranges { for page in Self.pages(range) { pages[page] = text(range, page) } }
        return pages
    }
}

@Suite struct MemoryTransactionTests {
    let block: RAMBlock
    let other: RAMBlock
    let memory: GuestMemory
    let device = RecordingDevice()

    init() throws {
        block = try RAMBlock(name: "ram", byteCount: 1 << 20)
        other = try RAMBlock(name: "vram", byteCount: 1 << 20)
        memory = GuestMemory(blocks: [block, other])
    }

    private func page(_ number: UInt64) -> UInt64 { number * 4096 }
    private func at(_ address: UInt64) -> GuestPhysicalAddress { GuestPhysicalAddress(address) }

    private func ranges(_ ranges: [FlatRange]) -> [String] {
        ranges.map {
            "\($0.guestAddress.value / 4096)+\($0.byteCount / 4096) \($0.block.name) \($0.offset.value / 4096)"
                + ($0.isReadOnly ? " ro" : "")
        }
    }

    private func refusal(_ body: (inout MemoryTransaction) -> Void) -> String {
        var transaction = MemoryTransaction()
        body(&transaction)
        do throws(MemoryError) {
            try memory.commit(transaction)
            return "accepted"
        } catch { return error.description }
    }

    @Test("a window of an alias over RAM shows its part, and is gone when it is disabled")
    func aliases() throws {
        var transaction = MemoryTransaction()
        transaction.add(.ram("ram", block), at: 0)
        let window = transaction.add(
            .alias("window", of: transaction.create(.ram("vram", other)), offset: page(8), byteCount: page(4)),
            at: page(16), priority: 1)
        try memory.commit(transaction)
        #expect(ranges(memory.view.ranges) == ["0+16 ram 0", "16+4 vram 8", "20+236 ram 20"])

        transaction = MemoryTransaction()
        transaction.setReadOnly(window, true)
        transaction.setAlias(window, offset: page(9))
        try memory.commit(transaction)
        #expect(ranges(memory.view.ranges) == ["0+16 ram 0", "16+4 vram 9 ro", "20+236 ram 20"])

        transaction = MemoryTransaction()
        transaction.enable(window, false)
        try memory.commit(transaction)
        #expect(ranges(memory.view.ranges) == ["0+256 ram 0"], "what continues each other is one range")
    }

    @Test("a change lists what changed and nothing beside it")
    func differences() throws {
        let listener = RecordingListener()
        try memory.addListener(listener)
        var transaction = MemoryTransaction()
        transaction.add(.ram("ram", block), at: 0)
        try memory.commit(transaction)
        transaction = MemoryTransaction()
        transaction.add(.rom("pam", block, offset: RAMOffset(page(0xc0)), byteCount: page(4)), at: page(0xc0))
        transaction.add(.ram("bar", other, byteCount: page(2)), at: page(0x200))
        try memory.commit(transaction)
        let change = listener.state.withLock { $0.changes[1] }
        #expect(ranges(change.removed) == ["192+4 ram 192"])
        #expect(ranges(change.added) == ["192+4 ram 192 ro", "512+2 vram 0"])
        #expect(ranges(change.reversed.added) == ["192+4 ram 192"])
    }

    @Test("a transaction that changes nothing the guest sees is told to nobody; one that changes devices is")
    func noChange() throws {
        let listener = RecordingListener()
        try memory.addListener(listener)
        var transaction = MemoryTransaction()
        let device = transaction.add(.io("uart", byteCount: 8, device), at: 0x1000)
        transaction.enable(device, false)
        try memory.commit(transaction)
        #expect(listener.state.withLock { $0.changes.isEmpty })
        transaction = MemoryTransaction()
        transaction.enable(device)
        try memory.commit(transaction)
        #expect(listener.state.withLock { $0.changes.count } == 1)
        #expect(memory.guestRead(at(0x1003), byteCount: 1) == 0xda)
    }

    @Test("a refused change leaves the old layout, and those told before are told the way back")
    func refusedByListener() throws {
        let (first, second) = (RecordingListener(), RecordingListener())
        try memory.addListener(first)
        try memory.addListener(second)
        var transaction = MemoryTransaction()
        let ram = transaction.add(.ram("ram", block), at: 0)
        try memory.commit(transaction)
        let before = memory.mapLines
        second.state.withLock { $0.refuses = true }
        #expect(refusal { $0.move(ram, to: page(4)) } == "this listener refuses")
        #expect(memory.mapLines == before)
        #expect(first.state.withLock { $0.pages } == RecordingListener.pages(of: memory.view))
        #expect(first.state.withLock { $0.changes.count } == 3)
        second.state.withLock { $0.refuses = false }
        #expect(refusal { $0.move(ram, to: page(4)) } == "accepted")
        #expect(second.state.withLock { $0.pages } == RecordingListener.pages(of: memory.view))
    }

    @Test("a listener hears what is there when it comes, and nothing when it is gone")
    func listeners() throws {
        var transaction = MemoryTransaction()
        let ram = transaction.add(.ram("ram", block), at: 0)
        try memory.commit(transaction)
        let (late, knowing) = (RecordingListener(), RecordingListener())
        try memory.addListener(late)
        try memory.addListener(knowing, showing: memory.view)
        #expect(late.state.withLock { $0.pages.count } == 256)
        #expect(knowing.state.withLock { $0.changes.isEmpty })
        memory.removeListener(late)
        #expect(refusal { $0.enable(ram, false) } == "accepted")
        #expect(late.state.withLock { $0.changes.count } == 1)
        #expect(knowing.state.withLock { $0.changes.count } == 1)
    }

    @Test("layouts that are not possible are refused with a sentence that names the region")
    func refusals() throws {
        var transaction = MemoryTransaction()
        let ram = transaction.add(.ram("low", block), at: 0)
        let bus = transaction.add(.container("bus", byteCount: page(64)), at: page(512))
        let alias = transaction.add(.alias("alias", of: ram, byteCount: page(2)), to: bus, at: 0)
        try memory.commit(transaction)
        let before = memory.mapLines
        #expect(
            refusal { $0.move(ram, to: 0x200) }
                == "memory region 'low': it would be seen at 0x200, 1048576 bytes; memory is seen in whole pages of 4096 bytes"
        )
        #expect(
            refusal { $0.resize(ram, to: page(257)) }.contains(
                "'low': 1052672 bytes from 0x0 are not inside block 'ram'"))
        #expect(
            refusal { $0.resize(ram, to: 100) }.contains("'low': 100 bytes from 0x0 of block 'ram' are not whole pages")
        )
        #expect(refusal { $0.resize(bus, to: 0) }.contains("'bus': its size is 0 bytes"))
        #expect(
            refusal { $0.move(ram, to: 1 << 46) }.contains(
                "'low': 1048576 bytes at 0x400000000000 end beyond the 46 bits"))
        #expect(refusal { $0.move(ram, to: .max) }.contains("end beyond the 46 bits"))
        #expect(refusal { $0.remove(ram) }.contains("'low': it cannot be removed while the alias 'alias' shows"))
        #expect(refusal { $0.setAlias(alias, of: bus, offset: 0) }.contains("it would show itself"))
        #expect(refusal { $0.setAlias(alias, of: alias, offset: 0) } == "memory region 'alias': it would show itself")
        #expect(refusal { $0.setAlias(ram, offset: 0) }.contains("'low': it is no alias"))
        #expect(
            refusal { $0.setAlias(alias, offset: .max) }.contains(
                "'alias': offset 0xffffffffffffffff in 'low' is beyond"))
        #expect(
            refusal { $0.add(.ram("x", block), to: ram, at: 0) }.contains("'x': 'low', where it was to be added, is no")
        )
        #expect(refusal { $0.add(ram, to: bus, at: 0) } == "memory region 'low': it lies in 'system' already")
        #expect(refusal { $0.remove(.system) }.contains("'system': it is the whole address space"))
        let stranger = MemoryRegionID(name: "stranger")
        #expect(refusal { $0.enable(stranger) } == "memory region 'stranger': it is not in this machine's memory")
        let committed = transaction
        #expect(refusal { $0.append(committed) }.contains("'low': it is in this machine's memory already"))
        let foreign = try RAMBlock(name: "foreign", byteCount: 4096)
        #expect(refusal { $0.add(.ram("f", foreign), at: page(900)) }.contains("'f': block 'foreign' is none of this"))
        #expect(
            refusal { transaction in
                var inner = bus
                for _ in 0..<70 { inner = transaction.add(.container("deep", byteCount: 4096), to: inner, at: 0) }
            }.contains("a line of more than 64 regions"))
        #expect(
            refusal { transaction in
                var target = ram
                for _ in 0..<20 {
                    let both = transaction.create(.container("both", byteCount: page(32)))
                    for _ in 0..<2 { transaction.add(.alias("half", of: target, byteCount: page(32)), to: both, at: 0) }
                    target = both
                }
                transaction.add(.alias("top", of: target, byteCount: page(32)), at: 0)
            }.contains("the layout has more than 65536 parts"))
        #expect(memory.mapLines == before)
    }

    @Test("an access goes to memory, ROM, device or nothing, in parts where it crosses")
    func accesses() throws {
        var transaction = MemoryTransaction()
        transaction.add(.ram("ram", block, byteCount: page(2)), at: 0)
        transaction.add(.rom("rom", other, byteCount: page(1)), at: page(2))
        transaction.add(.io("io", byteCount: 16, device), at: page(1) + 8, priority: 1)
        try memory.commit(transaction)
        #expect(ranges(memory.view.ranges) == ["0+1 ram 0", "2+1 vram 0 ro"])
        memory.hostWrites.setRecording(true)
        memory.guestWrite(at(page(1)), byteCount: 8, value: 0x1122_3344_5566_7788)
        #expect(memory.guestRead(at(page(1)), byteCount: 8) == 0x1122_3344_5566_7788)
        #expect(memory.guestRead(at(page(1) + 1), byteCount: 4) == 0x4455_6677)
        #expect(memory.guestRead(at(page(1) + 4), byteCount: 8) == 0xd4d5_d6d7_1122_3344)
        memory.guestWrite(at(page(1) + 22), byteCount: 4, value: 0xaabb_ccdd)
        #expect(device.accesses.withLock { $0 } == ["read 0 4", "write 14 2 ccdd"])
        #expect(block.mapping.read(at: 4096 + 24, count: 2) == [0xbb, 0xaa])
        memory.guestWrite(at(page(2)), byteCount: 2, value: 0xffff)
        #expect(other.mapping.read(at: 0, count: 2) == [0, 0], "the guest cannot write ROM")
        try memory.write([7, 8], at: at(page(2)))
        #expect(memory.guestRead(at(page(2)), byteCount: 2) == 0x0807, "the monitor can")
        #expect(memory.guestRead(at(page(3) - 1), byteCount: 3) == 0xff_ff00)
        #expect(memory.guestRead(at(1 << 50), byteCount: 8) == .max)
        memory.guestWrite(at(.max), byteCount: 8, value: 1)
        let dirty = try [DirtyBitmap(pageCount: 256), DirtyBitmap(pageCount: 256)]
        memory.hostWrites.collect([block, other], into: dirty)
        #expect(dirty[0].count == 1 && dirty[0].contains(PageIndex(1)) && dirty[1].contains(PageIndex(0)))
    }

    @Test("who comes with a changing address waits for the new view, who comes with another does not")
    func settling() throws {
        let entered = Monitor(false)
        let released = Monitor(false)
        let listener = RecordingListener {
            entered.withLock { $0 = true }
            released.wait { $0 ? () : nil }
        }
        var transaction = MemoryTransaction()
        transaction.add(.ram("ram", block, byteCount: page(8)), at: 0)
        try memory.commit(transaction)
        try memory.addListener(listener, showing: memory.view)
        let memory = memory
        let other = other
        let settled = Monitor<String?>(nil)
        let commit = try HostThread(name: "commit") {
            var transaction = MemoryTransaction()
            transaction.add(.ram("over", other, byteCount: 4096), at: 4096)
            try? memory.commit(transaction)
        }
        entered.wait { $0 ? () : nil }
        let waiter = try HostThread(name: "waiter") {
            let name = memory.settle(GuestPhysicalAddress(4100)).range(at: GuestPhysicalAddress(4100))?.block.name
            settled.withLock { $0 = name ?? "none" }
        }
        #expect(memory.settle(at(0)).range(at: at(4096))?.block.name == "ram", "no wait, the old view")
        #expect(memory.view.ranges.count == 1)
        #expect(settled.wait(deadline: .after(milliseconds: 50)) { $0 } == nil, "it waits")
        released.withLock { $0 = true }
        #expect(settled.wait(deadline: .after(seconds: 20)) { $0 } == "vram")
        commit.join()
        waiter.join()
        #expect(memory.settle(at(4100)).range(at: at(4096))?.block.name == "vram")
    }

    @Test("transactions made at the same time all take effect, and readers never see a mixture")
    func concurrentCommits() throws {
        var transaction = MemoryTransaction()
        // Both windows show the same half of the block at any time.
        let windows = (0..<2).map { index in
            transaction.add(
                .alias("window", of: transaction.create(.ram("all", block)), byteCount: page(4)), at: page(8 * index))
        }
        let counters = (0..<2).map { transaction.add(.io("io", byteCount: 1 + $0, device), at: page(100 + $0)) }
        try memory.commit(transaction)
        let memory = memory
        let threads = try (0..<2).map { number in
            try HostThread(name: "commit\(number)") {
                for turn in 0..<500 {
                    var transaction = MemoryTransaction()
                    for window in windows { transaction.setAlias(window, offset: UInt64(turn % 7) * 4096) }
                    transaction.resize(counters[number], to: UInt64(turn + 10))
                    try? memory.commit(transaction)
                }
            }
        }
        var mixtures = 0
        for _ in 0..<5000 {
            let ranges = memory.view.ranges
            if ranges.count != 2 || ranges[0].offset != ranges[1].offset { mixtures += 1 }
        }
        threads.forEach { $0.join() }
        #expect(mixtures == 0)
        #expect(counters.map { memory.tree.region($0)?.byteCount } == [509, 509])
    }

    @Test(
        "random trees are seen as a naive reader sees them, and listeners end with the same pages",
        arguments: 1...12 as ClosedRange<UInt64>)
    func property(seed: UInt64) throws {
        var layouts = RandomLayouts(seed: seed, blocks: [block, other], device: device)
        let listener = RecordingListener()
        try memory.addListener(listener)
        var accepted = 0
        for step in 0..<250 {
            let (transaction, added) = layouts.next()
            let before = memory.view
            do throws(MemoryError) {
                try memory.commit(transaction)
                accepted += 1
                layouts.accept(added, memory.tree)
            } catch {
                #expect(RecordingListener.pages(of: memory.view) == RecordingListener.pages(of: before))
                continue
            }
            let reader = PointwiseReader(tree: memory.tree)
            let view = memory.view
            for _ in 0..<200 {
                let address = layouts.below(RandomLayouts.pages * 2 * 4096)
                #expect(
                    matches(view.answer(at: address), reader.answer(at: address)),
                    "seed \(seed), step \(step), \(address)")
            }
            let pages = RecordingListener.pages(of: view)
            for page in 0..<RandomLayouts.pages * 2 where step % 8 == 0 {
                let isWhole = isMappable(page, reader)
                #expect((pages[page] != nil) == isWhole, "seed \(seed), step \(step), page \(page)")
            }
            let told = listener.state.withLock { ($0.pages, $0.faults) }
            #expect(told.0 == pages && told.1.isEmpty, "seed \(seed), step \(step): \(told.1)")
        }
        #expect(accepted > 60, "seed \(seed)")
    }

    private func matches(
        _ seen: (content: FlatSection.Content, region: MemoryRegionID, isReadOnly: Bool)?,
        _ wanted: PointwiseReader.Answer?
    ) -> Bool {
        guard let seen, let wanted else { return seen == nil && wanted == nil }
        guard seen.region == wanted.region, seen.isReadOnly == wanted.isReadOnly else { return false }
        switch (seen.content, memory.tree.region(wanted.region)?.content) {
        case (.memory(let block, let offset), .memory(let expected, let start)?):
            return block === expected && offset.value == start.value + wanted.offset
        case (.device(_, let offset), .device?): return offset == wanted.offset
        default: return false
        }
    }

    /// Every byte of the page is memory of one block, one after the other, read-only or not throughout.
    private func isMappable(_ page: UInt64, _ reader: PointwiseReader) -> Bool {
        var first: (block: RAMBlock, start: UInt64, isReadOnly: Bool)?
        for byte in stride(from: page * 4096, to: (page + 1) * 4096, by: Int(RandomLayouts.grain)) {
            guard let answer = reader.answer(at: byte),
                case .memory(let block, let start)? = memory.tree.region(answer.region)?.content
            else { return false }
            let place = start.value + answer.offset &- (byte - page * 4096)
            if let first {
                guard first.block === block, first.start == place, first.isReadOnly == answer.isReadOnly else {
                    return false
                }
            } else {
                first = (block, place, answer.isReadOnly)
            }
        }
        return true
    }
}
