import Accelerator
import CLinux
import Glibc
import GuestMemory
import Host
import TestSupport
import Testing

@testable import KVM

/// Without vCPUs that run: what a guest would write, the tests do.
@Suite("tracking while slots change", .enabled(if: hasKVM, needsKVM))
struct SlotTrackingTests {
    private let memory: GuestMemory
    private let low: FlatRange
    private let high: FlatRange

    init() throws {
        let blocks = try ["low", "high"].map { try RAMBlock(name: $0, byteCount: 8 << 20) }
        (low, high) = (Self.range(blocks[0], at: 0), Self.range(blocks[1], at: 1 << 30))
        memory = GuestMemory(blocks: blocks, view: FlatView([low, high]))
    }

    /// In the middle of a block: a huge page of a neighbour in this process does not reach it.
    private static let page = PageIndex(1024)

    private static func range(_ block: RAMBlock, at address: UInt64) -> FlatRange {
        FlatRange(
            guestAddress: GuestPhysicalAddress(address), byteCount: block.byteCount, block: block, offset: RAMOffset(0))
    }

    private func change(from old: [FlatRange], to new: [FlatRange]) -> FlatViewChange {
        FlatViewChange(from: FlatView(old), to: FlatView(new))
    }

    private static let choices: [DirtyTrackingChoice] = [.log, .ring(entryCount: 4096)]

    @Test("what was written in a slot that was never logged is reported when the slot goes", arguments: [0, 1])
    func neverLogged(choice: Int) throws {
        let accelerator = try KVMAccelerator(memory: memory, cpuCount: 1, dirtyTracking: Self.choices[choice])
        let tracker = accelerator.dirtyTracker(for: .migration)
        let pages = try tracker.makePages()
        try tracker.start()
        try tracker.collect(into: pages)
        #expect(!pages[1].contains(Self.page))
        memory.blocks[1].mapping.store(UInt8(1), at: Int(Self.page.offset.value))
        try accelerator.memoryListener.commit(change(from: [low, high], to: [low]))
        try tracker.collect(into: pages)
        #expect(pages[1].contains(Self.page))
        #expect(accelerator.memorySlotStatistics.pauses == 1)
        tracker.stop()
    }

    @Test(
        "pages that are placed behind the guest's back are not reported to a safety net, and those before it once",
        arguments: [0, 1])
    func placed(choice: Int) throws {
        let accelerator = try KVMAccelerator(memory: memory, cpuCount: 1, dirtyTracking: Self.choices[choice])
        let tracker = accelerator.dirtyTracker(for: .safetyNet)
        func touch(_ page: PageIndex) { memory.blocks[1].mapping.store(UInt8(1), at: Int(page.offset.value)) }
        touch(Self.page)
        let pages = try tracker.makePages()
        try tracker.start()
        try tracker.collect(into: pages)
        #expect(pages[1].contains(Self.page))
        for record in pages { record.removeAll() }
        touch(PageIndex(1536))
        try tracker.collect(into: pages)
        #expect(pages[0].isEmpty && pages[1].isEmpty, "a page that was placed is reported")
        try memory.write([1], at: GuestPhysicalAddress(5 << 12))
        try tracker.collect(into: pages)
        #expect(pages[0].contains(PageIndex(5)) && pages[1].isEmpty, "what the monitor writes is not reported")
        tracker.stop()
    }

    @Test(
        "a log that is turned on with the first page sent loses nothing that appears before or after",
        arguments: [0, 1])
    func late(choice: Int) throws {
        let (sent, before, after) = (Self.page, PageIndex(1536), PageIndex(512))
        let accelerator = try KVMAccelerator(memory: memory, cpuCount: 1, dirtyTracking: Self.choices[choice])
        let tracker = accelerator.dirtyTracker(for: .migration)
        func touch(_ page: PageIndex) { memory.blocks[1].mapping.store(UInt8(1), at: Int(page.offset.value)) }
        let pages = try tracker.makePages()
        touch(sent)
        try tracker.start()
        try tracker.collect(into: pages)
        #expect(pages[1].contains(sent) && !pages[1].contains(before))
        touch(before)
        try tracker.willSend(memory.blocks[1].pages, of: 1, marked: pages[1])
        pages[1].clear(memory.blocks[1].pages)
        touch(after)
        try tracker.collect(into: pages)
        #expect(!pages[1].contains(sent), "it would be sent twice")
        #expect(pages[1].contains(before))
        // A ring hears of guest writes alone; the log looks into holes.
        #expect(choice == 1 || pages[1].contains(after))
        tracker.stop()
    }

    @Test("a log with more holes than are looked into one by one loses nothing that appears in any")
    func manyHoles() throws {
        // No huge pages are asked for in a block that the host could not back.
        let block = try RAMBlock(name: "holes", byteCount: HostMemory.byteCount / (2 << 20) * (2 << 20) + 2 << 20)
        let chunk = PageIndex(0)..<PageIndex(16_384)
        let memory = GuestMemory(blocks: [block], view: FlatView([Self.range(block, at: 0)]))
        let accelerator = try KVMAccelerator(memory: memory, cpuCount: 1, dirtyTracking: .log)
        let tracker = accelerator.dirtyTracker(for: .migration)
        func touch(_ page: UInt64) { block.mapping.store(UInt8(1), at: Int(PageIndex(page).offset.value)) }
        let pages = try tracker.makePages()
        for page in stride(from: UInt64(0), to: 16_384, by: 4) { touch(page) }
        try tracker.start()
        try tracker.collect(into: pages)
        #expect(pages[0].count == 4096)
        try tracker.willSend(chunk, of: 0, marked: pages[0])
        pages[0].clear(chunk)
        let appeared: [UInt64] = [1, 2, 4_098, 16_383, block.pageCount - 1]
        appeared.forEach(touch)
        try tracker.collect(into: pages)
        #expect(appeared.allSatisfy { pages[0].contains(PageIndex($0)) })
        #expect(pages[0].count == UInt64(appeared.count))
        tracker.stop()
    }

    @Test("a slot that the kernel refuses leaves tracking as it was", arguments: [0, 1])
    func refused(choice: Int) throws {
        let accelerator = try KVMAccelerator(memory: memory, cpuCount: 1, dirtyTracking: Self.choices[choice])
        let tracker = accelerator.dirtyTracker(for: .migration)
        let pages = try tracker.makePages()
        try tracker.start()
        try tracker.collect(into: pages)
        // No processor has addresses like that.
        let beyond = Self.range(memory.blocks[1], at: 1 << 60)
        let error = #expect(throws: MemoryError.self) {
            try accelerator.memoryListener.commit(change(from: [low, high], to: [low, high, beyond]))
        }
        #expect(error?.description.contains("KVM_SET_USER_MEMORY_REGION") == true)
        memory.blocks[1].mapping.store(UInt8(1), at: Int(Self.page.offset.value))
        try tracker.collect(into: pages)
        #expect(pages[1].contains(Self.page))
        tracker.stop()
        let next = accelerator.dirtyTracker(for: .migration)
        try next.start()
        try next.collect(into: pages)
        next.stop()
    }

    /// Keeps what is written, and answers reads with zeroes.
    private final class Recorder: Bus, @unchecked Sendable {
        var parts: [String] = []
        func portRead(_ port: UInt16, size: Int, from cpu: any VirtualCPU) -> UInt32 { 0 }
        func portWrite(_ port: UInt16, size: Int, value: UInt32, from cpu: any VirtualCPU) {}
        func memoryRead(_ address: GuestPhysicalAddress, size: Int) -> UInt64 {
            parts.append("read \(String(address.value, radix: 16)), \(size)")
            return 0
        }
        func memoryWrite(_ address: GuestPhysicalAddress, size: Int, value: UInt64) {
            parts.append("write \(String(address.value, radix: 16)), \(size), \(value)")
        }
    }

    @Test("an access to two pages is finished as a whole before the state is saved")
    func crossing() throws {
        let accelerator = try KVMAccelerator(memory: memory, cpuCount: 1)
        let cpu = accelerator.cpus[0]
        // mov %eax,(%ebx)
        memory.blocks[0].mapping.write([0x89, 0x03, 0xf4], at: 0x1000)
        try cpu.reset(to: .protected32(entry: 0x1000, ebx: 0x80_0ffe))
        var registers = try cpu.registers()
        registers.rax = 0x1122_3344
        try cpu.setRegisters(registers)
        let bus = Recorder()
        cpu.clearKick()
        #expect(cpu.run(bus) == .handled)
        #expect(bus.parts == ["write 800ffe, 2, \(0x3344)"])
        cpu.completePendingAccess(bus)
        #expect(bus.parts == ["write 800ffe, 2, \(0x3344)", "write 801000, 2, \(0x1122)"])
        #expect(try cpu.registers().rip == 0x1002)
    }
}
